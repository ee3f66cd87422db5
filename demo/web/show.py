"""Results as HTML: figures with captions, messages. Pictures are inside the page, as data URIs."""

import base64
import io
from collections.abc import Sequence
from html import escape

import cv2
import numpy as np
from PIL import Image

from demo.web.session import Example, Found, Support
from util.report.viz import COLOURS, heatmap, jpeg_data_uri, overlay, png_data_uri

SIDE = 480  # pixels: smaller pictures are enlarged to about this before masks are drawn, so that outlines stay sharp
MAPS = {
    "vtp": ("VTP", "text prior: where CLIP sees the name"),
    "vvp": ("VVP", "visual prior: where CLIP sees what the example shows"),
    "cosine": ("Cosine prior", "where deep features resemble the example"),
    "similarity": ("Similarity prior", "where the base learner's features resemble the example"),
    "correlation": ("Correlation", "what the network matches with the example"),
}
EMPTY = "<div class='empty'>The picture you search appears here, with what was found in it.</div>"


def result(found: Found | None, threshold: float) -> str:
    """The query with its mask, what to know about it, and the mask to save."""
    if found is None:
        return EMPTY
    mask, large = found.mask(threshold), enlarged(found.image)
    shown = cv2.resize(found.score, large.shape[1::-1], interpolation=cv2.INTER_LINEAR) > threshold
    share = f"{100 * mask.mean():.1f} % of the picture" if mask.any() else f"nothing: no score above {threshold:.2f}"
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    save = f"<a download='mask.png' href='{png_data_uri(grey(mask))}'>Save the mask</a>"
    return (f"<figure>{picture(overlay(large, shown, alpha=0.45), 'result')}<figcaption><b>Found</b> {share}, "
            f"in {found.seconds:.2f} s. {save}</figcaption></figure><ul>{notes}</ul>")  # fmt: skip


def details(found: Found | None, threshold: float) -> str:
    """Mask, score and the maps behind it, side by side."""
    if found is None:
        return ""
    large = enlarged(found.image)
    mask = cv2.resize(grey(found.mask(threshold)), large.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    figures = [("Mask", f"score above {threshold:.2f}", mask)]
    figures += [(*MAPS.get(name, (name, "")), heatmap(values, large)) for name, values in found.maps.items()]
    if not found.text_alone:
        span = f"{found.score.min():.2f} to {found.score.max():.2f}, what the threshold cuts"
        figures.append(("Score", span, heatmap(found.score, large)))
    return ("<h3>Behind the result</h3><div class='maps'>" + "".join(
        f"<figure>{picture(image, name)}<figcaption><b>{escape(name)}</b> {escape(text)}</figcaption></figure>"
        for name, text, image in figures
    ) + "</div><p class='hint'>Maps go from dark (lowest value in the picture) to bright (highest).</p>")  # fmt: skip


def examples(found: Sequence[Example]) -> str:
    """A button with a small picture for each."""
    return "<div class='examples'><span>Try one, they are drawn:</span>" + "".join(
        f"<button type='button' data-number='{i}'>{picture(thing(e.support), '')}"
        f"{escape(e.name)}</button>" for i, e in enumerate(found)
    ) + "</div>"  # fmt: skip


def kept(supports: Sequence[Support]) -> str:
    """Small pictures of the supports that are kept."""
    if not supports:
        return ""
    small = "".join(picture(tinted(s.photo.image, s.mask, "support mask"), s.photo.name) for s in supports)
    return f"<div class='kept'>{small}<span>{len(supports)} kept</span></div>"


def message(text: str) -> str:
    """A message about something wrong; nothing for an empty one."""
    return f"<div class='wrong' role='alert'>{escape(text)}</div>" if text else ""


def painter(support: Support | None) -> dict[str, str | None]:
    """Return the value for painter.js: the photo, and its mask as painted (opaque where the object is); None without a photo."""
    if support is None:
        return {"photo": None, "mask": None}
    photo = jpeg_data_uri(support.photo.image, quality=92)
    if support.mask is None:
        return {"photo": photo, "mask": None}
    opaque = Image.fromarray(np.where(support.mask == 1, 255, 0).astype(np.uint8))
    sheet, file = Image.new("RGB", opaque.size, COLOURS["support mask"]), io.BytesIO()
    sheet.putalpha(opaque)
    sheet.save(file, "PNG")
    return {"photo": photo, "mask": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}


def thing(support: Support) -> np.ndarray:
    """Cut out the object of a support, with a little around it."""
    y, x = np.nonzero(support.mask == 1)
    around = np.s_[max(y.min() - 6, 0) : y.max() + 7, max(x.min() - 6, 0) : x.max() + 7]
    return tinted(support.photo.image[around], support.mask[around], "support mask")


def tinted(image: np.ndarray, mask: np.ndarray, role: str = "prediction") -> np.ndarray:
    """The image, enlarged where it is small, with a mask {0, 1, 255} of its size in the colour of its role."""
    factor = zoom(image)
    mask = cv2.resize(mask, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    return overlay(enlarged(image), mask, COLOURS[role], alpha=0.45)


def enlarged(image: np.ndarray) -> np.ndarray:
    factor = zoom(image)
    return image if factor == 1 else cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)


def zoom(image: np.ndarray) -> int:
    return max(1, SIDE // max(image.shape[:2]))


def grey(mask: np.ndarray) -> np.ndarray:
    """H W 3 uint8, 255 where the mask is 1."""
    return np.repeat(np.where(mask == 1, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


def picture(image: np.ndarray, name: str) -> str:
    return f"<img src='{jpeg_data_uri(image, quality=90)}' alt='{escape(name, quote=True)}'>"
