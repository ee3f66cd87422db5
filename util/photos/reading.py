"""Read users' photos and masks: every kind of file by the same rules, upright, or refused with a reason.

Photos become H W 3 uint8 RGB (HEIC: with the optional package pillow-heif). The first frame of an animation counts; transparency
lies over white; 16-bit grey keeps its upper 8 bits, and is refused where these are nearly empty; CMYK and the like are
converted by Pillow, colour profiles are ignored. The EXIF orientation is applied.

Masks: 0 is background, every other value the object. In a palette PNG, as VOC's labels are, 255 does not count, and entry 0 must
be black; with transparency the opaque part is the object; of colours everything but black. With soft edges (a blur, an
antialiased brush) the object begins at half of white. JPEG masks are refused, since JPEG blurs values.
"""

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from util.data.transforms import IGNORE, SUFFIXES, check_depth, open_image, upper_byte
from util.errors import UserError
from util.files import entries

Box = Sequence[float]  # x0, y0, x1, y1 in pixels of the upright photo; x1 and y1 are the first that are outside

MAX_PIXELS = 128_000_000  # of a file: more is a decompression bomb
MAX_SIDE = 640  # pixels: the longest side of PASCAL's and COCO's images; larger photos are reduced to it
DARK = 16  # a colour below it counts as black
MANY = 16  # so many levels of grey are no class numbers
HEIC = (".heic", ".heif")  # of phones
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
KNOWN = SUFFIXES + HEIC + VIDEOS
ORIENTATION = 0x0112  # EXIF tag
TURNS = {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # its values that swap width and height -> how to turn the image


@dataclass(frozen=True)
class Photo:
    """An upright image, and the EXIF orientation that it was stored with."""

    image: np.ndarray  # H W 3 uint8 RGB
    name: str
    orientation: int = 1

    @property
    def hw(self) -> tuple[int, int]:
        return self.image.shape[:2]


Source = str | Path | np.ndarray | Image.Image | Tensor | Photo  # arrays H W 3 or H W, tensors 3 H W or H W, uint8


def read_photo(source: Source, name: str = "image") -> Photo:
    """Read a file, or take an array, tensor (both uint8) or Pillow image.

    name: for messages, where the source is no file.
    Raises UserError: missing, no image, damaged, too large, or an array of another type or shape.
    """
    if isinstance(source, Photo):
        return source
    image, name = _open(source, name)
    orientation = image.getexif().get(ORIENTATION, 1)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise UserError(f"{name}: values are floating point, which have no fixed white; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{name}: values from {values.min()} to {values.max()}; save it with 8 or 16 bits")
        image = Image.fromarray(upper_byte(values.astype(np.uint16), name))
    if image.has_transparency_data:
        sheet = Image.new("RGBA", image.size, "white")
        sheet.alpha_composite(image.convert("RGBA"))
        image = sheet
    return Photo(np.asarray(image.convert("RGB")), name, orientation)


def read_mask(source: Source, photo: Photo) -> np.ndarray:
    """Read the mask of a photo, H W uint8: 1 object, 0 background, 255 does not count.

    It needs the photo's upright size, or the size of the stored photo; then it is turned with it.
    Raises UserError: as `read_photo`; another size; JPEG; no object.
    """
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray) and source.ndim == 2 and source.size and source.dtype.kind in "biu":
        source = _object(source, f"mask of {photo.name}")
    image, name = _open(source, f"mask of {photo.name}")
    if image.format in ("JPEG", "MPO"):
        raise UserError(f"{name}: a mask must be lossless, JPEG blurs its values; export it as PNG from where "
                        "it was painted (turning this file into a PNG keeps the blur)")
    image = ImageOps.exif_transpose(image)
    hw = image.size[::-1]
    if hw != photo.hw and hw == photo.hw[::-1] and photo.orientation in TURNS:
        image = image.transpose(TURNS[photo.orientation])  # painted on the pixels as they are stored
    elif hw != photo.hw:
        raise UserError(f"{name} is {hw[1]} x {hw[0]} pixels, its photo {photo.name} {photo.hw[1]} x {photo.hw[0]}: "
                        "a mask needs the size of its photo")
    if image.has_transparency_data and (alpha := np.asarray(image.convert("RGBA"))[..., 3]).min() < 255:
        mask = (alpha >= 128).astype(np.uint8)
    elif image.mode == "P":
        values = _entries(image, name)
        mask = np.where(values == IGNORE, IGNORE, values != 0).astype(np.uint8)
    elif image.mode == "F":
        raise UserError(f"{name}: values are floating point, which have no fixed white; save it with 8 or 16 bits")
    else:
        several = len(image.getbands()) > 1
        values = np.asarray(image.convert("RGB")).max(-1) if several else np.asarray(image)
        mask = _object(values, name).astype(np.uint8)
    if not (mask == 1).any():
        only = "; in a palette PNG 255 means: does not count, so save it in greyscale" if (mask == IGNORE).any() else ""
        raise UserError(f"{name} is empty: every pixel is background (0){only}")
    return mask


def _entries(image: Image.Image, name: str) -> np.ndarray:
    """Return the palette entries of a mask, H W uint8. Raises UserError where entry 0 is not shown as background."""
    values = np.asarray(image)
    used = np.unique(values)
    colours = np.zeros((256, 3), int)
    colours[:, :] = np.arange(256)[:, None]  # a palette that was never set
    given = np.reshape(image.getpalette() or [], (-1, 3))
    colours[: len(given)] = given
    dark = colours.max(1) < DARK
    if not dark[0] or (0 not in used and dark[used].any()):
        shown = ",".join(map(str, colours[0])) + " and in no pixel" * (0 not in used)
        raise UserError(f"{name}: entry 0 of its palette is the background and must be black, here it is {shown}; save the mask "
                        "in greyscale, with a black background and a white object")
    if len(used) >= MANY and (np.ptp(colours[used], 1) == 0).all() and (colours[used, 0] != used).any():
        return _object(colours[values, 0], name).astype(np.uint8)  # a grey picture in the form of a palette
    return values


def _object(values: np.ndarray, name: str) -> np.ndarray:
    """Return the object of a mask of H W integers, H W bool: all but 0; with soft edges, from half of white on.

    Edges are soft where most of the grey pixels lie between a darker and a brighter one. Class and instance numbers do not: they
    fill regions of one value.
    """
    peak = int(values.max())
    white = next((2**bits - 1 for bits in (8, 10, 12, 14, 16) if peak < 2**bits), peak)
    grey = (values > white // 16) & (values < peak)
    levels = len(np.unique(values[grey]))
    if levels > 1:
        window, around = np.ones((5, 5), np.uint8), values.astype(np.float32)
        between = (cv2.erode(around, window) < around) & (around < cv2.dilate(around, window))
        if between[grey].mean() > 0.5 and (levels >= MANY or 2 * peak > white):
            if 2 * peak <= white:
                raise UserError(f"{name} has soft edges, and is nowhere brighter than {peak} of {white}; its object begins at "
                                "half of white, so save it with more contrast")
            return 2 * values.astype(np.int64) > white
    return values != 0


def doubt(mask: np.ndarray) -> str:
    """Say what looks wrong about a mask, H W {0, 1, 255}; "" where nothing does."""
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    if (border == 1).mean() > 0.9 and (mask == 1).mean() > 0.5:
        return "the object covers nearly the whole border of the photo; are background and object exchanged in its mask?"
    return ""


def box_mask(boxes: Sequence[Box], photo: Photo) -> np.ndarray:
    """Fill boxes, H W uint8 {0, 1}; parts outside the photo, at most a twentieth of its side, are cut off.

    Raises UserError: not four numbers, an empty box, or one that reaches further outside.
    """
    height, width = photo.hw
    slack_y, slack_x = height / 20 + 1, width / 20 + 1
    mask = np.zeros((height, width), np.uint8)
    for box in boxes:
        if len(box) != 4 or not np.isfinite(box).all():
            raise UserError(f"box {box} of {photo.name}: give x0, y0, x1, y1 in pixels")
        if max(box) <= 1 and any(value % 1 for value in box):
            pixels = ",".join(str(round(value * side)) for value, side in zip(box, photo.hw[::-1] * 2, strict=True))
            raise UserError(f"box {','.join(map(str, box))} of {photo.name}: these are fractions of its sides; give pixels, here "
                            f"{pixels}")
        x0, y0, x1, y1 = (round(float(value)) for value in box)
        part = mask[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
        if x0 >= x1 or y0 >= y1 or not part.size:
            raise UserError(f"box {x0},{y0},{x1},{y1} of {photo.name}: needs x0 < x1, y0 < y1 and a part inside the photo "
                            f"({width} x {height} pixels)")
        if min(x0 + slack_x, y0 + slack_y, width + slack_x - x1, height + slack_y - y1) < 0:
            raise UserError(f"box {x0},{y0},{x1},{y1} reaches far outside {photo.name} ({width} x {height} pixels): give x0, y0, "
                            "x1, y1 in pixels of the upright photo, not width and height")
        part[:] = 1
    return mask


def unmarked(photo: Photo) -> np.ndarray:
    """Return the mask of a photo that has none: H W uint8, 0 everywhere."""
    return np.zeros(photo.hw, np.uint8)


def box_around(mask: np.ndarray) -> np.ndarray:
    """Fill the smallest box around a mask, H W bool."""
    filled, (y, x) = np.zeros_like(mask), np.nonzero(mask)
    if len(y):
        filled[y.min() : y.max() + 1, x.min() : x.max() + 1] = True
    return filled


def box_lists(boxes: Box | Sequence | None) -> list[list[Box]]:
    """Return the boxes of each image, from any of the accepted forms."""
    def is_box(value: Sequence) -> bool:
        return len(value) > 0 and not any(isinstance(x, (list, tuple, np.ndarray, type(None))) for x in value)

    boxes = [] if boxes is None else list(boxes)
    if is_box(boxes):
        boxes = [boxes]
    return [[] if entry is None else [entry] if is_box(entry) else list(entry) for entry in boxes]


def annotated(photos: Sequence[Photo], masks: Sequence[Source | None], boxes: Sequence[Sequence[Box]]
              ) -> list[tuple[Photo, np.ndarray]]:  # fmt: skip
    """Return each photo with its mask, H W uint8 {0, 1, 255}.

    Raises:
        UserError: not one mask, or one entry of boxes, for each.
    """
    for what, given in (("masks", masks), ("entries of boxes", boxes)):
        if given and len(given) != len(photos):
            raise UserError(f"{len(photos)} supports and {len(given)} {what}: each support needs a mask or a box of its own")
    pairs = []
    for i, photo in enumerate(photos):
        mask, box = masks[i] if masks else None, boxes[i] if boxes else []
        if (mask is None) == (not len(box)):
            raise UserError(f"support {photo.name}: give a mask or boxes (--mask PNG, --box x0,y0,x1,y1)"
                            + ("" if mask is None else ", not both"))
        pairs.append((photo, box_mask(box, photo) if mask is None else read_mask(mask, photo)))
    return pairs


def shrink(image: np.ndarray, side: int, interpolation: int = cv2.INTER_AREA) -> np.ndarray:
    """Reduce H W [3] to a longer side of at most `side`. (The network's own resize would skip most pixels of a large photo.)"""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    return cv2.resize(image, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=interpolation)


def find(patterns: Sequence[str]) -> list[Path]:
    """List the photos and videos of files, folders (without hidden files and folders inside) and globs, each once, in order.

    Raises UserError: one of them matches nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        if Path(pattern).is_dir():
            files = [f for f in entries(Path(pattern)) if f.suffix.lower() in KNOWN and f.is_file()]
            if not files:
                raise UserError(f"no photo and no video in the folder {pattern}; it reads {', '.join(KNOWN)}")
        else:
            files = [Path(pattern)] if Path(pattern).is_file() else [Path(f) for f in sorted(glob(pattern)) if Path(f).is_file()]
            if not files:
                raise UserError(f"no such file, folder or pattern: {pattern}")
        found.update(dict.fromkeys(files))
    return list(found)


def others(patterns: Sequence[str]) -> list[Path]:
    """List the files in folders among the patterns that `find` leaves out."""
    files = (f for pattern in patterns if Path(pattern).is_dir() for f in entries(Path(pattern)) if f.is_file())
    return [f for f in files if f.suffix.lower() not in KNOWN]


def frames(path: Path, every: int) -> Iterator[tuple[str, Photo]]:
    """Yield a file's photo with the stem of its name; for a video the first and then every `every`-th frame, STEM_NUMBER.

    Raises UserError: see `read_photo`; a video that cannot be read.
    """
    if path.suffix.lower() not in VIDEOS:
        yield path.stem, read_photo(path)
        return
    video, number = cv2.VideoCapture(str(path)), 0
    try:
        while video.grab():
            if number % every == 0:
                good, frame = video.retrieve()
                if not good:
                    raise UserError(f"{path}: frame {number} cannot be read; the video is damaged")
                yield f"{path.stem}_{number:06d}", Photo(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), f"{path} frame {number}")
            number += 1
    finally:
        video.release()
    if not number:
        raise UserError(f"{path}: not a readable video; OpenCV finds no frame in it")


def _open(source: Source, name: str) -> tuple[Image.Image, str]:
    """Open an image with Pillow; also return its name for messages."""
    if isinstance(source, Image.Image):
        return source, getattr(source, "filename", "") or name
    if isinstance(source, (str, Path)):
        return _load(Path(source)), str(source)
    array = source.detach().cpu().numpy() if isinstance(source, Tensor) else source
    if isinstance(source, Tensor) and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        what = f"{type(source).__name__} {tuple(getattr(source, 'shape', ()))}"
        raise UserError(f"{name}: expected a path, a Pillow image, an array H W 3 or H W, or a tensor 3 H W or H W; got {what}")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if array.dtype != np.uint8 or not array.size:
        raise UserError(f"{name}: an array must hold pixels as uint8 (0..255) or bool, this one is {array.dtype} {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array)), name


def _load(path: Path) -> Image.Image:
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    too_large = f"{path} has more than {MAX_PIXELS // 10**6} million pixels: too large, or a decompression bomb; shrink it"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have a limit of our own
            with open_image(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(too_large)
                deep = any("16" in str(tile[3]) for tile in image.tile)
                image.load()
        if deep and len(image.getbands()) > 2:  # Pillow keeps the upper 8 bits of colours
            check_depth(max(high for _, high in image.getextrema()[:3]) << 8 | 255, path)
        return image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(too_large) from error
    except UnidentifiedImageError as error:
        if path.suffix.lower() in HEIC and importlib.util.find_spec("pillow_heif") is None:
            raise UserError(f"{path}: HEIC, as phones save photos, needs an optional package: pip install pillow-heif; "
                            "or save it as JPEG") from error
        raise UserError(f"{path}: not an image that Pillow reads; save it as JPEG or PNG") from error
    except Exception as error:  # damaged files raise many kinds
        raise UserError(f"{path}: not a readable image ({error}); fetch it again, or save it as JPEG or PNG") from error
