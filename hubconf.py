"""Entry points of torch.hub: `torch.hub.load(FOLDER, "few_shot", source="local")` from any folder.

    segmenter = torch.hub.load(FOLDER, "few_shot", source="local")           # model.predict.predictor.Predictor
    segmenter.set_support("a.jpg", "a.png")
    mask = segmenter.predict("b.jpg").mask

Paths of weights are looked up here and in the working folder. The packages of requirements.txt must be installed.

The repository's packages `model` and `util` are imported under these names. Where the process has others of these names already,
loading is an error; where a later `import util` of the caller would have found another one, it is a warning.
"""

import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

dependencies = ["torch", "timm", "open_clip", "cv2", "safetensors", "yaml"]
_ROOT = Path(__file__).resolve().parent


def _check_names() -> None:
    """Raise ImportError where `model` or `util` of another place is loaded; warn where one could have been found."""
    others = [folder for folder in sys.path if Path(folder).resolve() != _ROOT]
    for name in ("model", "util"):
        if name in sys.modules:
            loaded = sys.modules[name].__spec__
            places = [*(loaded and loaded.submodule_search_locations or ()), loaded and loaded.origin or "?"]
            if str(_ROOT / name) not in [str(Path(place).resolve()) for place in places]:
                raise ImportError(f"this process has loaded another {name!r} ({places[0]}) than {_ROOT / name}, and two of one "
                                  "name do not fit into it; load this repository in a process of its own, or rename yours")
        elif found := PathFinder.find_spec(name, others):
            warnings.warn(f"from now on `import {name}` is {_ROOT / name}, not {found.origin or 'the folder'} of your path; "
                          "rename yours, or use this repository in a process of its own", stacklevel=2)  # fmt: skip


_check_names()


def predictor(weights: str = "photos", **options: Any) -> Any:
    """Return the predictor of a checkpoint, `few_shot` or `dense` as it says itself; arguments as those."""
    from model.predict.dense_predictor import load_predictor

    return load_predictor(weights, **options)


def few_shot(weights: str = "photos", **options: Any) -> Any:
    """Return a predictor that finds what examples show; arguments as `Predictor.from_checkpoint`."""
    from model.predict.predictor import Predictor

    return Predictor.from_checkpoint(weights, **options)


def dense(weights: str, **options: Any) -> Any:
    """Return a predictor that labels every pixel with its classes; arguments as `DensePredictor.from_checkpoint`."""
    from model.predict.dense_predictor import DensePredictor

    return DensePredictor.from_checkpoint(weights, **options)


def text(clip: str = "ViT-B-16-quickgelu/openai", **options: Any) -> Any:
    """Return a predictor that finds what a text names, with a CLIP and no training; arguments as `TextPredictor.from_clip`."""
    from model.predict.text_predictor import TextPredictor

    return TextPredictor.from_clip(clip, **options)


def encoder(name: str = "resnet50", **options: Any) -> Any:
    """Return an image encoder without weights: `timm:NAME` or one of ours; arguments as `model.backbone.build_encoder`."""
    from model.backbone import ImageEncoder, build_encoder

    return build_encoder(name, **{"kind": ImageEncoder, **options}).eval()


def build(arch: str, config: str, *overrides: str) -> Any:
    """Return a system without weights, `model.build.build_system`.

    Args:
        arch: its name, HDMNet; config: a file, here or in the working folder, as are those that it names; overrides:
            Section.key=value.
    """
    from model.build import build_system, configure, system_class
    from util.data.folds import read_class_names

    given = configure(config if Path(config).is_file() else _ROOT / config, arch, list(overrides))
    for section, key in ((given.Data, "class_names"), (given.CLIP, "clip_path")):
        name = getattr(section, key)
        if name and not Path(name).exists() and (_ROOT / name).exists():
            setattr(section, key, str(_ROOT / name))
    return build_system(arch, given, system_class(arch).task.folds(given), read_class_names(given.Data.class_names))
