"""Find a file of weights by path or name, and what it is."""

from pathlib import Path
from typing import NamedTuple

from model.backbone.pspnet import PSPNet
from model.build import recorded, system_class
from util import ROOT
from util.config import Config
from util.data.folds import ClassNames, Fold, read_class_names
from util.errors import UserError
from util.run.checkpoint import EXPORT, read_meta

NAMED = {"photos": "demo/photos/hdmnet_lite0.safetensors", "demo": "exp/demo/PI_CLIP/split0/resnet50/snapshot/best.safetensors"}
NO_NAMES = ClassNames((), ())


def find_weights(given: str | Path) -> Path:
    """Find a checkpoint by its path, here or below the repository, or by its name.

    Raises:
        UserError: there is none.
    """
    name = NAMED.get(str(given), given)
    found = next((path for path in (Path(name), ROOT / name) if path.is_file()), None)
    if found is None and given == "demo":
        raise UserError("the demo's model is not trained yet: `sh train.sh split0 demo 0` (minutes on a CPU)")
    if found is None:
        raise UserError(f"no such checkpoint: {given}. Give {' or '.join(NAMED)}, what `sh train.sh` has trained, an exported "
                        "file, or a published .pth (docs/predict.md)")
    return found


class Checkpoint(NamedTuple):
    """A file of weights, and what it is."""

    path: Path
    meta: dict
    arch: str
    config: Config


def checkpoint(path: str | Path, config: Config | None = None, arch: str | None = None) -> Checkpoint:
    """Find a checkpoint and what it is. Arguments and errors as `Predictor.from_checkpoint`; a base learner is an error, too."""
    path = find_weights(path)
    meta = read_meta(path) if path.suffix == ".safetensors" else {}
    arch = arch or meta.get("system")
    if arch is None or (not meta and config is None):
        raise UserError(f"{path} does not say what it is: a published checkpoint needs the config and the system that it is "
                        "of (--config config/pascal/pascal_split0_resnet50.yaml --arch PI_CLIP)")
    if issubclass(system_class(arch), PSPNet):
        raise UserError(f"{path} is a base learner (ARCH={arch}); give the checkpoint of a system")
    return Checkpoint(path, meta, arch, config or recorded(path))


def trained_on(found: Checkpoint) -> tuple[Fold, ClassNames]:
    """Return fold and class names of the training, from an exported file or from the config's files (names may be missing)."""
    config, meta = found.config, found.meta
    if EXPORT in meta:
        names, texts, novel, base = map(tuple, meta["classes"])
        return Fold(config.Train.data_set, config.Train.split, novel, base), ClassNames(names, texts)
    file = Path(config.Data.class_names)
    return system_class(found.arch).task.folds(config), read_class_names(file) if file.is_file() else NO_NAMES
