"""One comparison of a golden file."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from util.data.transforms import Placed
from util.score.metrics import vote


@dataclass
class Row:
    """One comparison: the error is absolute, or relative to the reference where `relative`."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # NaN fails


def compare(name: str, ours: Tensor | np.ndarray | float, reference: np.ndarray, tolerance: float, relative: bool = False) -> Row:
    a = np.asarray(ours.detach() if isinstance(ours, Tensor) else ours, dtype=np.float64)
    b = np.asarray(reference, dtype=np.float64)
    if a.shape != b.shape:
        return Row(f"{name} {a.shape} instead of {b.shape}", float("inf"), tolerance)
    error = np.abs(a - b)
    if relative:
        error = error / np.maximum(np.abs(b), 1e-12)
    return Row(name, float(error.max(initial=0)), tolerance)


def voted(votes: Tensor, hw: tuple[int, int]) -> Tensor:
    """K 2 h w logits of the shots of one squashed image -> their vote at file size, H W."""
    return vote(Placed(tuple(hw), tuple(hw)).restore(votes).argmax(1))
