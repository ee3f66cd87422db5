"""Text banks of zero-shot systems: made by CLIP's own text tower, or read from a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from model.system import Frozen
from util.errors import UserError
from util.files import load_array

ONE = ("a photo of a {}",)  # VOC's, without a full stop
MANY = (
    "a photo of a {}.", "a photo of a small {}.", "a photo of a medium {}.", "a photo of a large {}.",
    "This is a photo of a {}.", "This is a photo of a small {}.", "This is a photo of a medium {}.",
    "This is a photo of a large {}.", "a {} in the scene.", "a photo of a {} in the scene.", "There is a {} in the scene.",
    "There is the {} in the scene.", "This is a {} in the scene.", "This is the {} in the scene.", "This is one {} in the scene.",
)  # fmt: skip  # COCO-Stuff's


def text_bank(clip: Frozen, texts: Sequence[str], templates: Literal["one", "many"], cache: Path | None = None) -> Tensor:
    """C D, rounded to fp16 and back as the published banks are; rows are not normalised after that."""
    return clip.module.text.bank(texts, ONE if templates == "one" else MANY, cache).half().float()


def read_bank(file: Path, names: Sequence[str], own: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """A bank from a file, C D fp32, and a warning where its rows look like other classes'.

    Args:
        file: .npy, .pth or .safetensors with one array; a row for each class, in their order.
        own: C D, the bank that our tower makes of the same classes. The published banks differ from it by 5e-4.
    Raises:
        UserError: no such array, or one of another shape; numbers that are no unit vectors.
    """
    bank = load_array(file)
    if bank.shape != own.shape:
        raise UserError(f"Method.bank = {file}: shape {tuple(bank.shape)}; {len(names)} classes and this CLIP need "
                        f"{tuple(own.shape)}")
    bank = bank.float()
    if not ((bank.norm(dim=1) - 1).abs() < 0.01).all():  # false for nan, too
        raise UserError(f"Method.bank = {file}: its rows are not of length 1, so it is no bank of text embeddings")
    bank = bank.to(own.device)
    nearest = (bank @ own.T).argmax(1)
    wrong = (nearest != torch.arange(len(names), device=own.device)).nonzero().flatten().tolist()
    if not wrong:
        return bank, ()
    first, other = names[wrong[0]], names[nearest[wrong[0]]]
    return bank, (f"Method.bank = {file}: {len(wrong)} of {len(names)} rows are closer to another class's text, {first!r} to "
                  f"{other!r}. Has it another order of classes, or is it of another CLIP?",)
