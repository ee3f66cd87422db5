"""Masks from a text alone: CLIP's refined text prior (VTP, PI-CLIP Sec. 3.2), without a trained network.

    predictor = TextPredictor.from_clip("ViT-B-16-quickgelu/openai")
    predictor.set_support(text="golden retriever")
    found = predictor.predict("b.jpg")  # found.mask, found.score, found.maps

The score is the prior, rescaled to 0..1 in each image: something is found in every image, and masks are rough.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model.build import text_bank
from model.clip import Clip, load_clip
from model.few_shot.prior import TextPrior
from model.ops import resize
from model.system import Frozen
from util.config import HUB_NAME
from util.data.transforms import clip_input
from util.errors import UserError
from util.photos.reading import MAX_SIDE, Source, read_photo, shrink
from util.run.distributed import Context, no_bf16


@dataclass(frozen=True)
class Segmentation:
    """Result for one upright image of H x W pixels."""

    mask: np.ndarray  # H W bool
    score: np.ndarray  # H W float32 0..1; the mask is where it is above one half
    maps: dict[str, np.ndarray]  # name -> h w float32, the priors
    seconds: float

    def detections(self, class_id: int = 0) -> Any:
        """Return the result as `supervision.Detections`: one detection with its mask, box and mean score; none without an object.

        Raises:
            UserError: the optional package supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise UserError("detections need the optional package supervision: pip install supervision") from error
        if not self.mask.any():
            return supervision.Detections.empty()
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        return supervision.Detections(xyxy=np.array([box], np.float32), mask=self.mask[None], class_id=np.array([class_id]),
                                      confidence=np.array([self.score[self.mask].mean()]))  # fmt: skip


class TextPredictor:
    """A frozen CLIP that finds the object of a text: a `Predictor` without supports. Use `from_clip`, `set_support`, `predict`.

    Attributes:
        notes: remarks for the user about the results.
    """

    def __init__(self, clip: Frozen, device: torch.device, precision: str):
        self.clip, self.device, self.precision = clip.to(device), device, precision
        self.notes: tuple[str, ...] = ()
        self._prior: TextPrior | None = None

    @classmethod
    def from_clip(cls, source: str = HUB_NAME, device: str | None = None, precision: str | None = None) -> "TextPredictor":
        """Load a CLIP.

        Args:
            source: a file, a folder or a hub name (`model.clip.load_clip`); OpenAI's ViT-B/16 is downloaded by default.
            device, precision: see `Predictor.from_checkpoint`.
        Raises:
            UserError: no such CLIP, device or precision.
        """
        chosen = choose_device(device)
        return cls(Frozen(load_clip(source)), chosen, choose_precision(precision, chosen))

    def set_support(self, images: Source | Sequence[Source] | None = None, masks: object = None, text: str | None = None,
                    boxes: object = None) -> None:  # fmt: skip
        """Set the object to look for, until the next call; as `Predictor.set_support`, without supports.

        Raises:
            UserError: supports, an empty text, or one that this CLIP does not know.
        """
        if as_list(images):
            raise UserError("a CLIP without a trained network reads a text and no examples; those need a trained system")
        if not (text := (text or "").strip()):
            raise UserError("nothing to look for: give a text, for instance 'dog'")
        self._prior = TextPrior(self.clip, text_bank(self.clip, [text]), "target", ())
        clip: Clip = self.clip.module
        self.notes = ("text alone: the refined text prior (VTP) above one half, without a trained network; masks are rough, and "
                      "something is found in every image",)  # fmt: skip
        if clip.random:
            self.notes += ("CLIP has random weights (CLIP.clip_path=random): the masks mean nothing",)

    def predict(self, image: Source) -> Segmentation:
        """Find the object in an image: a path, Pillow image, uint8 array H W 3 or uint8 tensor 3 H W.

        Raises:
            UserError: no text yet, or an image that cannot be used.
        """
        return self.predict_batch([image])[0]

    @torch.no_grad()
    def predict_batch(self, images: Sequence[Source]) -> list[Segmentation]:
        """Run `predict` on several images of any sizes, one after the other."""
        if self._prior is None:
            raise UserError("nothing to look for yet: call set_support(text=...) first")
        return [self._predict(read_photo(source, f"query {i}").image) for i, source in enumerate(images, start=1)]

    def check(self) -> list[float]:
        """See `Predictor.check`: there are no supports."""
        return []

    def _predict(self, photo: np.ndarray) -> Segmentation:
        started = time.perf_counter()
        patch = self.clip.module.visual.patch
        small = shrink(photo, longest_side(patch))
        image = clip_input(small, small.shape[:2], patch)[None].to(self.device)
        target = torch.zeros(1, dtype=torch.int64, device=self.device)
        competing = torch.ones(1, 2, dtype=torch.bool, device=self.device)  # a photo of it, a photo without it
        with Context(self.device, precision=self.precision).autocast():
            prior = self._prior.refined(image, competing, target).float()
        score = resize(prior[None], photo.shape[:2], corners=False)[0, 0].cpu().numpy()
        return Segmentation(score > 0.5, score, {"vtp": prior[0].cpu().numpy()}, time.perf_counter() - started)


def longest_side(patch: int) -> int:
    """Return the longer side to which photos are reduced for a CLIP of this patch side: as many patches as PASCAL's and COCO's
    largest images have with ViT-B/16."""
    return MAX_SIDE * patch // 16


def choose_device(name: str | None) -> torch.device:
    """Return the named device, or the GPU where there is one.

    Raises:
        UserError: there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r}: {str(error).splitlines()[0]}; there is cpu"
                        + (", and cuda" if torch.cuda.is_available() else "")) from error
    return device


def choose_precision(name: str | None, device: torch.device) -> str:
    """Return the named precision, or bf16 on a GPU that has it, else fp32.

    Raises:
        UserError: no such precision, or bf16 where it is of no use (`no_bf16`).
    """
    if name not in (None, "fp32", "bf16"):
        raise UserError(f"precision {name!r}: choose fp32 or bf16")
    if name == "bf16" and (reason := no_bf16(device)):
        raise UserError(f"precision bf16: {reason}; choose fp32")
    return name or ("bf16" if device.type == "cuda" and not no_bf16(device) else "fp32")


def as_list(value: Source | Sequence | None) -> list:
    """Return None, one thing or several as a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
