"""Entry points of torch.hub, from a clone in any place: the repository's files are enough, nothing is installed.

    predictor = torch.hub.load("/path/to/the/clone", "predictor", source="local")             # the network for photographs
    predictor = torch.hub.load(REPO, "predictor", source="local", weights="/runs/best.safetensors", device="cpu")
    system = torch.hub.load(REPO, "build", "HDMNet", "config/demo/demo_split0_resnet50.yaml", source="local")

This imports the repository's packages `model` and `util`, under these names. Where the process has others of these names already,
loading is an error; where a later `import util` of the caller would have found another one, it is a warning.
"""

import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

dependencies = ["torch", "torchvision", "timm", "open_clip", "safetensors", "numpy", "cv2", "PIL", "yaml"]
_ROOT = Path(__file__).resolve().parent
_NAMES = ("model", "util")


def _check_names() -> None:
    """Raise ImportError where `model` or `util` of another place is loaded; warn where one could have been found."""
    others = [folder for folder in sys.path if Path(folder).resolve() != _ROOT]
    for name in _NAMES:
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
sys.path.insert(0, str(_ROOT))
try:
    from model.build import build_system as _build_system
    from model.build import configure as _configure
    from model.build import system_class as _system_class
    from model.predict.dense_predictor import DensePredictor as _DensePredictor
    from model.predict.dense_predictor import load_predictor as _load_predictor
    from model.predict.predictor import Predictor as _Predictor
    from model.system import System as _System
    from util.data.folds import read_class_names as _read_class_names
finally:
    sys.path.remove(str(_ROOT))


def predictor(weights: str | Path = "photos", device: str | None = None, precision: str | None = None
              ) -> _Predictor | _DensePredictor:  # fmt: skip
    """Open a checkpoint for pictures of one's own: see model/predict/predictor.py, or dense_predictor.py for a dense system.

    Args:
        weights: a file, here or below the clone; or photos, the network for photographs that comes along.
        device, precision: see `Predictor.from_checkpoint`.
    Raises:
        UserError: no such file, device or precision.
    """
    return _load_predictor(weights, device, precision)


def build(arch: str, config: str | Path, *overrides: str) -> _System:
    """Build a system without weights.

    Args:
        arch: its name, HDMNet.
        config: file, here or below the clone; its paths may be below the clone, too.
        overrides: Section.key=value.
    Raises:
        UserError: no such system, file or key.
    """
    here = Path(config)
    given = _configure(here if here.is_file() else _ROOT / config, arch, list(overrides))
    for section, key in ((given.Data, "class_names"), (given.CLIP, "clip_path")):
        value = getattr(section, key)
        if value and not Path(value).exists() and (_ROOT / value).exists():
            setattr(section, key, str(_ROOT / value))
    return _build_system(arch, given, _system_class(arch).task.folds(given), _read_class_names(given.Data.class_names))
