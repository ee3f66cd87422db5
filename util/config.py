"""Typed configuration: dataclass defaults <- protocol <- the system's file <- YAML (with `extends`) <- recipe <- command line.

Sections and keys carry the names of the PFENet / BAM / HDMNet YAML files. Every field is documented here, where it is
defined. An unknown key or a wrong type is an error that names the file, the key and the nearest right one.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from util.errors import UserError
from util.layers import (
    CONFIGS,
    PROTOCOLS,
    SYSTEMS,
    data_layers,
    file_layers,
    home_file,
    mapping,
    meant,
    network_layers,
    override,
    read_layer,
    system_layers,
)
from util.yaml_text import set_key

STRICT = "strict"  # the protocol of a system that no paper has one for
HUB_NAME = "ViT-B-16-quickgelu/openai"  # the published CLIP, as CLIP.clip_path names it on the hub

Start = Literal["image", "pair", "class", "cycle"]  # what an episode starts from


@dataclass
class Data:
    data_root: str = ""  # folder that the paths in the lists are relative to
    train_list: str = ""  # text file, one `image_path label_path` per line
    val_list: str = ""
    class_names: str = ""  # text file, one `NAME | text for CLIP` per line
    same_by: Literal["time", "size", "content"] = "time"  # how a run that goes on knows its images: size and time, size, or bytes
    on_error: Literal["stop", "skip"] = "stop"  # a broken image or label: stop, or go on without it and count it in the report
    image_labels: str = ""  # file of image-level labels (util/data/image_labels.py); "": the XML beside an image, else its label
    label_table: str = ""  # YAML file `VALUE: CLASS`, where label values are no class ids (0 background, 255 ignore)
    folds: str = ""  # YAML file, `split0: [class names]` and so on; without one the data set's published rule holds
    maker: str = ""  # module that draws the data root where it is missing: `python -m MAKER DATA_ROOT`
    images: Literal["photographs", "drawings"] = "photographs"  # drawings: predict.py warns on anything else
    min_pixels: int = 2048  # a class counts in an image from this many labelled pixels on (2 * 32 * 32)
    support_pixels: int = 0  # the same for supports alone, where they need more; 0: as min_pixels
    pair_lists: str = ""  # HSNet's folder data/splits: what counts in validation is what its lists name, in place of min_pixels


@dataclass
class CLIP:
    clip_path: str = "initmodel/ViT-B-16.pt"  # file, folder, hub name MODEL/PRETRAINED, or `random` (no meaning, full path)
    activation: Literal["auto", "quick_gelu", "gelu"] = "auto"  # for a file of weights whose activation is not known otherwise
    # VTP's image: undo the squash (PASCAL) or keep the network side (COCO). IMR-HSNet's: all of the image, or a centre square
    clip_size: Literal["original", "train", "whole", "crop"] = "original"
    vocabulary: Literal["present", "target", "base+target", "all"] = "present"  # texts that compete; `present` reads ground truth


@dataclass
class Train:
    data_set: str = "pascal"
    split: int = 0  # fold: its classes are novel
    use_split_coco: bool = True  # COCO: interleaved folds (True) or contiguous blocks (False)
    filter_novel: bool = True  # BAM's filter: no training image may show a novel class
    shot: int = 1
    # images
    train_h: int = 473  # side of the square network input
    val_size: int = 473
    # What an episode starts from; cycle: class after class. All but image: supports may repeat (HSNet and its children).
    draw: Start = "image"
    augment: bool = True  # False: training images are only resized (HSNet)
    antialias: bool = False  # squash with Pillow's antialiased bilinear (HSNet) instead of OpenCV's plain one
    crop: bool = False  # random crop (BAM, PFENet, base learner) instead of squashing the aspect ratio
    scale_min: float = 0.9
    scale_max: float = 1.1
    resized_val: bool = True  # validation squashes to a square; False letterboxes
    # optimisation
    batch_size: int = 8  # global, whatever the number of GPUs
    base_lr: float = 1e-4
    optimizer: Literal["paper", "adamw"] = "paper"  # the system's own, or AdamW for short runs
    epochs: int = 200
    iterations: int = 0  # length of the training in steps; 0: `epochs` says it
    power: float = 0.9  # poly schedule, per step (util/run/schedule.py)
    warmup: int = 0  # steps in which the rate grows from `warmup_ratio` of itself
    warmup_ratio: float = 0.0
    warmup_of: Literal["initial", "decayed"] = "initial"  # which rate grows: the initial one (WeCLIP) or the decayed (mmcv)
    min_lr: float = 0.0  # floor that the schedule ends at
    momentum: float = 0.9  # SGD only
    weight_decay: float = 0.01
    manual_seed: int = 321
    workers: int = 8
    # validation
    selection: Literal["novel", "base", "last"] = "novel"  # snapshot/best: best on novel (as published) or base classes, or last
    # Score pseudo labels against masks of training images, where the list names them, to see the curve; nothing learns from them.
    watch_labels: bool = False
    watch: bool = False  # with selection `last`: validate all the same, to see the curve; nothing is chosen by it
    # Epochs between validations (0.5: also in the middle of each), or steps where `iterations` counts; 0: the end of each epoch.
    validate_every: float = 0.0
    keep: list[int] = field(default_factory=list)  # steps after which the weights are kept as snapshot/STEP.safetensors
    before: Literal["ask", "run"] = "ask"  # the run that must come first (a base learner): ask for it, or train it on the way
    val_episodes: int = 1000
    batch_size_val: int = 1
    print_freq: int = 10  # steps between points of the TensorBoard curves
    save_minutes: float = 10.0  # between resume points within an epoch; its end is always one
    start_from: str = ""  # weights to start from: EXP/STEP of the same system and network (or EXP/last), or a file
    resume: Literal["auto", "none"] = "auto"  # auto: the same command goes on where the last run stopped


@dataclass
class Method:
    """What all systems share; a system's own options extend it (`class Options(Method)` beside the system)."""

    backbone: str = "resnet50"  # resnet50 | resnet101 | vgg16_bn | vgg16 | timm:NAME
    width: int = 64  # ResNet base width; 64 is the published network
    stem: Literal["deep", "plain"] = "deep"  # ResNet's: semseg's three 3x3, or torchvision's 7x7 (HSNet)
    backbone_weight: str = "hub"  # ImageNet weights the base learner starts from: file | hub | none
    pre_weight: str = "auto"  # base learner checkpoint; auto: the one trained for this fold
    priors: list[str] | None = None  # cosine | similarity | vtp | vvp; None: the system's own

    def check(self) -> None:
        """Raises UserError for values that cannot be; a system extends it for its own options."""


@dataclass
class Test_Finetune:
    weight: str = "auto"  # checkpoint; auto: snapshot/best of the experiment; published .pth files are imported
    trained_on: str = ""  # DATASET/EXP/NET whose weights are tested on this data set; "": its own. Few-shot systems only
    ann_type: Literal["mask", "bbox"] = "mask"  # support annotation
    protocol: str = "auto"  # a file of config/protocol; auto: that of the system's paper (config/system), else `strict`
    leak_free: bool = True  # where the protocol leaks, also test without: another vocabulary, the last epoch's weights
    episodes: str = ""  # run the episodes of this file (`python -m util.data export`) instead of drawing them
    test_num: int = 1000  # episodes per seed; 0: one pass, each pair of image and class (or image, where Train.draw=image) once
    # How episodes are drawn: by ours, or as published codes do (util/data/replay.py); and the number of their loader's workers.
    generator: Literal["ours", "workers", "numpy", "fold"] = "ours"
    draw_workers: int = 0
    seeds: list[int] = field(default_factory=lambda: [321, 322, 323, 324, 325])
    classes: str = ""  # systems that take any names: file of classes to predict instead of the data set's, as Data.class_names
    crf: bool = False  # dense systems: also score the prediction after the paper's CRF (pip install pydensecrf2)
    maps: str = ""  # dense systems: folder that gets a label map of every tested image, PNGs of class ids under the images' paths
    baselines: bool = False  # also score training-free predictions on the same episodes
    control: bool = False  # few-shot: every episode once more with supports of another class, for the support gap; twice the time
    # Few-shot rules of scoring (util/score/rules.py): the pixels that are counted, void pixels, and the classes of the mean.
    grid: Literal["original", "square", "letterbox"] = "original"
    void: Literal["ignore", "background"] = "ignore"
    mean: Literal["m0", "m1"] = "m0"  # m0: a class never drawn counts 0; m1: it is left out


@dataclass
class Runtime:
    precision: Literal["fp32", "bf16"] = "fp32"  # autocast; Grad-CAM, losses and metrics stay fp32. bf16 on a CPU needs AVX-512
    # Testing and validation: memory of each process (the GPU's on a GPU) for what depends on one image.
    cache_gb: float | None = None  # none: half of what is free (a quarter beside a training)
    cache_dir: str = ""  # folder that keeps it for later runs too (some 10 MB an image at 473)
    processes: int = 1  # on the CPU: how many share the work (train.sh and test.sh start them); with GPUs, one for each
    threads: int = 0  # CPU threads per process; 0: all cores, divided among the processes
    tracker: Literal["tensorboard", "wandb", "trackio"] = "tensorboard"  # the curves go to Weights & Biases or Trackio, too
    output: str = "exp"  # folder of all runs: OUTPUT/DATASET/ARCH/EXP/NET


@dataclass
class Config:
    Data: Data = field(default_factory=Data)
    CLIP: CLIP = field(default_factory=CLIP)
    Train: Train = field(default_factory=Train)
    Method: Method = field(default_factory=Method)
    Test_Finetune: Test_Finetune = field(default_factory=Test_Finetune)
    Runtime: Runtime = field(default_factory=Runtime)

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def load_config(path: str | Path, arch: str | None = None, overrides: list[str] | None = None,
                options: type[Method] | None = Method) -> Config:  # fmt: skip
    """Reads a fold's YAML. (`model.configure` knows a system's options.)

    Order, later wins: defaults, the protocol, config/system/ARCH.yaml, the files it extends, `ARCH.yaml` beside it (a system's
    own recipe for the data set, where there is one) and `ARCH_EXP.yaml` (for one experiment), the file itself, overrides.

    Args:
        options: section Method with the system's own options; None: keys of Method that not all systems share are passed over.
    Raises:
        UserError: missing file, bad YAML, unknown section or key, wrong type or value, malformed override.
    """
    path, loose = Path(path), options is None
    config = Config(Method=(options or Method)())
    *bases, fold = file_layers(path)
    system, recipe = system_layers(path, arch)
    given = [(Path("command line"), override(text)) for text in overrides or []]
    layers = [*system, *bases, *recipe, fold, *given]
    named = [(content.get("Test_Finetune") or {}).get("protocol") for _, content in [*recipe, *system]]
    paper = next(filter(None, named), STRICT)
    _apply(config, layers, loose)  # first without the protocol: which one, and of which data set?
    if config.Test_Finetune.trained_on:
        layers = [*network_layers(config.Test_Finetune.trained_on, arch), *data_layers([*bases, fold]), *given]
    name = paper if config.Test_Finetune.protocol == "auto" else config.Test_Finetune.protocol
    _apply(config, [(PROTOCOLS / f"{name}.yaml", protocol_layer(name, config.Train.data_set)), *layers], loose)
    config.Test_Finetune.protocol = name
    _validate(config)
    return config


def home_of(config: Config) -> Config:
    """Return the config with the data that the tested weights learnt from; itself where these are its own."""
    if not config.Test_Finetune.trained_on:
        return config
    home = load_config(home_file(config.Test_Finetune.trained_on), options=None)
    own = {key: getattr(home.Train, key) for key in ("data_set", "split", "use_split_coco")}
    return dataclasses.replace(config, Data=home.Data, Train=dataclasses.replace(config.Train, **own))


def config_of(content: dict, source: str, overrides: list[str] | None = None, options: type[Method] = Method) -> Config:
    """A config as a checkpoint or config.yaml of a run keeps it (`dataclasses.asdict`), with `Section.key=value` overrides.

    Raises:
        UserError: as `load_config`.
    """
    config = Config(Method=options())
    _apply(config, [(Path(source), renewed(content, options))])
    _apply(config, [(Path("command line"), override(text)) for text in overrides or []])
    _validate(config)
    return config


def renewed(content: dict, options: type[Method]) -> dict:
    """A recorded config under the keys of today. Records of before had the options of all systems in section Method."""
    content = {section: dict(values or {}) for section, values in content.items()}
    train, own = content.get("Train", {}), {f.name for f in dataclasses.fields(options)}
    for key in ("evaluate", "rotate_min", "rotate_max"):
        train.pop(key, None)
    if "SubEpoch_val" in train:
        train["validate_every"] = 0.5 if train.pop("SubEpoch_val") else 0.0
    content["Method"] = {key: value for key, value in content.get("Method", {}).items() if key in own}
    return content


def protocol_names() -> list[str]:
    return sorted(file.stem for file in PROTOCOLS.glob("*.yaml"))


def protocol_layer(name: str, data_set: str, within: tuple[str, ...] = ()) -> dict[str, dict]:
    """Return the sections and keys that a protocol fixes for a data set: those of the protocol it extends, then its own.

    Raises:
        UserError: no such protocol, or a part of its file that is neither a section of a config nor a data set.
    """
    if name not in protocol_names():
        raise UserError(f"Test_Finetune.protocol = {name!r}{meant(name, protocol_names())}; there are "
                        f"{', '.join(protocol_names())} in {PROTOCOLS}")
    file, sections = PROTOCOLS / f"{name}.yaml", [f.name for f in dataclasses.fields(Config)]
    content = read_layer(file)
    base = content.pop("extends", None)
    if base in (*within, name):
        raise UserError(f"{file}: `extends` runs in a circle")
    layer = protocol_layer(base, data_set, (*within, name)) if base else {}
    by_data_set = {part: content.pop(part) or {} for part in [*content] if part not in sections}
    sets = [folder.name for folder in CONFIGS.iterdir() if folder.is_dir() and folder not in (PROTOCOLS, SYSTEMS)]
    for part in by_data_set:
        if part != data_set and part not in sets:
            raise UserError(f"{file}: {part!r} is no section of a config and no data set"
                            f"{meant(part, [*sections, *sets]) or '; sections are ' + ', '.join(sections)}")
    for own in (content, by_data_set.get(data_set, {})):
        layer = {section: layer.get(section, {}) | own.get(section, {}) for section in layer | own}
    return layer


def _apply(config: Config, layers: list[tuple[Path, dict]], loose: bool = False) -> None:
    for file, content in layers:
        for section, values in content.items():
            for key, value in mapping(values, f"{file}: {section}").items():
                if loose and section == "Method" and not hasattr(config.Method, str(key)):
                    continue
                set_key(config, section, key, value, str(file))


def options_of(values: Method | dict[str, Any], options: type[Method]) -> Method:
    """Section Method with a system's own options; those that `values` does not name keep their defaults.

    Raises:
        UserError: unknown key, wrong type or value.
    """
    if isinstance(values, options):
        return values
    config = Config(Method=options())
    _apply(config, [(Path("config"), {"Method": vars(values) if isinstance(values, Method) else values})])
    config.Method.check()
    return config.Method


def _validate(config: Config) -> None:
    train, test = config.Train, config.Test_Finetune

    def need(key: str, value: Any, ok: bool, what: str) -> None:
        if not ok:
            raise UserError(f"{key} = {value}: must be {what}")

    for section, smallest, keys in (
        (train, 1, ("shot", "train_h", "val_size", "batch_size", "epochs", "val_episodes", "batch_size_val", "print_freq")),
        (train, 0, ("workers", "base_lr", "power", "momentum", "weight_decay", "save_minutes", "iterations", "warmup", "min_lr")),
        (test, 0, ("test_num", "draw_workers")),
        (config.Data, 0, ("support_pixels",)),
        (config.Runtime, 1, ("processes",)),
        (config.Runtime, 0, ("threads",)),
    ):
        for key in keys:
            need(f"{type(section).__name__}.{key}", getattr(section, key), getattr(section, key) >= smallest,
                 "at least 1" if smallest else "0 or more")
    need("Runtime.cache_gb", config.Runtime.cache_gb, (config.Runtime.cache_gb or 0) >= 0, "0 or more, or empty")
    if not 0 < train.scale_min <= train.scale_max:
        raise UserError(f"Train.scale_min = {train.scale_min}, scale_max = {train.scale_max}: need 0 < min <= max")
    for key in ("train_h", "val_size"):
        need(f"Train.{key}", getattr(train, key), getattr(train, key) >= 33, "at least 33, four cells of the feature grid")
    need("Train.warmup_ratio", train.warmup_ratio, 0 <= train.warmup_ratio <= 1, "in 0..1")
    need("Train.validate_every", train.validate_every, train.validate_every >= 0, "0 or more")
    need("Train.keep", train.keep, min(train.keep, default=1) >= 1, "steps, from 1 on")
    need("Test_Finetune.seeds", test.seeds, len(test.seeds) > 0, "at least one seed")
    starts = {"ours": get_args(Start), "workers": ("image",), "numpy": ("pair", "class", "cycle"), "fold": ("class",)}
    starts = starts[test.generator]
    need("Train.draw", train.draw, train.draw in starts, f"{' or '.join(starts)} with Test_Finetune.generator={test.generator}")
    need("Test_Finetune.draw_workers", test.draw_workers, (test.draw_workers > 0) == (test.generator == "workers"),
         "the published number of workers with Test_Finetune.generator=workers, else 0")
    if len(set(test.seeds)) < len(test.seeds):
        raise UserError(f"Test_Finetune.seeds = {test.seeds}: a seed is there twice")
    config.Method.check()
