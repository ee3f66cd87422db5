"""Can this config run here? Every answer at once, each with its remedy; `python env.py check --config FILE` prints them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from util.config import Config, load_config
from util.data.folds import fold_of, read_class_names
from util.data.index import read_list
from util.errors import UserError
from util.experiment import Experiment, base_learner_file


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    ok: bool
    detail: str
    remedy: str = ""


def check(config_path: str, arch: str, overrides: list[str]) -> list[Finding]:
    """Everything that `train.py` would open: data, lists, class names, weights.

    Raises:
        UserError: the config itself is wrong.
    """
    config = load_config(config_path, arch, overrides)
    place = Experiment.from_config_path(arch, config_path, config.Runtime.output)
    findings = [
        attempt("fold", lambda: _fold(config)),
        attempt("class names", lambda: _names(config)),
        data_root(config),
        *(attempt(key, lambda key=key: _list(config, key)) for key in ("train_list", "val_list")),
    ]
    # ARCH without a base learner start from ImageNet weights
    findings.append(backbone(config) if arch in ("PSPNet", "PFENet") else base_learner(config, place))
    priors = config.Method.priors or (["vtp", "vvp"] if arch == "PI_CLIP" else [])
    if {"vtp", "vvp"} & set(priors):
        findings.append(clip(config))
    if config.Test_Finetune.episodes:
        file = Path(config.Test_Finetune.episodes)
        remedy = "`python -m util.data.episodes export` writes one"
        findings.append(Finding("episodes", file.is_file(), f"Test_Finetune.episodes = {file}", remedy))
    return findings


def attempt(what: str, look: Callable[[], str]) -> Finding:
    """What `look` says, or the user error it raises."""
    try:
        return Finding(what, True, look())
    except UserError as error:
        return Finding(what, False, str(error), "see the message")


def data_root(config: Config) -> Finding:
    root = Path(config.Data.data_root)
    if config.Train.data_set == "demo":
        return Finding("data", True, f"{root} (drawn on first use)")
    return Finding("data", root.is_dir(), f"Data.data_root = {root}", "README tells where the data comes from")


def base_learner(config: Config, place: Experiment) -> Finding:
    file = base_learner_file(config, place)
    if file.is_file() or config.Train.data_set == "demo":
        return Finding("base learner", True, str(file) if file.is_file() else "trained first (demo)")
    return Finding("base learner", False, f"no {file}", f"ARCH=PSPNet NET={place.net} sh train.sh {place.command} GPUS")


def clip(config: Config) -> Finding:
    source = config.CLIP.clip_path
    if source == "random":
        return Finding("CLIP", True, "random weights: scores mean nothing")
    local = source.startswith((".", "/", "~")) or Path(source).suffix in (".pt", ".pth", ".bin", ".safetensors")
    ok = Path(source).exists() or not local
    return Finding("CLIP", ok, source, "OpenAI's ViT-B-16.pt, or CLIP.clip_path=ViT-B-16-quickgelu/openai to download it")


def backbone(config: Config) -> Finding:
    source = config.Method.backbone_weight
    ok = source in ("hub", "none") or Path(source).is_file()
    return Finding("ImageNet weights", ok, source, "a file, hub (download through timm) or none")


def _fold(config: Config) -> str:
    classes = fold_of(config)
    return f"{config.Train.data_set} {config.Train.split}: {len(classes.base)} base, {len(classes.novel)} novel classes"


def _names(config: Config) -> str:
    return f"{config.Data.class_names}: {len(read_class_names(config.Data.class_names).names)}"


def _list(config: Config, key: str) -> str:
    """The list reads well and its first image is where it says."""
    file, root = getattr(config.Data, key), Path(config.Data.data_root)
    pairs = read_list(file)
    missing = [p for p in pairs[0] if config.Train.data_set != "demo" and not (root / p).is_file()]
    if missing:
        raise UserError(f"{file}: {missing[0]} is not under Data.data_root = {root}")
    return f"{file}: {len(pairs)} images"
