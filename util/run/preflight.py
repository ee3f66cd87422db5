"""Check whether a config can run here. All findings are reported together, each with its remedy.

`python env.py check --config FILE [--full]` prints them; train.py and test.py stop at the start where one is bad.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from util import ROOT
from util.config import Config, home_of
from util.data.episodes import check_novel, draw
from util.data.index import read_list
from util.data.source import EpisodeSource, Source
from util.data.transforms import read_image, read_pair
from util.errors import BrokenFile, UserError
from util.files import local_path
from util.run.checkpoint import check_identity, read_meta
from util.run.distributed import Context
from util.run.identity import Facts, identity, start_identity
from util.run.place import Experiment, before_file, missing_before, missing_start, start_file

SAMPLE = 16  # image and label pairs that are opened
SPARE = 2**28  # bytes that should be free where runs are written
SHARED = Path("/dev/shm")  # where workers hold their batches


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    ok: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Start:
    """A run before its start.

    Attributes:
        facts: those of its system; source: class that makes its data; clip: whether it needs a CLIP.
        lists: the lists that it reads, train_list or val_list.
        weights: whether it needs the run before or ImageNet weights (a published checkpoint has them inside).
    """

    config: Config
    place: Experiment
    facts: Facts
    source: type[Source]
    clip: bool
    lists: Sequence[str] = ("train_list", "val_list")
    weights: bool = True


def require(start: Start, extra: Sequence[Finding] = ()) -> None:
    """Raise one UserError with everything that is wrong.

    extra: the caller's own findings.
    """
    wrong = [finding for finding in [*extra, *inspect(start, read=True)] if not finding.ok]
    if wrong:
        lines = [f"{f.what}: {f.detail}" + (f"\n    -> {f.remedy}" if f.remedy else "") for f in wrong]
        raise UserError("\n  ".join([f"{start.place.arch} on {start.place.command} cannot start:", *lines]))


def inspect(start: Start, read: bool, full: bool = False) -> list[Finding]:
    """Return all findings about a start.

    Args:
        read: open a sample of the data, and count it.
        full: open every image and label.
    """
    config, place = start.config, start.place
    findings = [attempt("classes", lambda: _class_names(start.source(config))), data_root(config)]
    sound = all(finding.ok for finding in findings)
    for key in start.lists:
        labelled = start.source.labelled(key)
        findings.append(attempt(key, partial(_list, config, key, labelled)))
        if findings[-1].ok and read and sound:
            look = partial(_pairs, config, key, full, labelled)
            findings.append(attempt(f"{key}: images{' and labels' if labelled else ''}", look))
            if findings[-1].ok:
                findings.append(attempt(f"{key}: classes", lambda key=key: _classes(start.source(config), key)))
    if start.weights:
        own = "Method.backbone_weight"
        findings.append(before(config, place, start.facts.before) if start.facts.before else
                        weights("ImageNet weights", config.Method.backbone, own, config.Method.backbone_weight))
    if getattr(config.Method, "patches", ""):
        findings.append(weights("patch encoder", config.Method.patches, "Method.patches_weight", config.Method.patches_weight))
    if start.clip:
        findings.append(clip(config))
    if config.Test_Finetune.episodes:
        file = Path(config.Test_Finetune.episodes)
        remedy = "`python -m util.data export` writes one"
        findings.append(Finding("episodes", file.is_file(), f"Test_Finetune.episodes = {file}", remedy))
    return [*findings, disk(config), *shared_memory(config)]


def make_data(config: Config, context: Context) -> None:
    """Draw the data where the config names a maker for it. The main process draws, the others wait."""
    if config.Data.maker and context.main:
        command = [sys.executable, "-m", config.Data.maker, config.Data.data_root]
        if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"Data.maker: `{' '.join(command[1:])}` failed; its message is above")
    context.barrier()


def attempt(what: str, look: Callable[[], str]) -> Finding:
    """Return the result of `look` as a finding, or the UserError that it raises."""
    try:
        return Finding(what, True, look())
    except UserError as error:
        return Finding(what, False, str(error))


def data_root(config: Config) -> Finding:
    root = Path(config.Data.data_root)
    if config.Data.maker:
        return Finding("data", True, f"{root} (drawn on first use)")
    there = root.is_dir()
    detail = f"Data.data_root = {root}" + ("" if there else ": no such folder" if not root.exists() else ": not a folder")
    remedy = "docs/getting-started.md says where it comes from; Data.data_root=FOLDER where it is elsewhere"
    return Finding("data", there, detail, remedy)


def before(config: Config, place: Experiment, arch: str) -> Finding:
    """Check that the checkpoint of the run before exists. (Its fold and network are checked when it is loaded.)"""
    config, place = home_of(config), place.home(config.Test_Finetune.trained_on)
    file = before_file(config, place, arch)
    if file.is_file() and file.suffix == ".safetensors":
        wanted = identity(arch, Facts(), config)
        return attempt("base learner", lambda: check_identity(file, read_meta(file), wanted) or str(file))
    if file.is_file() or (config.Train.before == "run" and config.Method.pre_weight == "auto"):
        return Finding("base learner", True, str(file) if file.is_file() else "trained first, on the way")
    return Finding("base learner", False, missing_before(config, place, arch))


def start_weights(config: Config, place: Experiment, facts: Facts) -> list[Finding]:
    """The checkpoint that a training starts from is there and fits; [] where it starts from fresh weights."""
    if not config.Train.start_from:
        return []

    def look() -> str:
        file = start_file(config, place)
        if not file.is_file():
            raise UserError(missing_start(config, place))
        check_identity(file, read_meta(file), start_identity(place.arch, facts, config))
        return str(file)

    return [attempt("first weights", look)]


def clip(config: Config) -> Finding:
    source = config.CLIP.clip_path
    if source == "random":
        return Finding("CLIP", True, "random weights: scores mean nothing")
    path = local_path(source)
    ok = path is None or path.exists()
    model = "RN50" if "RN50" in source else "ViT-B-16"
    remedy = f"OpenAI's {model}.pt (its sha256 is checked), or CLIP.clip_path={model}-quickgelu/openai to download it"
    return Finding("CLIP", ok, f"CLIP.clip_path = {source}" + ("" if ok else ": no such file"), remedy)


def weights(what: str, network: str, key: str, source: str) -> Finding:
    """Check that the published weights of an encoder are a file where they should be one."""
    ok = source in ("hub", "none") or Path(source).is_file()
    made = "`python -m model.backbone.lite0` makes it, or " if "lite0" in source else ""
    if "dinov3" in network:
        made = (f"{network.removeprefix('timm:')} is Meta's, under the DINOv3 licence: accept it on its page, download the .pth "
                "and put it there, or take ")
    remedy = f"{made}a file, hub (download through timm) or none"
    return Finding(what, ok, f"{key} = {source}" + ("" if ok else ": no such file"), remedy)


def disk(config: Config, needed: int = SPARE) -> Finding:
    """Check the room for the checkpoints, on the disk of the output folder."""
    folder = Path(config.Runtime.output).absolute()
    while not folder.exists():
        folder = folder.parent
    free, writable = shutil.disk_usage(folder).free, os.access(folder, os.W_OK)
    detail = f"{free / 2**20:,.0f} MB free in {folder}, {needed / 2**20:,.0f} MB needed"
    detail = detail if writable else f"{folder} cannot be written"
    return Finding("disk", writable and free >= needed, detail, "Runtime.output=FOLDER on another disk")


def shared_memory(config: Config) -> list[Finding]:
    """Check the size of /dev/shm, where each worker holds two batches; Docker gives it 64 MB."""
    train = config.Train
    if not train.workers or not SHARED.is_dir():
        return []
    images = train.batch_size * (1 + train.shot)
    needed, free = 2 * train.workers * images * 3 * 4 * train.train_h**2, shutil.disk_usage(SHARED).free
    remedy = "docker run --shm-size=8g, or fewer Train.workers (0 needs none)"
    detail = f"{free / 2**20:,.0f} MB free in {SHARED}, {train.workers} workers take up to {needed / 2**20:,.0f} MB"
    return [Finding("shared memory", free >= needed, detail, remedy)]


def _class_names(source: Source) -> str:
    fold = source.fold
    return f"{fold.data_set} fold {fold.split}: {len(fold.base)} base, {len(fold.novel)} novel classes"


def _list(config: Config, key: str, labelled: bool) -> str:
    file = getattr(config.Data, key)
    return f"{file}: {len(read_list(file, labelled))} images"


def _pairs(config: Config, key: str, full: bool, labelled: bool) -> str:
    """Opens a sample of the images with their labels (if `labelled`), the same one every time, or all."""
    root, pairs = Path(config.Data.data_root), read_list(getattr(config.Data, key), labelled)
    chosen = pairs if full else sorted({pairs[draw(len(pairs), "preflight", i)] for i in range(SAMPLE)})
    wrong = []
    for image, label in chosen:
        try:
            read_pair(root / image, root / label) if labelled else read_image(root / image)
        except BrokenFile as error:
            wrong.append(str(error))
    if wrong and (config.Data.on_error == "stop" or len(wrong) == len(chosen)):
        more = f"\n    ... {len(wrong)} of the {len(chosen)} that were opened" if len(wrong) > 3 else ""
        raise UserError("\n    ".join(wrong[:3]) + more)
    return f"{len(chosen)} opened" + (f", {len(wrong)} broken (Data.on_error=skip)" if wrong else "")


def _classes(source: Source, key: str) -> str:
    """Count the images of every class of the fold; a class that can be drawn needs enough for its shots."""
    if not isinstance(source, EpisodeSource):
        return f"{len(source.records(key))} labels"
    index = source.index(training=key == "train_list")
    episodes = source.listed(index, source.config.Train.manual_seed)
    if key == "val_list":
        check_novel(episodes, source.fold, source.names)
    filed = {source.names.names[c - 1]: len(images) for c, images in index.by_class.items()}
    fewest = min(filed, key=filed.get)
    return f"{len(index.records)} images of {len(filed)} classes, fewest of {fewest}: {filed[fewest]}"
