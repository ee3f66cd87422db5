"""Command line of predict.py, and the options that name a model, which the web page has, too.

What is wrong on a command line is said before torch is imported, which takes seconds: nothing here imports it at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from model import early
from util import ROOT
from util.config import CLIP, HUB_NAME, Config
from util.errors import UserError
from util.photos import KINDS
from util.pool import cores


def asked_config(given: argparse.Namespace, weights: Path) -> Config | None:
    """Return the config of --config and the overrides of a command line; None: the one recorded with the weights."""
    from model.build import configure, recorded

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
    parser.add_argument("--arch", help=f"of a published .pth: {', '.join(early.systems())}")
    parser.add_argument("overrides", nargs="*", metavar="Section.key=value", help="where files are now, CLIP.clip_path=...")


def use_threads(asked: int | None) -> int:
    """Let torch use that many CPU threads; by default one a core that nothing else keeps busy. Return the number.

    torch's own default is one a core, busy or not: they wait for each other, and a prediction takes ten times as long.
    """
    if asked is not None and asked < 1:
        raise UserError(f"--threads {asked}: must be at least 1")
    import torch

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


def parse(description: str) -> argparse.Namespace:
    """Parse the command line of predict.py. Raises UserError for options that do not go together."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--support", action=AddSupport, default=[], metavar="IMAGE", help="example; its --mask or --box follows")
    parser.add_argument("--mask", action=AddSupport, metavar="PNG", help="where the object is: 0 background, the rest object")
    parser.add_argument("--box", action=AddSupport, metavar="X0,Y0,X1,Y1", help="or a box around it")
    parser.add_argument("--class", action=AddSupport, dest="named", default=[], metavar="NAME", help="several things at once: "
                        "the supports after it show NAME, those after the next --class another")
    parser.add_argument("--absent-below", metavar="T", help="write an empty mask where presence (scores.json) is below T, "
                        "0 to 1; auto: the threshold that was measured for the network")
    parser.add_argument("--text", help="what it is, in any words; systems with CLIP's text prior need it")
    parser.add_argument("--classes", metavar="NAMES", help="of a zero-shot system: other classes than those of its training, as "
                        "names separated by commas, or as a file with a name a line (NAME | text for CLIP)")
    parser.add_argument("--query", nargs="+", required=True, help="images, folders, patterns, videos")
    parser.add_argument("--out", type=Path, default=Path("found"), help="folder for the results (default found)")
    parser.add_argument("--polygons", choices=KINDS, help="also write the masks for another tool")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of a video, every N-th frame")
    parser.add_argument("--tile", type=int, metavar="N", help="see pictures larger than N pixels through overlapping windows of "
                        "that side, for things that are small in them; default: every picture as a whole")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU that has it")
    model_options(parser)
    given = parser.parse_intermixed_args(joined(sys.argv[1:]))
    if given.every < 1:
        raise UserError(f"--every {given.every}: must be at least 1")
    if given.tile is not None:
        if given.tile < 1:
            raise UserError(f"--tile {given.tile}: the side of a window in pixels must be positive")
        if given.clip is not None or not given.support:
            raise UserError(f"--tile {given.tile}: windows are for what --support shows")
    check_classes(given)
    given.absent_below = read_threshold(given.absent_below)
    check_model(given)
    if given.classes is not None and not given.weights:
        raise UserError("--classes: name the weights of a system that labels every pixel, too (--weights FILE)")
    if given.clip is not None and (given.support or not given.text):  # checked before a CLIP is downloaded
        raise UserError("--clip finds what --text names: give a text, and no --support; examples need a trained system")
    return given


def check_classes(given: argparse.Namespace) -> None:
    """Raise UserError where the groups of --class are not names with supports."""
    if not given.named:
        return
    supported = [support["class"] for support in given.support]
    folded = [name.strip().casefold() for name in given.named]
    if twice := [name for i, name in enumerate(given.named) if folded[i] in folded[:i]]:
        raise UserError(f"--class {twice[0]}: named twice; give all its supports after one --class")
    if empty := [name for name in given.named if name not in supported]:
        raise UserError(f"--class {empty[0]}: no --support follows it; each class needs at least one")
    if None in supported:
        raise UserError("--support before the first --class: it belongs to no class; put a --class NAME before it")
    if given.text or given.classes:
        raise UserError("--class NAME is also the text; leave --text and --classes out")


def read_threshold(given: str | None) -> float | str | None:
    """Read --absent-below: a number in 0..1, "auto" or None. Raises UserError for others."""
    if given in (None, "auto"):
        return given
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"--absent-below {given}: give a number between 0 and 1, or auto")
    return value


def joined(words: Sequence[str]) -> list[str]:
    """Join --box with a value that begins with a minus sign: argparse takes it for an option."""
    found: list[str] = []
    for word in words:
        if found and found[-1] == "--box" and word.startswith("-") and "," in word:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


class AddSupport(argparse.Action):
    """--class begins a group of supports, --support a support; --mask and --box belong to the support before them."""

    def __call__(self, parser, namespace, value, option=None) -> None:  # noqa: ANN001
        group = namespace.named[-1] if namespace.named else None
        if option == "--class":
            namespace.named = [*namespace.named, value]
        elif option == "--support":
            namespace.support = [*namespace.support, {"image": value, "mask": None, "boxes": [], "class": group}]
        elif not namespace.support or namespace.support[-1]["class"] != group:
            parser.error(f"{option} {value}: give its --support first")
        elif option == "--mask":
            if namespace.support[-1]["mask"] is not None:
                parser.error(f"--mask {value}: the support before it has a mask already")
            namespace.support[-1]["mask"] = value
        else:
            try:
                x0, y0, x1, y1 = map(float, value.split(","))
            except ValueError:
                parser.error(f"--box {value}: give four numbers with commas and no blanks, x0,y0,x1,y1 as in 10,20,200,300")
            namespace.support[-1]["boxes"].append([x0, y0, x1, y1])
