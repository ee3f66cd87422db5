"""Can this config run here? Every answer at once, each with its remedy.

`python env.py check --config FILE [--full]` prints them; train.py and test.py stop at the start when one is bad.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from util.cache import CACHE
from util.config import Config, load_config
from util.data.episodes import EpisodeList, check_novel, draw
from util.data.index import read_list
from util.data.source import Source
from util.data.transforms import read_pair
from util.errors import BrokenFile, UserError
from util.files import local_path
from util.run.checkpoint import check_identity, read_meta
from util.run.identity import identity
from util.run.place import Experiment, base_learner_file, missing_base_learner

SAMPLE = 16  # image and label pairs that are opened
SPARE = 2**28  # bytes that should be free where runs are written
SHARED = Path("/dev/shm")  # where workers hand their batches over


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    ok: bool
    detail: str
    remedy: str = ""


def check(config_path: str, arch: str, overrides: Sequence[str], full: bool = False, quick: bool = False) -> list[Finding]:
    """Everything that train.py and test.py would open.

    Args:
        full: open every image and label, not a sample.
        quick: leave out what reads the data: counts and samples.
    Raises:
        UserError: the config itself is wrong.
    """
    config = load_config(config_path, arch, list(overrides))
    place = Experiment.from_config_path(arch, config_path, config.Runtime.output)
    drawn = config.Train.data_set != "demo" or Path(config.Data.data_root).is_dir()  # the demo is drawn on first use
    return inspect(config, place, ("train_list", "val_list"), read=drawn and not quick, full=full)


def require(config: Config, place: Experiment, lists: Sequence[str], start: bool = True, extra: Sequence[Finding] = ()) -> None:
    """Raises one UserError with everything that is wrong.

    Args:
        lists: those that are used, train_list or val_list.
        start: whether it starts from a base learner or ImageNet weights (a published checkpoint has them inside).
        extra: what the caller found.
    """
    wrong = [finding for finding in [*extra, *inspect(config, place, lists, read=True, start=start)] if not finding.ok]
    if wrong:
        lines = [f"{f.what}: {f.detail}" + (f"\n    -> {f.remedy}" if f.remedy else "") for f in wrong]
        raise UserError("\n  ".join([f"{place.arch} on {place.command} cannot start:", *lines]))


def inspect(
    config: Config, place: Experiment, lists: Sequence[str], read: bool, start: bool = True, full: bool = False
) -> list[Finding]:
    """All findings about a config."""
    findings = [attempt("classes", lambda: _class_names(source(config, place))), data_root(config)]
    sound = all(finding.ok for finding in findings)
    for key in lists:
        findings.append(attempt(key, lambda key=key: _list(config, key)))
        if findings[-1].ok and read and sound:
            findings.append(attempt(f"{key}: images and labels", lambda key=key: _pairs(config, key, full)))
            if findings[-1].ok:
                findings.append(attempt(f"{key}: classes", lambda key=key: _classes(config, source(config, place), key)))
    if start:  # ARCH without a base learner start from ImageNet weights
        alone = place.arch in ("PSPNet", "PFENet", "HSNet", "IMR_HSNet")
        findings.append(backbone(config) if alone else base_learner(config, place))
    priors = config.Method.priors or (["vtp", "vvp"] if place.arch == "PI_CLIP" else [])
    if {"vtp", "vvp"} & set(priors) or place.arch == "IMR_HSNet":
        findings.append(clip(config))
    if config.Test_Finetune.episodes:
        file = Path(config.Test_Finetune.episodes)
        remedy = "`python -m util.data export` writes one"
        findings.append(Finding("episodes", file.is_file(), f"Test_Finetune.episodes = {file}", remedy))
    return [*findings, disk(config), *shared_memory(config)]


def attempt(what: str, look: Callable[[], str]) -> Finding:
    """What `look` says, or the user error it raises."""
    try:
        return Finding(what, True, look())
    except UserError as error:
        return Finding(what, False, str(error))


def data_root(config: Config) -> Finding:
    root = Path(config.Data.data_root)
    if config.Train.data_set == "demo":
        return Finding("data", True, f"{root} (drawn on first use)")
    return Finding("data", root.is_dir(), f"Data.data_root = {root}", "docs/getting-started.md tells where it comes from")


def base_learner(config: Config, place: Experiment) -> Finding:
    """The file is there, and of this fold and network."""
    file = base_learner_file(config, place)
    if file.is_file() and file.suffix == ".safetensors":
        return attempt("base learner", lambda: check_identity(file, read_meta(file), identity("PSPNet", config)) or str(file))
    if file.is_file() or (config.Train.data_set == "demo" and config.Method.pre_weight == "auto"):
        return Finding("base learner", True, str(file) if file.is_file() else "trained first (demo)")
    return Finding("base learner", False, missing_base_learner(config, place))


def clip(config: Config) -> Finding:
    source = config.CLIP.clip_path
    if source == "random":
        return Finding("CLIP", True, "random weights: scores mean nothing")
    path = local_path(source)
    ok = path is None or path.exists()
    model = "RN50" if "RN50" in source else "ViT-B-16"
    remedy = f"OpenAI's {model}.pt (its sha256 is checked), or CLIP.clip_path={model}-quickgelu/openai to download it"
    return Finding("CLIP", ok, f"CLIP.clip_path = {source}" + ("" if ok else ": no such file"), remedy)


def backbone(config: Config) -> Finding:
    source = config.Method.backbone_weight
    ok = source in ("hub", "none") or Path(source).is_file()
    made = "`python -m model.backbone.lite0` makes it, or " if "lite0" in source else ""
    remedy = f"{made}a file, hub (download through timm) or none"
    return Finding("ImageNet weights", ok, f"Method.backbone_weight = {source}", remedy)


def disk(config: Config, needed: int = SPARE) -> Finding:
    """Room for the checkpoints, on the disk that has the output folder or will have it."""
    folder = Path(config.Runtime.output).absolute()
    while not folder.exists():
        folder = folder.parent
    free, writable = shutil.disk_usage(folder).free, os.access(folder, os.W_OK)
    detail = f"{free / 2**20:,.0f} MB free in {folder}, {needed / 2**20:,.0f} MB needed"
    detail = detail if writable else f"{folder} cannot be written"
    return Finding("disk", writable and free >= needed, detail, "Runtime.output=FOLDER on another disk")


def shared_memory(config: Config) -> list[Finding]:
    """Workers hand batches over in /dev/shm, two each; Docker gives it 64 MB."""
    train = config.Train
    if not train.workers or not SHARED.is_dir():
        return []
    images = train.batch_size * (1 + train.shot)
    needed, free = 2 * train.workers * images * 3 * 4 * train.train_h**2, shutil.disk_usage(SHARED).free
    remedy = "docker run --shm-size=8g, or fewer Train.workers (0 needs none)"
    detail = f"{free / 2**20:,.0f} MB free in {SHARED}, {train.workers} workers take up to {needed / 2**20:,.0f} MB"
    return [Finding("shared memory", free >= needed, detail, remedy)]


def source(config: Config, place: Experiment) -> Source:
    return Source(config, "images" if place.arch == "PSPNet" else "episodes", CACHE)


def _class_names(source: Source) -> str:
    fold = source.fold
    return f"{fold.data_set} fold {fold.split}: {len(fold.base)} base, {len(fold.novel)} novel classes"


def _list(config: Config, key: str) -> str:
    file = getattr(config.Data, key)
    return f"{file}: {len(read_list(file))} images"


def _pairs(config: Config, key: str, full: bool) -> str:
    """Opens a sample of the images with their labels, the same one every time, or all."""
    root, pairs = Path(config.Data.data_root), read_list(getattr(config.Data, key))
    chosen = pairs if full else sorted({pairs[draw(len(pairs), "preflight", i)] for i in range(SAMPLE)})
    wrong = []
    for image, label in chosen:
        try:
            read_pair(root / image, root / label)
        except BrokenFile as error:
            wrong.append(str(error))
    if wrong and (config.Data.on_error == "stop" or len(wrong) == len(chosen)):
        more = f"\n    ... {len(wrong)} of the {len(chosen)} that were opened" if len(wrong) > 3 else ""
        raise UserError("\n    ".join(wrong[:3]) + more)
    return f"{len(chosen)} opened" + (f", {len(wrong)} broken (Data.on_error=skip)" if wrong else "")


def _classes(config: Config, source: Source, key: str) -> str:
    """Images of every class of the fold; each that can be drawn has enough for its shots."""
    train = config.Train
    if source.task == "images":
        return f"{len(source.records(key))} labels"
    index = source.index(training=key == "train_list")
    episodes = EpisodeList(index, train.shot, train.manual_seed, start=train.draw)
    if key == "val_list":
        check_novel(episodes, source.fold, source.names)
    filed = {source.names.names[c - 1]: len(images) for c, images in index.by_class.items()}
    fewest = min(filed, key=filed.get)
    return f"{len(index.records)} images of {len(filed)} classes, fewest of {fewest}: {filed[fewest]}"
