"""From a config to a system with its frozen weights."""

from pathlib import Path

from model.backbone import BaseLearner, build_encoder, hub_state
from model.backbone.pspnet import PSPNet
from model.clip import load_clip
from model.clip.text import BACKGROUND, FOREGROUND
from model.few_shot.hdmnet import PICLIP, HDMNet
from model.few_shot.prior import CosinePrior, Prior, TextPrior, VisualPrior, check_priors
from model.system import Frozen, System
from util import experiment
from util.checkpoint import check_identity, read_meta
from util.config import Config
from util.data.build import Source
from util.data.folds import ClassNames, Fold
from util.errors import UserError
from util.experiment import Experiment
from util.files import load_state

SYSTEMS: dict[str, type[System]] = {"PI_CLIP": PICLIP, "HDMNet": HDMNet, "PSPNet": PSPNet}


def system_class(arch: str) -> type[System]:
    """The class that ARCH names."""
    if arch not in SYSTEMS:
        raise UserError(f"unknown system ARCH={arch!r}; there are {', '.join(SYSTEMS)}")
    return SYSTEMS[arch]


def build_system(arch: str, config: Config, fold: Fold, names: ClassNames, cache: Path | None = None) -> System:
    """Builds a system with its frozen CLIP; base learner and head come without weights.

    Args:
        names: of all classes of the data set, for the text bank.
        cache: folder for text banks.
    """
    method, train = config.Method, config.Train
    cls = system_class(arch)
    learner = BaseLearner(build_encoder(method.backbone, method.width), len(fold.base) + 1, width=8 * method.width)
    if cls is PSPNet:
        return PSPNet(learner)
    base_learner = Frozen(learner)
    wanted = cls.default_priors if method.priors is None else method.priors
    check_priors(wanted)
    clip = Frozen(load_clip(config.CLIP.clip_path)) if {"vtp", "vvp"} & set(wanted) else None
    priors: list[Prior] = []
    for name in wanted:
        if name == "cosine":
            priors.append(CosinePrior(base_learner))
        elif name == "vvp":
            priors.append(VisualPrior(clip, train.shot))
        else:
            texts = [template.format(name) for template in (FOREGROUND, BACKGROUND) for name in names.texts]
            priors.append(TextPrior(clip, clip.module.text.bank(texts, cache), config.CLIP.vocabulary, fold.base))
    return cls(
        base_learner, priors, train.shot, low_stage=int(method.low_fea[-1]), kshot_trans_dim=method.kshot_trans_dim,
        distil_weight=method.aux_weight1, base_weight=method.aux_weight2, clip=clip,
    )  # fmt: skip


def open_system(arch: str, config: Config) -> tuple[System, Source]:
    """A system and the data it works on; base learner and head come without weights."""
    source = Source(config, system_class(arch).task, experiment.CACHE)
    system = build_system(arch, config, source.fold, source.names, experiment.CACHE)
    source.clip_patch = system.clip_patch
    return system, source


def load_base_learner(system: HDMNet, config: Config, place: Experiment) -> None:
    """Loads the frozen base learner from `Method.pre_weight`; one of ours must be of the same fold and network."""
    path = experiment.base_learner_file(config, place)
    if not path.is_file():
        raise UserError(experiment.missing_base_learner(config, place))
    if path.suffix == ".safetensors":
        check_identity(path, read_meta(path), experiment.identity("PSPNet", config))
    system.load_base_learner(load_state(path), str(path))


def initialise_backbone(system: PSPNet, source: str) -> None:
    """Gives the base learner's encoder the ImageNet weights that `Method.backbone_weight` names: a file, hub or none."""
    encoder = system.trained.encoder
    if source == "none":
        return
    if source == "hub":
        encoder.load_imagenet(hub_state(encoder), encoder.hub)
    elif Path(source).is_file():
        encoder.load_imagenet(load_state(Path(source)), source)
    else:
        made = " `python -m model.backbone.lite0` makes it." if "lite0" in source else ""
        raise UserError(f"Method.backbone_weight: no file {source!r}.{made} Put ImageNet weights there (resnet50_v2.pth of "
                        "semseg, or a timm / torchvision state dict), or use hub (download through timm) or none (from scratch)")
