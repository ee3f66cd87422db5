"""Augmentations of the zero-shot systems: mmsegmentation's recipe, written on OpenCV ("CLIP-RC Sec. 10").

Resize with the aspect ratio kept, crop where no class takes up nearly everything, flip, change the colours; all on uint8 pixels.
Every random number is drawn whether it is used or not, so one choice never shifts another.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from util.data.transforms import IGNORE, Augmented, Placed
from util.errors import UserError

LONG = 4  # the longer side is at most this many times the wanted shorter one: 2048 at 512
TRIES = 10  # crops that are looked at, before one is taken as it comes
SHARE = 0.75  # of the labelled pixels of a crop: its largest class stays below
BRIGHTNESS, FACTOR, HUE = 32.0, (0.5, 1.5), 18  # OpenCV's hue has 180 steps


class CropTransform:
    """A window of `size` x `size` of the resized, perhaps mirrored image, in other colours. Same call as TrainTransform.

    A smaller image lies at the top left; right of it and below are 0 and label 255. `clean` has the original colours.

    Args:
        size: side of the window; the shorter side of the image becomes `size` times a factor of `scale`.
    """

    squash = False

    def __init__(self, size: int, scale: tuple[float, float] = (0.5, 2.0)) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise UserError(f"Train.scale_*: need 0 < scale_min <= scale_max, got {scale[0]}..{scale[1]}")
        self.size, self.scale = size, scale

    def __call__(self, rng: np.random.Generator, image: np.ndarray, labels: Sequence[np.ndarray]) -> Augmented:
        ratio, corners, flip = rng.uniform(*self.scale), rng.random((TRIES + 1, 2)), rng.random() < 0.5
        colours = Colours(rng)
        image = image.astype(np.uint8)
        width, height = resized(image.shape[1::-1], ratio, self.size)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        labels = [cv2.resize(x, (width, height), interpolation=cv2.INTER_NEAREST) for x in labels]
        top, left = window(labels[0], self.size, corners)
        image, *labels = (x[top : top + self.size, left : left + self.size] for x in (image, *labels))
        if flip:
            image, *labels = (np.ascontiguousarray(x[:, ::-1]) for x in (image, *labels))
        changed, clean = (filled(x.astype(np.float32), self.size, 0) for x in (colours(image), image))
        return changed, clean, [filled(x, self.size, IGNORE) for x in labels]

    def placed(self, hw: tuple[int, int]) -> Placed:
        """As if the image were only resized: augmentation is not undone."""
        return Placed(tuple(hw), tuple(hw), corners=False)


def resized(sides: Sequence[int], ratio: float, short: int) -> tuple[int, ...]:
    """The sides of an image whose shorter one becomes `ratio * short` and whose longer one at most LONG times as much."""
    target = int(LONG * short * ratio), int(short * ratio)
    scale = min(target[0] / max(sides), target[1] / min(sides))
    return tuple(max(int(side * scale + 0.5), 1) for side in sides)


def window(label: np.ndarray, size: int, corners: np.ndarray) -> tuple[int, int]:
    """Top and left of the first window with two classes or more, none of them on SHARE of the labelled pixels; else the last.

    Args:
        label: H W uint8, 255 is no class.
        corners: N 2 in 0..1, where the windows lie between the top left and the bottom right corner.
    """
    room = np.maximum(np.array(label.shape) - size, 0) + 1
    places = [(int(top), int(left)) for top, left in corners * room]
    for top, left in places[:-1]:
        counts = np.bincount(label[top : top + size, left : left + size].ravel(), minlength=IGNORE + 1)[:IGNORE]
        if (counts > 0).sum() > 1 and counts.max() < SHARE * counts.sum():
            return top, left
    return places[-1]


def filled(x: np.ndarray, size: int, value: int) -> np.ndarray:
    """x at the top left of a square filled with `value`."""
    out = np.full((size, size, *x.shape[2:]), value, x.dtype)
    out[: x.shape[0], : x.shape[1]] = x
    return out


class Colours:
    """Photometric distortion of H W 3 uint8 RGB: brightness, contrast, saturation and hue, each with probability 0.5.

    Contrast comes before saturation and hue or behind them. After every step values are cut to 0..255 and rounded down.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        apply = rng.random(4) < 0.5
        self.contrast_first = bool(rng.random() < 0.5)
        offset, factors, turn = rng.uniform(-BRIGHTNESS, BRIGHTNESS), rng.uniform(*FACTOR, 2), int(rng.integers(-HUE, HUE))
        self.brightness, self.contrast, self.saturation, self.hue = (
            value if use else None for use, value in zip(apply, (offset, *factors, turn), strict=True)
        )

    def __call__(self, image: np.ndarray) -> np.ndarray:
        if self.brightness is not None:
            image = linear(image, 1, self.brightness)
        if self.contrast is not None and self.contrast_first:
            image = linear(image, self.contrast)
        if self.saturation is not None:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hsv[..., 1] = linear(hsv[..., 1], self.saturation)
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if self.hue is not None:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hsv[..., 0] = (hsv[..., 0].astype(int) + self.hue) % 180
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if self.contrast is not None and not self.contrast_first:
            image = linear(image, self.contrast)
        return image


def linear(x: np.ndarray, factor: float, offset: float = 0) -> np.ndarray:
    """factor * x + offset as uint8."""
    return np.clip(x.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)
