"""Dense CRF after the network (Kraehenbuehl and Koltun 2011): an extra, `pip install pydensecrf2`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from util.errors import UserError
from util.pool import stream


@dataclass(frozen=True)
class Crf:
    """Kernels: s... are standard deviations in pixels and grey levels, compat... their weights."""

    gauss_sxy: float
    gauss_compat: float
    bilateral_sxy: float
    bilateral_srgb: float
    bilateral_compat: float
    iterations: int = 10

    def __call__(self, image: np.ndarray, probability: np.ndarray) -> np.ndarray:
        """Refine class probabilities C H W with an image H W 3 uint8 RGB: C H W float32.

        Classes that are likely nowhere are left out, since time grows with the classes, and get 0.

        Raises:
            UserError: pydensecrf2 is not installed.
        """
        densecrf = load()
        C, height, width = probability.shape
        kept = np.flatnonzero(probability.reshape(C, -1).max(1) > 1e-4)
        if len(kept) < 2:
            return probability.astype(np.float32)
        crf = densecrf.DenseCRF2D(width, height, len(kept))
        unary = -np.log(np.clip(probability[kept].reshape(len(kept), -1), 1e-5, None)).astype(np.float32)
        crf.setUnaryEnergy(np.ascontiguousarray(unary))
        crf.addPairwiseGaussian(sxy=self.gauss_sxy, compat=self.gauss_compat)
        crf.addPairwiseBilateral(sxy=self.bilateral_sxy, srgb=self.bilateral_srgb, rgbim=np.ascontiguousarray(image),
                                 compat=self.bilateral_compat)  # fmt: skip
        out = np.zeros_like(probability, dtype=np.float32)
        out[kept] = np.asarray(crf.inference(self.iterations), dtype=np.float32).reshape(len(kept), height, width)
        return out


WECLIP = Crf(3, 3, 64, 5, 4)  # of predictions
CLIP_ES = Crf(1, 3, 67, 3, 4)  # of pseudo labels


def load():
    """Import `pydensecrf.densecrf`, or raise a UserError with the line that installs it."""
    try:
        import pydensecrf.densecrf
    except ImportError as error:
        raise UserError("the CRF needs pydensecrf2, which is not installed: `pip install pydensecrf2`, or leave the CRF "
                        "out") from error
    return pydensecrf.densecrf


def many(crf: Crf, jobs: Iterable[tuple[np.ndarray, np.ndarray]], workers: int) -> Iterator[np.ndarray]:
    """Yield `crf` of every (image, probability), in order, from several processes, with few jobs in memory at a time."""
    load()
    return stream(crf, jobs, workers)


def confident(probability: np.ndarray, least: float = 0.95) -> np.ndarray:
    """Return the label map, H W uint8, of C H W probabilities, 255 where the best is below `least`: CLIP-ES's pseudo labels."""
    return np.where(probability.max(0) < least, 255, probability.argmax(0)).astype(np.uint8)
