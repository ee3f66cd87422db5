"""Pictures of masks, maps and episodes: numpy in, numpy out.

Images are H W 3 uint8 RGB, masks H W {0, 1, 255 = does not count}. The colours are Okabe and Ito's, which stay apart
for colour-blind eyes; every role has one colour everywhere (`COLOURS`).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Panel = tuple[str, np.ndarray]  # caption, H W 3 uint8

COLOURS: dict[str, tuple[int, int, int]] = {
    "support mask": (230, 159, 0),
    "prediction": (86, 180, 233),
    "truth": (0, 190, 140),
    "false alarm": (213, 94, 0),
    "miss": (240, 228, 66),
    "not counted": (128, 128, 128),
}


@dataclass
class Card:
    """One episode of a gallery. group: its section, e.g. "best"; panels in order; number: of the episode."""

    title: str
    subtitle: str
    group: str
    panels: list[Panel]
    number: int = -1


def _check(image: np.ndarray, mask: np.ndarray | None = None) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected an image H W 3 uint8, got {image.shape} {image.dtype}")
    if mask is not None and mask.shape != image.shape[:2]:
        raise ValueError(f"the mask is {mask.shape}, its image {image.shape[:2]}")


def overlay(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = COLOURS["prediction"],
            alpha: float = 0.5, outline: int = 2) -> np.ndarray:
    """Tint the pixels where mask == 1 by `alpha`, and draw their edge `outline` pixels wide (0: none)."""
    _check(image, mask)
    inside = (mask == 1).astype(np.uint8)
    out = image.copy()
    tinted = (1 - alpha) * image[inside == 1] + alpha * np.array(colour)
    out[inside == 1] = tinted.round().astype(np.uint8)
    if outline:
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * outline + 1,) * 2)
        core = cv2.erode(inside, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
        out[(inside == 1) & (core == 0)] = colour
    return out


def heatmap(values: np.ndarray, image: np.ndarray, alpha: float = 0.65) -> np.ndarray:
    """Draw a map h w of any range, min-max scaled, in inferno (even steps of lightness), over its image in grey.

    A constant map is drawn as all low. Values that are not finite count as the lowest.
    """
    _check(image)
    values = np.asarray(values, dtype=np.float32)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    scaled = np.where(np.isfinite(values), values - low, 0) / max(float(high - low), 1e-12)
    scaled = cv2.resize(scaled.astype(np.float32), image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    heat = cv2.applyColorMap((scaled * 255).round().astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    return ((1 - alpha) * _grey(image) + alpha * heat).round().astype(np.uint8)


def error_map(pred: np.ndarray, truth: np.ndarray, image: np.ndarray | None = None) -> np.ndarray:
    """Draw hits (in the prediction's colour), false alarms and misses of pred {0, 1} against truth {0, 1, 255}.

    The image, if given, is dimmed below them; pixels that do not count are middle grey.
    """
    out = np.full((*truth.shape, 3), 24, np.uint8) if image is None else (_grey(image) * 0.45).astype(np.uint8)
    _check(out, truth)
    _check(out, pred)
    cells = {
        "prediction": (pred == 1) & (truth == 1),
        "false alarm": (pred == 1) & (truth == 0),
        "miss": (pred == 0) & (truth == 1),
    }
    for name, where in cells.items():
        out[where] = (0.85 * np.array(COLOURS[name]) + 0.15 * out[where]).round().astype(np.uint8)
    out[truth == 255] = COLOURS["not counted"]
    return out


def palette() -> np.ndarray:
    """Return the colour of every class number as VOC has them, 256 3 uint8: bit j of channel k is bit 3j + k of the number."""
    table = np.array([[sum((i >> (3 * j + k) & 1) << (7 - j) for j in range(3)) for k in range(3)] for i in range(256)], np.uint8)
    table[255] = COLOURS["not counted"]
    return table


def colours(label: np.ndarray) -> np.ndarray:
    """Colour H W channel numbers (255 = ignore) by `palette`, H W 3 uint8."""
    return palette()[label.astype(np.uint8)]


def tinted(image: np.ndarray, label: np.ndarray, alpha: float = 0.55) -> np.ndarray:
    """Tint an image with the colours of its label H W uint8, and draw the edges between classes; 0 keeps the image."""
    _check(image, label)
    paint, (height, width) = colours(label), label.shape
    edge = np.zeros(label.shape, bool)
    for dy, dx in ((0, 1), (1, 0)):
        edge[dy:, dx:] |= label[dy:, dx:] != label[: height - dy, : width - dx]
    out = np.where((label > 0)[..., None], (1 - alpha) * image + alpha * paint, image).round().astype(np.uint8)
    out[edge] = 255
    return out


def with_legend(image: np.ndarray, entries: Sequence[tuple[int, str]]) -> np.ndarray:
    """Put a legend on white at the right of an image: (class number, text) a line, as many as fit; 0 has no colour."""
    _check(image)
    height = image.shape[0]
    size = int(np.clip(height / 22, 9, 26))
    line, font = round(1.5 * size), ImageFont.load_default(size)
    fit = max(1, (height - size // 2) // line)
    shown = list(entries) if len(entries) <= fit else [*entries[: fit - 1], (0, f"and {len(entries) - fit + 1} more")]
    width = max((round(font.getlength(text)) for _, text in shown), default=0) + 3 * size
    strip = Image.new("RGB", (width, height), "white")
    pen, table = ImageDraw.Draw(strip), palette()
    for i, (number, text) in enumerate(shown):
        top = size // 2 + i * line
        pen.rectangle((size // 2, top, size // 2 + size, top + size), tuple(map(int, table[number])) if number else "white",
                      (128, 128, 128))  # fmt: skip
        pen.text((2 * size, top), text, (20, 24, 32), font)
    return np.hstack([image, np.asarray(strip)])


def episode_panels(supports: Sequence[tuple[np.ndarray, np.ndarray]], query: np.ndarray, maps: Mapping[str, np.ndarray],
                   pred: np.ndarray, truth: np.ndarray) -> list[Panel]:
    """Draw the panels of one episode: support(s) with mask, query, its maps (any size and range), prediction, truth, errors.

    supports: (image, mask) pairs; pred and truth have the size of the query.
    """
    names = ["support"] if len(supports) == 1 else [f"support {k + 1}" for k in range(len(supports))]
    masked = [overlay(image, mask, COLOURS["support mask"]) for image, mask in supports]
    return [
        *zip(names, masked, strict=True),
        ("query", query),
        *((name, heatmap(values, query)) for name, values in maps.items()),
        ("prediction", overlay(query, pred, COLOURS["prediction"])),
        ("truth", overlay(query, truth, COLOURS["truth"])),
        ("errors", error_map(pred, truth, query)),
    ]


def contact_sheet(rows: Sequence[Sequence[Panel]], titles: Sequence[str] = (), height: int = 150,
                  gap: int = 8) -> np.ndarray:
    """Draw rows of captioned panels, each `height` pixels tall, on white; titles[i] is above row i."""
    rows = [[(caption, fit(image, height)) for caption, image in row] for row in rows]
    if not any(rows):
        raise ValueError("a contact sheet needs at least one panel")
    head, foot = (24 if titles else 0), 20
    width = max(gap + sum(image.shape[1] + gap for _, image in row) for row in rows)
    sheet = Image.new("RGB", (width, gap + len(rows) * (head + height + foot + gap)), "white")
    pen, small, bold = ImageDraw.Draw(sheet), ImageFont.load_default(12), ImageFont.load_default(15)
    for i, row in enumerate(rows):
        x, y = gap, gap + i * (head + height + foot + gap)
        if titles:
            pen.text((x, y + 2), titles[i], (20, 24, 32), bold)
        for caption, image in row:
            sheet.paste(Image.fromarray(image), (x, y + head))
            pen.text((x, y + head + height + 3), caption, (90, 98, 110), small)
            x += image.shape[1] + gap
    return np.asarray(sheet)


def fit(image: np.ndarray, height: int) -> np.ndarray:
    """Resize an image to `height` pixels, its aspect ratio kept."""
    _check(image)
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    shrink = height < image.shape[0]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR)


def png_data_uri(image: np.ndarray) -> str:
    """Return `data:image/png;base64,...`, lossless."""
    return _data_uri(image, "png", [])


def jpeg_data_uri(image: np.ndarray, quality: int = 85) -> str:
    """Return `data:image/jpeg;base64,...`, colour at full resolution, so that thin outlines stay clean."""
    return _data_uri(image, "jpeg", [cv2.IMWRITE_JPEG_QUALITY, quality,
                                     cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444])


def _data_uri(image: np.ndarray, kind: str, options: list[int]) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(_encode(image, kind, options)).decode()}"


def _encode(image: np.ndarray, kind: str, options: Sequence[int] = ()) -> bytes:
    _check(image)
    return cv2.imencode(f".{kind}", np.ascontiguousarray(image[..., ::-1]), list(options))[1].tobytes()


def png_bytes(image: np.ndarray) -> bytes:
    """Return the image as the bytes of a PNG file."""
    return _encode(image, "png")


def _grey(image: np.ndarray) -> np.ndarray:
    return np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
