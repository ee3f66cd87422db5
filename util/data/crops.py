"""Crops whose border shows: the augmentation of WeCLIP ("WeCLIP Sec. 15")."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from util.data.transforms import IGNORE, Augmented, Placed


class PaddedCrop:
    """Scale, flip, put on a black canvas of at least `size` x `size`, cut a square of that size; all at random.

    Called with a generator, an H W 3 float32 image and its labels; returns (image, image, labels). A small image lies anywhere
    on the canvas, the labels around it are 255. Where the objects are plays no role.
    """

    squash = False

    def __init__(self, size: int, scale_min: float, scale_max: float) -> None:
        self.size, self.scale = size, (scale_min, scale_max)

    def __call__(self, rng: np.random.Generator, image: np.ndarray, labels: Sequence[np.ndarray]) -> Augmented:
        scale, flip = rng.uniform(*self.scale), rng.random() < 0.5
        place, cut = rng.random(2), rng.random(2)  # 0..1 down and right; always drawn: one choice never shifts another
        height, width = (max(int(side * scale), 1) for side in image.shape[:2])
        resized = Image.fromarray(image.astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
        image = np.array(resized, np.float32)
        labels = [cv2.resize(x, (width, height), interpolation=cv2.INTER_NEAREST) for x in labels]
        if flip:
            image, labels = image[:, ::-1], [x[:, ::-1] for x in labels]
        image, *labels = (self._cut(x, fill, place, cut) for x, fill in [(image, 0), *((x, IGNORE) for x in labels)])
        return image, image, labels

    def placed(self, hw: tuple[int, int]) -> Placed:
        """As if the image were only resized: augmentation is not undone."""
        return Placed(tuple(hw), tuple(hw), corners=False)

    def _cut(self, x: np.ndarray, fill: int, place: np.ndarray, cut: np.ndarray) -> np.ndarray:
        hw = np.array(x.shape[:2])
        canvas = np.maximum(hw, self.size)
        out = np.full((*canvas, *x.shape[2:]), fill, x.dtype)
        top, left = (place * (canvas - hw + 1)).astype(int)
        out[top : top + hw[0], left : left + hw[1]] = x
        top, left = (cut * (canvas - self.size + 1)).astype(int)
        return out[top : top + self.size, left : left + self.size]
