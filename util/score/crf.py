"""Dense CRF after the network (Kraehenbuehl and Koltun 2011): an extra, `pip install pydensecrf2`."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from util.errors import UserError


@dataclass(frozen=True)
class Crf:
    """Kernels: s... are standard deviations in pixels and grey levels, compat... their weights."""

    gauss_sxy: float
    gauss_compat: float
    bilateral_sxy: float
    bilateral_srgb: float
    bilateral_compat: float
    iterations: int = 10
    logits: bool = False  # the scores of the system are logits, else probabilities
    least: float = 0.0  # probability below which a pixel of a label map that is written is 255: unknown

    def __call__(self, image: np.ndarray, probability: np.ndarray) -> np.ndarray:
        """Refine class probabilities C H W with an image H W 3 uint8 RGB: C H W float32.

        Raises:
            UserError: pydensecrf2 is not installed.
        """
        densecrf = load()
        C, height, width = probability.shape
        if C < 2:
            return probability.astype(np.float32)
        crf = densecrf.DenseCRF2D(width, height, C)
        unary = -np.log(np.clip(probability.reshape(C, -1), 1e-5, None)).astype(np.float32)
        crf.setUnaryEnergy(np.ascontiguousarray(unary))
        crf.addPairwiseGaussian(sxy=self.gauss_sxy, compat=self.gauss_compat)
        crf.addPairwiseBilateral(sxy=self.bilateral_sxy, srgb=self.bilateral_srgb, rgbim=np.ascontiguousarray(image),
                                 compat=self.bilateral_compat)  # fmt: skip
        return np.asarray(crf.inference(self.iterations), dtype=np.float32).reshape(C, height, width)

    def job(self, image: Tensor, scores: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Arguments of `labels`. Classes that are nowhere likely are left out: time and memory grow with the classes.

        Args:
            image: 3 H W RGB 0..255; scores: C H W on any device, see `logits`.
        """
        probability = scores.softmax(0) if self.logits else scores
        kept = torch.nonzero(probability.amax((1, 2)) > 1e-4)[:, 0]
        picture = image.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        return picture.cpu().numpy(), probability[kept].float().cpu().numpy(), kept.cpu().numpy()

    def labels(self, image: np.ndarray, probability: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(channel of each pixel, the same with 255 where it is less likely than `least`), both H W uint8."""
        refined = self(image, probability)
        label = kept[refined.argmax(0)].astype(np.uint8)
        return label, np.where(refined.max(0) < self.least, 255, label).astype(np.uint8)


WECLIP = Crf(3, 3, 64, 5, 4, logits=True)  # of predictions
CLIP_ES = Crf(1, 3, 67, 3, 4, least=0.95)  # of pseudo labels


def load():
    """Import `pydensecrf.densecrf`, or raise a UserError with the line that installs it."""
    try:
        import pydensecrf.densecrf
    except ImportError as error:
        raise UserError("the CRF needs pydensecrf2, which is not installed: `pip install pydensecrf2`, or leave the CRF "
                        "out") from error
    return pydensecrf.densecrf
