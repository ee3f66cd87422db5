"""Options that name a model, for predict.py and the web page."""

import argparse
import os
from pathlib import Path

import torch

from model.build import SYSTEMS, configure, recorded
from model.clip.load import HUB_NAME
from util.config import CLIP, Config
from util.errors import UserError
from util.files import ROOT
from util.pool import cores


def asked_config(given: argparse.Namespace, weights: Path) -> Config | None:
    """Return the config of --config and the overrides of a command line; None: the one recorded with the weights."""
    if given.config:
        return configure(given.config, given.arch or "", given.overrides)
    return recorded(weights, given.overrides) if given.overrides else None


def model_options(parser: argparse.ArgumentParser) -> None:
    """Which model: a checkpoint, or a CLIP alone. `check_model` looks at what was given."""
    parser.add_argument("--weights", help="checkpoint, exported file, published .pth, or a name: photos, a small network for "
                        "photographs that comes along (default); demo, the drawn world's PI-CLIP once it is trained")
    parser.add_argument("--clip", nargs="?", const="", metavar="SOURCE", help="no weights, no training, the text alone: a CLIP's "
                        f"file, folder or hub name (default: {CLIP.clip_path} or else {HUB_NAME}, some 600 MB to download)")
    parser.add_argument("--device", help="cpu, cuda, ...; default: the GPU where there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: as many as there are free cores")
    parser.add_argument("--config", help="of a published .pth: config/DATASET/DATASET_EXP_NET.yaml")
    parser.add_argument("--arch", help=f"of a published .pth: {', '.join(SYSTEMS)}")
    parser.add_argument("overrides", nargs="*", metavar="Section.key=value", help="where files are now, CLIP.clip_path=...")


def use_threads(asked: int | None) -> int:
    """Let torch use that many CPU threads; by default one a core that nothing else keeps busy. Return the number.

    torch's own default is one a core, busy or not: they wait for each other, and a prediction takes ten times as long.
    """
    if asked is not None and asked < 1:
        raise UserError(f"--threads {asked}: must be at least 1")
    count = asked or max(1, round(cores() - os.getloadavg()[0]))
    torch.set_num_threads(count)
    return count


def check_model(given: argparse.Namespace) -> None:
    """Replace --clip by the name of a CLIP, or by its file or folder where there is one.

    Raises:
        UserError: --clip together with options of a checkpoint.
    """
    if given.clip is None:
        return
    for option in ("weights", "config", "arch", "overrides"):
        if value := getattr(given, option):
            raise UserError(f"--clip takes no trained network, and so nothing of {option} ({value})")
    name = given.clip or CLIP.clip_path
    found = next((path for path in (Path(name), ROOT / name) if path.exists()), None)
    given.clip = str(found or given.clip or HUB_NAME)
