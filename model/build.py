"""Build systems from configs: the table SYSTEMS, a builder per family, and the loading of weights."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from model.backbone import BaseLearner, ImageEncoder, build_encoder, hub_state, origin
from model.backbone.pspnet import PSPNet
from model.clip import CamSource, Clip, ClipTrunk, ResNetCam, ViTCam, load_clip
from model.clip.text import BACKGROUND, FOREGROUND
from model.few_shot.bam import BAM
from model.few_shot.cam_prior import TEMPLATE, CamPrior
from model.few_shot.hdmnet import PICLIP, HDMNet
from model.few_shot.hsnet import HSNet
from model.few_shot.imr_hsnet import IMRHSNet
from model.few_shot.map_prior import CellPrior, JoinedPrior, TextMapPrior
from model.few_shot.pfenet import PFENet
from model.few_shot.prior import (
    CELL_PRIORS,
    TEXT_MAPS,
    CosinePrior,
    Prior,
    SimilarityPrior,
    TextPrior,
    VisualPrior,
    check_priors,
    parts,
)
from model.few_shot.system import FewShot
from model.few_shot.training_free import Contrast, Insid3, TrainingFree
from model.system import Frozen, System, content_hash, load_exactly
from model.weak.clip_es import CLIPES
from model.weak.maps import text_bank as class_texts
from model.weak.system import Weak
from model.weak.weclip import WeCLIP
from model.zero_shot.clip_rc import CLIP_RC
from model.zero_shot.open_vocabulary import NACLIP, SCLIP, ClearCLIP, MaskCLIP, OpenVocabulary, ProxyCLIP
from model.zero_shot.texts import read_bank
from model.zero_shot.texts import text_bank as class_bank
from model.zero_shot.zegclip import ZegCLIP
from util.cache import CACHE
from util.config import Config, Method, home_of, load_config, options_of
from util.data.folds import ClassNames, Fold, check_disjoint, fold_of, read_class_names
from util.errors import UnknownKey, UserError, nearest
from util.files import load_published, load_state, load_tensors
from util.run.checkpoint import EXPORT, check_frozen, check_identity, read_meta
from util.run.identity import identity, start_identity
from util.run.place import Experiment, before_file, missing_before, missing_start, recorded_config, start_file
from util.score.task import Task

SYSTEMS: dict[str, type[System]] = {"PI_CLIP": PICLIP, "HDMNet": HDMNet, "BAM": BAM, "PFENet": PFENet, "HSNet": HSNet,
                                    "IMR_HSNet": IMRHSNet, "PSPNet": PSPNet, "WeCLIP": WeCLIP, "CLIP_ES": CLIPES,
                                    "CLIP_RC": CLIP_RC, "ZegCLIP": ZegCLIP, "CONTRAST": Contrast, "INSID3": Insid3,
                                    "MASKCLIP": MaskCLIP, "SCLIP": SCLIP, "NACLIP": NACLIP, "CLEARCLIP": ClearCLIP,
                                    "PROXYCLIP": ProxyCLIP}  # fmt: skip
READ_CLIP = {"vtp", "vvp", "cam", *TEXT_MAPS}  # priors that need a CLIP


def system_class(arch: str) -> type[System]:
    """Return the class that ARCH names."""
    if arch not in SYSTEMS:
        near = nearest(arch, SYSTEMS)
        hint = f"did you mean {near}? " if near else ""
        raise UserError(f"unknown system ARCH={arch!r}; {hint}There are {', '.join(SYSTEMS)}")
    return SYSTEMS[arch]


def configure(path: str | Path, arch: str, overrides: list[str] | None = None) -> Config:
    """Load the config of a system: `util.config.load_config` with the system's own options.

    Raises:
        UserError: unknown system, or as `load_config`; a key of another system is said to be one.
    """
    try:
        return load_config(path, arch, overrides, system_class(arch).Options)
    except UnknownKey as error:
        owners = [name for name, cls in SYSTEMS.items() if error.key in {f.name for f in dataclasses.fields(cls.Options)}]
        if not owners:
            raise
        raise UserError(f"{error}. It is a key of {', '.join(owners)}: did you mean ARCH={owners[0]}?") from error


def recorded(path: Path, overrides: list[str] | None = None) -> Config:
    """Return the config of a checkpoint's training, see `util.run.place.recorded_config`."""
    arch = read_meta(path).get("system")
    return recorded_config(path, overrides, system_class(arch).Options if arch else Method)


def priors_of(arch: str, config: Config) -> Sequence[str]:
    """Return the priors in effect."""
    facts = system_class(arch).facts
    return facts.priors if config.Method.priors is None else config.Method.priors


def needs_clip(arch: str, config: Config) -> bool:
    return system_class(arch).facts.clip or bool(READ_CLIP & set(parts(priors_of(arch, config))))


def build_system(arch: str, config: Config, fold: Fold, names: ClassNames, cache: Path | None = None) -> System:
    """Build a system with its frozen CLIP; backbone, base learner and head are without weights.

    Args:
        names: all classes of the data set, for the text bank; it may be replaced later (`TextPrior.use`).
        cache: folder for text banks.
    """
    cls = system_class(arch)
    make = next(make for family, make in FAMILIES.items() if issubclass(cls, family))
    return make(cls, arch, config, fold, names, cache)


def build_base_learner(cls: type[PSPNet], arch: str, config: Config, fold: Fold, names: ClassNames, cache: Path | None) -> PSPNet:
    return cls(base_learner(config, fold, cls.dilated))


def base_learner(config: Config, fold: Fold, dilated: bool) -> BaseLearner:
    method = config.Method
    encoder = build_encoder(method.backbone, method.width, method.stem, dilated)
    return BaseLearner(encoder, len(fold.base) + 1, width=8 * method.width)


def build_few_shot(cls: type[FewShot], arch: str, config: Config, fold: Fold, names: ClassNames, cache: Path | None) -> FewShot:
    learner, wanted = base_learner(config, fold, cls.dilated), list(priors_of(arch, config))
    encoder, patches = learner.encoder, build_patches(config)
    if wanted != list(cls.facts.priors):
        check_priors(wanted, bool(cls.facts.before))
    check_clip_size("cam" in cls.facts.priors, config.CLIP.clip_size)
    clip, shot, vocabulary, options = None, config.Train.shot, config.CLIP.vocabulary, options_of(config.Method, cls.Options)
    if needs_clip(arch, config):
        clip = Frozen(load_clip(config.CLIP.clip_path, resnet="cam" in wanted, activation=config.CLIP.activation))
    makers: dict[str, Callable[[], Prior]] = {
        "cosine": CosinePrior,
        "similarity": SimilarityPrior,
        "vvp": lambda: VisualPrior(clip, shot),
        "vtp": lambda: TextPrior(clip, text_bank(clip, names.texts, cache), vocabulary, fold.base),
        "cam": lambda: CamPrior(cam_source(clip.module), clip.module.text.bank(names.names, [TEMPLATE], cache),
                                vocabulary, fold.base, config.CLIP.clip_size, names.names, options.cams),
    }
    own = patches is None
    for name in CELL_PRIORS:
        makers[name] = partial(CellPrior, name, encoder if own else patches.module, own)
    for name in TEXT_MAPS:
        makers[name] = lambda name=name: TextMapPrior(name, clip.module, patches and patches.module, names.texts, vocabulary,
                                                      fold.base, cache)  # fmt: skip
    priors = {name: [makers[part]() for part in name.split("+")] for name in wanted}
    backbone = Frozen(learner if cls.facts.before else encoder)
    system = cls(backbone, [some[0] if len(some) == 1 else JoinedPrior(some) for some in priors.values()], shot, options, clip)
    if patches is not None:
        system.patches = patches
    return system


def build_patches(config: Config) -> Frozen | None:
    """Return the encoder beside the backbone that Method.patches names, without weights."""
    named, method = getattr(config.Method, "patches", ""), config.Method
    if not named:
        return None
    return Frozen(build_encoder(named, method.width, method.stem, dilated=True, kind=ImageEncoder, published=True))


def build_training_free(cls: type[TrainingFree], arch: str, config: Config, fold: Fold, names: ClassNames, cache: Path | None
                        ) -> TrainingFree:  # fmt: skip
    method, train = config.Method, config.Train
    if method.priors:
        raise UserError(f"Method.priors = {method.priors}: {arch} is a rule and takes no priors, leave it out")
    encoder = build_encoder(method.backbone, method.width, method.stem, cls.dilated, ImageEncoder, cls.published)
    return cls(Frozen(encoder), train.shot, train.val_size, options_of(method, cls.Options))


def build_weak(cls: type[Weak], arch: str, config: Config, fold: Fold, names: ClassNames, cache: Path | None) -> Weak:
    options, clip = options_of(config.Method, cls.Options), load_clip(config.CLIP.clip_path, activation=config.CLIP.activation)
    return cls(Frozen(clip), class_texts(clip.text, names.texts, options, cache), options)


def build_zero_shot(cls: type[ZegCLIP], arch: str, config: Config, fold: Fold, names: ClassNames, cache: Path | None) -> ZegCLIP:
    options, clip = options_of(config.Method, cls.Options), load_clip(config.CLIP.clip_path, activation=config.CLIP.activation)
    if not isinstance(clip.visual, ClipTrunk):
        raise UserError(f"CLIP.clip_path = {config.CLIP.clip_path} is a ResNet; {arch} puts tokens into a ViT: take ViT-B-16")
    clip, seen, warnings = Frozen(clip), [c - 1 for c in fold.base], ()
    bank = class_bank(clip, names.texts, options.templates, cache)
    if options.bank:
        bank, warnings = read_bank(Path(options.bank), names.names, bank)
    system = cls(clip, names.names, bank, seen, options)
    system.warnings += warnings
    return system


def build_open_vocabulary(cls: type[OpenVocabulary], arch: str, config: Config, fold: Fold, names: ClassNames, cache: Path | None
                          ) -> OpenVocabulary:  # fmt: skip
    clip, options = load_clip(config.CLIP.clip_path, activation=config.CLIP.activation), options_of(config.Method, cls.Options)
    return cls(Frozen(clip), names.texts, options, build_patches(config), cache)


FAMILIES: dict[type[System], Callable[..., System]] = {FewShot: build_few_shot, TrainingFree: build_training_free,
                                                      PSPNet: build_base_learner, Weak: build_weak, ZegCLIP: build_zero_shot,
                                                      OpenVocabulary: build_open_vocabulary}  # fmt: skip


def cam_source(clip: Clip) -> CamSource:
    """Return the source of class activation maps for a CLIP's kind of image tower."""
    return ViTCam(clip.visual, clip.logit_scale) if isinstance(clip.visual, ClipTrunk) else ResNetCam(clip.visual)


def check_clip_size(cam: bool, size: str) -> None:
    """Raise UserError where CLIP would get an image of the wrong kind."""
    if cam != (size in ("whole", "crop")):
        fitting = "whole (all of the image) or crop (its centre square, as published)" if cam else "original or train"
        raise UserError(f"CLIP.clip_size = {size}: for this system choose {fitting}")


def text_bank(clip: Frozen, texts: Sequence[str], cache: Path | None = None) -> Tensor:
    """Return 2C D: a row "a photo of c." for every class, then a row "a photo without c."."""
    return clip.module.text.bank([template.format(text) for template in (FOREGROUND, BACKGROUND) for text in texts], cache=cache)


def open_system(arch: str, config: Config) -> tuple[System, Task]:
    """Build a system and the task with its data; backbone, base learner and head are without weights.

    Raises UserError where the weights come from another data set (Test_Finetune.trained_on) and that cannot be tested.
    """
    task, home = system_class(arch).task(config), home_of(config)
    fold = task.fold
    if home is not config:
        if not issubclass(system_class(arch), FewShot):
            raise UserError(f"Test_Finetune.trained_on = {config.Test_Finetune.trained_on}: {arch} predicts the classes it "
                            "learnt; only few-shot systems are tested on other data sets")
        if config.CLIP.vocabulary == "base+target":
            raise UserError("CLIP.vocabulary = base+target: the base classes are of another data set (Test_Finetune.trained_on); "
                            "choose target, present or all")
        fold = fold_of(home)
        check_disjoint(fold, read_class_names(home.Data.class_names), task.fold, task.names)
    system = build_system(arch, config, fold, task.names, CACHE)
    task.clip_patch = system.clip_patch
    return system, task


def open_tested(arch: str, config: Config, place: Experiment, weight: Path) -> tuple[System, Task]:
    """Build a system as it is tested: with its weights, and with the classes of `Test_Finetune.classes` where that names some."""
    system, task = open_system(arch, config)
    load_weights(system, config, place, weight)
    if config.Test_Finetune.classes:
        names = read_class_names(config.Test_Finetune.classes, "Test_Finetune.classes")
        system.use_classes(names, CACHE)
        task.use_classes(names)
    return system, task


def load_weights(system: System, config: Config, place: Experiment, weight: Path) -> None:
    """Load all weights of a system; one that trains nothing has frozen ones alone. A checkpoint of ours must match the config and
    the frozen parts; an exported one (model/predict/share.py) and a published one have their base learner inside."""
    if not system.facts.trained:
        load_frozen(system, config, place)
        return
    config, place = home_of(config), place.home(config.Test_Finetune.trained_on)
    if not weight.is_file():
        raise UserError(f"Test_Finetune.weight = {config.Test_Finetune.weight}: no checkpoint {weight}. Train first: "
                        f"`ARCH={place.arch} NET={place.net} sh train.sh {place.command} GPUS`")
    if weight.suffix != ".safetensors":
        state, classes = load_published(weight)
        if classes:
            system.check_classes(classes, str(weight))
        system.import_official(state, str(weight))
        load_patches(system, config)
        return
    meta, state = read_meta(weight), load_tensors(weight)
    check_identity(weight, meta, identity(place.arch, system.facts, config))
    if EXPORT in meta:
        clip = {name: tensor for name, tensor in system.state_dict().items() if name.startswith("clip.")}
        load_exactly(system, clip | state, str(weight))
    else:
        load_frozen(system, config, place)
    check_frozen(weight, meta, system.frozen_hashes())
    if EXPORT not in meta:
        system.load_trained(state, str(weight))


def load_frozen(system: System, config: Config, place: Experiment, training: bool = False) -> None:
    """Load the weights that a system does not train: those of the run before, or ImageNet's.

    training: also those that its trained part starts from.
    """
    load_patches(system, config)
    before = system.facts.before
    if not before:
        for encoder in system.encoders(training):
            initialise(encoder, config.Method.backbone_weight)
        return
    path = before_file(config, place, before)
    if not path.is_file():
        raise UserError(missing_before(config, place, before))
    if path.suffix == ".safetensors":
        meta = read_meta(path)
        check_identity(path, meta, identity(before, system_class(before).facts, config))
        if config.Train.selection != "novel" and meta.get("selection") != "last":
            system.warnings += (f"the base learner {path} was chosen where novel objects of the validation images count as "
                                "background, a leak; train it with Test_Finetune.protocol=strict too",)  # fmt: skip
    system.load_before(load_state(path), str(path))


def load_patches(system: System, config: Config) -> None:
    """Load the weights of the encoder beside the backbone, where there is one."""
    patches = getattr(system, "patches", None)
    if patches is not None:
        initialise(patches.module, config.Method.patches_weight, "Method.patches_weight")


def load_start(system: System, config: Config, place: Experiment) -> dict[str, Any]:
    """Gives the trained part the weights that `Train.start_from` names; what checkpoints of the run record of them."""
    file = start_file(config, place)
    if file is None:
        return {}
    if not file.is_file():
        raise UserError(missing_start(config, place))
    meta, state = read_meta(file), load_tensors(file)
    check_identity(file, meta, start_identity(place.arch, system.facts, config))
    check_frozen(file, meta, system.frozen_hashes())
    system.load_trained(state, str(file))
    return {"start": f"{file}" + (f", step {meta['step']}" if "step" in meta else "") + f" ({content_hash(system.trained)})"}


def initialise(encoder: ImageEncoder, source: str, key: str = "Method.backbone_weight") -> None:
    """Load the published weights that a key names: a file, hub or none."""
    if source == "none":
        return
    if source == "hub":
        encoder.load_weights(hub_state(encoder), encoder.hub)
    elif Path(source).is_file():
        encoder.load_weights(load_state(Path(source)), source)
    else:
        made = " `python -m model.backbone.lite0` makes it." if "lite0" in source else ""
        raise UserError(f"{key}: no file {source!r}.{made} Put the weights of {encoder.hub} there (a timm or torchvision state "
                        "dict, semseg's resnet50_v2.pth, DINOv3's own .pth), or use hub (download through timm) or none (from "
                        f"scratch). {origin(encoder)}")
