"""Reading images and labels, and the augmentations of the published systems ("PI-CLIP Sec. 1, Transforms").

Images are H W 3 float32 RGB 0..255, never normalised: every encoder does that itself. Labels are H W uint8 with 255 =
ignore and are only ever moved with nearest neighbour, so recolouring a label commutes with every transform here.
"""

import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from util.errors import BrokenFile, UserError

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IGNORE = 255
ROTATE = (-10.0, 10.0)  # degrees; every published recipe has them
FORMATS = "JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000", "HEIF"  # pictures; no programs
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".avif")  # of pictures in a folder

Augmented = tuple[np.ndarray, np.ndarray, list[np.ndarray]]


def worker_init(worker_id: int) -> None:
    """Prepare a DataLoader's worker (`worker_init_fn`).

    It runs OpenCV in one thread, since the workers are the parallelism. SIGTERM ends it: the parent's handler is not inherited.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@cache
def _formats() -> list[str]:
    """Return those of `FORMATS` that this Pillow reads: not all have AVIF, HEIF comes from an optional package."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return [name for name in FORMATS if name in Image.OPEN]


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """Open a picture with Pillow; its pixels are read later. All pictures are opened here.

    Only `FORMATS` are opened, HEIC (HEIF) where pillow-heif is installed.
    Pillow looks at the content, not the name, and would start Ghostscript for an EPS (it runs code).
    Raises what Pillow raises; UnidentifiedImageError for every other kind of file.
    """
    return Image.open(source, formats=_formats())


def read_image(path: str | Path) -> np.ndarray:
    """Read an image as H W 3 float32 RGB 0..255, as stored: EXIF rotation is not applied, since labels do not have it.

    Grey becomes three equal channels, transparency is dropped, 16 bits are cut to 8, an animation gives its first frame.
    Raises BrokenFile: missing, damaged, or a kind that OpenCV does not know. UserError: other values than 8 or whole 16 bits.
    """
    image_hw(path)  # the header first: a decompression bomb is refused before it takes memory
    kinds = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:  # from memory, for cv2.imread paints the missing rows of a truncated JPEG grey, without a word
        image = cv2.imdecode(np.fromfile(path, np.uint8), kinds)
    except cv2.error:
        image = None
    if image is None:
        raise BrokenFile(f"{path}: not a readable image (truncated, or of a kind that OpenCV does not know); fetch it again, or "
                         "save it as JPEG or as PNG with 8 bits")
    if image.dtype == np.uint16:
        image = upper_byte(image, path)
    if image.dtype != np.uint8:
        raise UserError(f"{path}: values are {image.dtype}, which have no fixed white; save it with 8 bits")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.float32)


def upper_byte(values: np.ndarray, name: str | Path) -> np.ndarray:
    """Return the upper 8 of 16 bits, uint8. Raises UserError: see `check_depth`."""
    check_depth(int(values.max()), name)
    return (values >> 8).astype(np.uint8)


def check_depth(peak: int, name: str | Path) -> None:
    """Raise UserError where the largest 16-bit value has 14 bits or fewer, as from a camera: cut to 8 bits the image is dark."""
    if 0 < peak < 2**14:
        raise UserError(f"{name}: a file of 16 bits whose values have {peak.bit_length()}: it would be nearly black. Spread them "
                        "over 0..65,535, or save it with 8 bits")


def image_hw(path: str | Path) -> tuple[int, int]:
    """Read height and width of an image from its header alone."""
    _require(path, "image")
    try:
        with open_image(path) as image:
            return image.height, image.width
    except Exception as error:  # PIL raises many kinds on damaged files, and its own on absurd sizes
        raise BrokenFile(f"{path}: not a readable image ({error}); fetch it again") from error


def read_label(path: str | Path) -> np.ndarray:
    """Read a label as H W uint8 class indices. A palette PNG (VOC's own) gives its indices, never its colours."""
    _require(path, "label")
    try:
        with open_image(path) as label:
            mode, array = label.mode, np.array(label) if label.mode in ("P", "L") else None
    except Exception as error:  # as in image_hw
        raise BrokenFile(f"{path}: not a readable label ({error}); fetch it again") from error
    if array is None:
        raise UserError(f"{path}: a label is an 8-bit PNG of class indices (mode P or L), not {mode}")
    return array


def read_pair(
    image_path: str | Path, label_path: str | Path, values: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read an image and its label; they must have the same height and width. values: 256 uint8, label value -> class."""
    image, label = read_image(image_path), read_label(label_path)
    label = label if values is None else values[label]
    check_sizes(image_path, image.shape[:2], label_path, label.shape)
    return image, label


def check_sizes(
    image_path: str | Path, image_hw: Sequence[int], label_path: str | Path, label_hw: Sequence[int]
) -> None:
    """Raise UserError, naming both files, where (height, width) differ."""
    if tuple(image_hw) != tuple(label_hw):
        raise UserError(
            f"image and label differ in size (height, width): {image_path} is {tuple(image_hw)}, "
            f"{label_path} is {tuple(label_hw)}"
        )


def _require(path: str | Path, what: str) -> None:
    if not os.path.isfile(path):  # unlike Path.is_file, no error for a name that cannot be one
        raise BrokenFile(f"{what} not found: {path} (Data.data_root and the path in the list file are joined)")


@dataclass(frozen=True)
class Placed:
    """What a resize did to an image, and the way back. The network's grid shows `canvas`, whose top left corner is the image.

    hw       height and width of the file
    canvas   height and width in file pixels of what the network saw: `hw` where the aspect ratio was ignored (squash) or kept
             without padding; the square on the longer side where the image was letterboxed. Smaller than `hw`: the rest of `hw`
             was not seen, its scores are 0
    corners  align_corners of the bilinear way back; the few-shot systems say True, mmsegmentation's False
    """

    hw: tuple[int, int]
    canvas: tuple[int, int]
    corners: bool = True

    def restore(self, scores: torch.Tensor) -> torch.Tensor:
        """Bring scores, C h w or B C h w of any float type, to file size: float32 C H W or B C H W, (H, W) = hw.

        The padding of a letterboxed image is cut off. (PFENet pads the truth with 255 instead: the same counts.)
        Raises UserError for NaN or infinite scores: their argmax is background, which would look like a poor result.
        """
        if not torch.isfinite(scores).all():
            raise UserError("the prediction is not finite: are the weights those of a training that diverged, or damaged? "
                            "Use another checkpoint (Test_Finetune.weight), or Runtime.precision=fp32")
        batch = scores.float() if scores.dim() == 4 else scores.float()[None]
        full = F.interpolate(batch, size=self.canvas, mode="bilinear", align_corners=self.corners)
        full = full[..., : self.hw[0], : self.hw[1]]
        unseen = [length - seen for length, seen in zip(self.hw, full.shape[-2:], strict=True)]
        if any(unseen):
            full = F.pad(full, (0, unseen[1], 0, unseen[0]))
        return full if scores.dim() == 4 else full[0]


class TrainTransform:
    """Scale, rotate, blur, flip, then squash to `size` x `size` (PI-CLIP, HDMNet) or crop it at random (BAM, PFENet).

    Called with a generator, an H W 3 float32 image and its labels, all of one size; returns (image, clean, labels),
    `size` x `size`. `clean` is the same without the blur, for CLIP. Borders: ImageNet mean, label 255.
    """

    def __init__(
        self,
        size: int,
        scale_min: float,
        scale_max: float,
        crop: bool = False,
        rotate: tuple[float, float] = ROTATE,
    ) -> None:
        if not 0 < scale_min <= scale_max:
            raise UserError(f"Train.scale_*: need 0 < scale_min <= scale_max, got {scale_min}..{scale_max}")
        self.size, self.crop, self.squash = size, crop, not crop
        self.scale, self.rotate = (scale_min, scale_max), rotate

    def __call__(self, rng: np.random.Generator, image: np.ndarray, labels: Sequence[np.ndarray]) -> Augmented:
        scale, angle = rng.uniform(*self.scale), rng.uniform(*self.rotate)
        turn, blur, flip = rng.random(3) < 0.5
        offset = rng.random(2)  # every number is drawn, used or not, so that no choice shifts another

        scale = max(scale, 1 / min(image.shape[:2]))  # a row of pixels stays one
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        labels = [cv2.resize(x, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST) for x in labels]
        if turn:
            height, width = image.shape[:2]
            matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1)
            image = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=IMAGENET_MEAN)
            labels = [
                cv2.warpAffine(x, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=IGNORE) for x in labels
            ]
        images = [cv2.GaussianBlur(image, (5, 5), 0), image] if blur else [image]
        if flip:
            images, labels = [cv2.flip(x, 1) for x in images], [cv2.flip(x, 1) for x in labels]
        if self.crop:
            images = [self._crop(x, offset, IMAGENET_MEAN) for x in images]
            labels = [self._crop(x, offset, IGNORE) for x in labels]
        else:
            images = [_squash_image(x, self.size) for x in images]
            labels = [_squash_label(x, self.size) for x in labels]
        return images[0], images[-1], labels

    def placed(self, hw: tuple[int, int]) -> Placed:
        """Return the way back as if the image were only resized: augmentation is not undone."""
        return Placed(tuple(hw), tuple(hw))

    def _crop(self, x: np.ndarray, offset: np.ndarray, fill: float | Sequence[float]) -> np.ndarray:
        """Pad to at least `size` (evenly on both sides), then cut the window at `offset` (0..1 down, 0..1 right)."""
        missing = [max(self.size - side, 0) for side in x.shape[:2]]
        if any(missing):
            (top, left), (bottom, right) = (m // 2 for m in missing), (m - m // 2 for m in missing)
            x = cv2.copyMakeBorder(x, top, bottom, left, right, cv2.BORDER_CONSTANT, value=fill)
        top, left = (int(o * (side - self.size + 1)) for o, side in zip(offset, x.shape[:2], strict=True))
        return x[top : top + self.size, left : left + self.size]


class ValTransform:
    """Squash to `size` x `size`, or letterbox: long side to `size`, both sides floored to multiples of 8, image padded
    with 0 and label with 255 at the right and bottom. Same call as TrainTransform; the generator is not used.

    antialias: squash with Pillow's antialiased bilinear (HSNet)."""

    def __init__(self, size: int, squash: bool, antialias: bool = False) -> None:
        self.size, self.squash, self.antialias = size, squash, antialias

    def __call__(
        self, rng: np.random.Generator | None, image: np.ndarray, labels: Sequence[np.ndarray]
    ) -> Augmented:
        if self.squash:
            image = _squash_image(image, self.size, self.antialias)
            labels = [_squash_label(x, self.size) for x in labels]
        else:
            image = self._letterbox(image, cv2.INTER_LINEAR, 0)
            labels = [self._letterbox(x, cv2.INTER_NEAREST, IGNORE) for x in labels]
        return image, image, labels

    def placed(self, hw: tuple[int, int]) -> Placed:
        """Return where an image of that size is in the network's square."""
        return Placed(tuple(hw), tuple(hw) if self.squash else (max(hw), max(hw)))

    def _letterbox(self, x: np.ndarray, interpolation: int, fill: int) -> np.ndarray:
        long = max(x.shape[:2])
        height, width = (max(side * self.size // long // 8 * 8, 8) for side in x.shape[:2])
        out = np.full((self.size, self.size, *x.shape[2:]), fill, x.dtype)
        out[:height, :width] = cv2.resize(x, (width, height), interpolation=interpolation)
        return out


def short_side(image: np.ndarray, side: int) -> np.ndarray:
    """Resize an image, H W 3, to a shorter side of `side` pixels; bilinear, without antialias (mmsegmentation's test)."""
    scale = side / min(image.shape[:2])
    height, width = (int(length * scale + 0.5) for length in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


class KeepTransform:
    """Keep the image as it is, or resize it to a shorter side with its aspect ratio (evaluation of dense systems). Same call as
    TrainTransform; sides differ from image to image, so batches hold one image.

    short: pixels of the shorter side; None: the file's own size.
    """

    squash = False

    def __init__(self, short: int | None = None) -> None:
        self.short = short

    def __call__(self, rng: np.random.Generator | None, image: np.ndarray, labels: Sequence[np.ndarray]) -> Augmented:
        if self.short is not None:
            image = short_side(image, self.short)
            labels = [cv2.resize(x, image.shape[1::-1], interpolation=cv2.INTER_NEAREST) for x in labels]
        return image, image, list(labels)

    def placed(self, hw: tuple[int, int]) -> Placed:
        return Placed(tuple(hw), tuple(hw), corners=False)


def working_size(height: int, width: int, short: int, long: int = 2048) -> tuple[int, int]:
    """Return the size that an image is resized to: the short side becomes `short`, the long one at most `long`."""
    factor = min(long / max(height, width), short / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


class WorkingTransform(KeepTransform):
    """Resize to `working_size` in whole grey levels, as the training-free open-vocabulary systems do."""

    def __call__(self, rng: np.random.Generator | None, image: np.ndarray, labels: Sequence[np.ndarray]) -> Augmented:
        height, width = working_size(*image.shape[:2], self.short)
        image = cv2.resize(image.astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float32)
        labels = [cv2.resize(x, (width, height), interpolation=cv2.INTER_NEAREST) for x in labels]
        return image, image, labels


def _squash_image(image: np.ndarray, size: int, antialias: bool = False) -> np.ndarray:
    if antialias:
        squashed = Image.fromarray(image.astype(np.uint8)).resize((size, size), Image.Resampling.BILINEAR)
        return np.array(squashed, np.float32)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)


def _squash_label(label: np.ndarray, size: int) -> np.ndarray:
    return cv2.resize(label, (size, size), interpolation=cv2.INTER_NEAREST)


def bbox_mask(mask: np.ndarray) -> np.ndarray:
    """Fill the bounding box of each 8-connected component of `mask == 1` (H W uint8 {0,1,255}); 255 stays 255."""
    _, _, boxes, _ = cv2.connectedComponentsWithStats((mask == 1).astype(np.uint8), connectivity=8)
    out = np.zeros_like(mask)
    for left, top, width, height, _ in boxes[1:]:  # component 0 is the background
        out[top : top + height, left : left + width] = 1
    out[mask == IGNORE] = IGNORE
    return out


def clip_input(clean: np.ndarray, hw: Sequence[int], patch: int = 16) -> torch.Tensor:
    """Resize the clean H W 3 float32 image for CLIP: uint8 3 H' W', H' W' = `hw` rounded up to multiples of `patch`.

    Truncated to uint8, then bicubic by PIL ("PI-CLIP Sec. 4, VTP 1").
    """
    height, width = (-(-side // patch) * patch for side in hw)
    resized = Image.fromarray(clean.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return to_tensor(np.array(resized))


def clip_crop(image: np.ndarray, side: int) -> torch.Tensor:
    """Preprocess an H W 3 float32 image as CLIP does: short side to `side`, bicubic, then the centre; uint8 3 side side."""
    height, width = image.shape[:2]
    scale = side / min(height, width)
    long = int(scale * max(height, width))  # rounded down, as torchvision does
    resized = Image.fromarray(image.astype(np.uint8)).resize((side, long) if height > width else (long, side),
                                                             Image.Resampling.BICUBIC)  # fmt: skip
    left, top = (round((x - side) / 2) for x in resized.size)
    return to_tensor(np.array(resized.crop((left, top, left + side, top + side))))


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Turn H W 3 into 3 H W; H W stays as it is; contiguous, dtype kept."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1) if array.ndim == 3 else array))
