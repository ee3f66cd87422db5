"""Actions of the page, without gradio: from uploads to results.

All that belongs to one user is a `Session` of bounded size, which every action replaces by another; the model is shared.
Photos are reduced once, to the size that the Predictor uses: the painted, shown and segmented photo is the same.
"""

import base64
import binascii
import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from demo.shapes import NAMES
from demo.world import VAL, scene
from model.predict.predictor import Predictor
from model.predict.text_predictor import TextPredictor
from util.data.transforms import open_image
from util.errors import UserError
from util.photos.reading import MAX_SIDE, Photo, read_mask, read_photo, shrink

MAX_SUPPORTS = 5
MAX_TEXT = 100  # characters
MAX_UPLOAD_SIDE = 10_000  # pixels
MAX_PAINTED = 4_000_000  # characters of a painted mask's data URI
EXAMPLE_PIXELS = 1000  # of its class, at least, in both scenes of an example


@dataclass(frozen=True)
class Support:
    """A photo with the object in it.

    Attributes:
        photo: at most MAX_SIDE pixels.
        upload: the same without pixels, in the size and orientation of the file, with which its mask is compared.
        mask: H W uint8 {0, 1, 255 = does not count}, of the photo's size; None until there is one.
    """

    photo: Photo
    upload: Photo
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Found:
    """Scores of the network for a query H x W; a threshold turns them into the mask."""

    image: np.ndarray  # H W 3 uint8
    score: np.ndarray  # H W float32 0..1
    maps: dict[str, np.ndarray]  # name -> h w float32
    notes: tuple[str, ...]
    seconds: float
    text_alone: bool  # no support: the score is the text prior, the network did not run

    def mask(self, threshold: float) -> np.ndarray:
        """H W uint8 {0, 1}: where the score is above the threshold."""
        return (self.score > threshold).astype(np.uint8)


@dataclass(frozen=True)
class Session:
    """State of one user: the current support, those kept before it, and the last result."""

    support: Support | None = None
    kept: tuple[Support, ...] = ()
    found: Found | None = None


@dataclass(frozen=True)
class Example:
    """Two scenes of the demo world that show one thing."""

    name: str
    support: Support
    query: np.ndarray  # H W 3 uint8


class Model:
    """A predictor that several users share, one at a time.

    Attributes:
        about: one line on what it is.
        words: all words that its CLIP knows, where they are few.
        takes_supports: False for a CLIP without a trained network, which reads the text alone.
        takes_text: whether it reads the text.
        needs_masks: False where supports need no mask.
    """

    def __init__(self, predictor: Predictor | TextPredictor, about: str, words: Sequence[str] = ()) -> None:
        self.predictor, self.about, self.words, self.lock = predictor, about, words, threading.Lock()
        self.takes_supports = not isinstance(predictor, TextPredictor)
        self.takes_text = not self.takes_supports or predictor.takes_text
        self.needs_masks = not self.takes_supports or predictor.needs_masks

    def find(self, supports: Sequence[Support], text: str, query: Photo) -> Found:
        """Raises UserError as the predictor's methods do."""
        # a palette image: in an array, 255 would count as the object
        masks = [Image.fromarray(support.mask, "P") for support in supports] if self.needs_masks else None
        with self.lock:
            self.predictor.set_support([support.photo for support in supports], masks, text)
            found, notes = self.predictor.predict(query), self.predictor.notes
        return Found(query.image, found.score, found.maps, notes, found.seconds, not supports)


def open_support(session: Session, path: str) -> Session:
    """Make the upload the current support, without a mask.

    Raises:
        UserError: not an image, or too large.
    """
    photo = read_upload(path)
    bare = Photo(np.broadcast_to(np.uint8(0), photo.image.shape), photo.name, photo.orientation)
    return replace(session, support=Support(reduced(photo), bare))


def open_mask(session: Session, path: str) -> Session:
    """Make the upload the mask of the current support.

    Raises:
        UserError: no support yet, or no mask of it (`read_mask`).
    """
    if session.support is None:
        raise UserError("choose the photo first, then its mask")
    check_size(path)
    try:
        mask = read_mask(path, session.support.upload)
    except UserError as error:
        raise UserError(bare_names(error, path)) from error
    return replace(session, support=replace(session.support, mask=shrink(mask, MAX_SIDE, cv2.INTER_NEAREST)))


def supports(session: Session, drawn: dict | None, masked: bool = True) -> tuple[Support, ...]:
    """Return the kept supports and the current one, if any, with its painted mask.

    masked: whether each needs a mask; else one without is 0 everywhere.
    drawn: value from painter.js, {"painted": a PNG as data URI}; before anything is painted, the value from `show.painter`.

    Raises:
        UserError: the current support has no mask, the painting is empty, or the page shows a support that is not stored here.
    """
    painted, photo = (drawn.get(key) if isinstance(drawn, dict) else None for key in ("painted", "photo"))
    if session.support is None and (painted or photo):
        raise UserError("this page was left too long, and your example is forgotten; load the page again")
    if session.support is None:
        return session.kept
    mask = read_painted(str(painted), session.support.photo) if painted else session.support.mask
    if mask is None and masked:
        raise UserError("where is the object in the example? Paint over it, or give a mask file")
    if mask is None:
        mask = np.zeros(session.support.photo.hw, np.uint8)
    return (*session.kept, replace(session.support, mask=mask))


def keep(session: Session, drawn: dict | None, masked: bool = True) -> Session:
    """Keep the current support, and make room for another.

    Raises:
        UserError: as `supports`; there are enough.
    """
    if session.support is None:
        raise UserError("there is no example to keep: choose a photo first")
    if len(session.kept) + 1 >= MAX_SUPPORTS:
        raise UserError(f"{MAX_SUPPORTS} examples are the most; this is the last of them, go on with the picture to search")
    return replace(session, support=None, kept=supports(session, drawn, masked))


def remove(session: Session) -> Session:
    """Drop the current support; without one, the kept supports."""
    return replace(session, support=None) if session.support else replace(session, kept=())


def segment(model: Model, session: Session, drawn: dict | None, text: str | None, query: str | None) -> Session:
    """Find the thing in the query, an uploaded file.

    Raises:
        UserError: an upload that cannot be used, or not enough to look for.
    """
    text = (text or "").strip()
    if len(text) > MAX_TEXT:
        raise UserError(f"the name has {len(text)} characters; {MAX_TEXT} are the most")
    if not query:
        raise UserError("choose the picture to search")
    examples = supports(session, drawn, model.needs_masks)
    return replace(session, found=model.find(examples, text, reduced(read_upload(query))))


def demo_examples(classes: Sequence[int]) -> Iterator[Example]:
    """Of each class of the demo world, the first two validation scenes that show enough of it: support and query."""
    wanted: dict[int, list] = {c: [] for c in classes}
    for number in VAL:
        made = scene(number)
        for c, scenes in wanted.items():
            if len(scenes) < 2 and (made.label == c).sum() >= EXAMPLE_PIXELS:
                scenes.append(made)
        if all(len(scenes) == 2 for scenes in wanted.values()):
            break
    for c, (first, second) in wanted.items():
        photo = Photo(first.image, NAMES[c - 1])
        mask = np.where(first.label == 255, 255, first.label == c).astype(np.uint8)
        yield Example(NAMES[c - 1], Support(photo, photo, mask), second.image)


def read_upload(path: str) -> Photo:
    """An uploaded photo, of its own size.

    Raises:
        UserError: not an image, or too large.
    """
    check_size(path)
    try:
        return replace(read_photo(path), name=Path(path).name)
    except UserError as error:
        raise UserError(bare_names(error, path)) from error


def read_painted(uri: str, photo: Photo) -> np.ndarray:
    """The mask in a PNG as data URI, opaque where the object is; H W uint8 {0, 1}.

    Raises:
        UserError: nothing is painted, or it is no such PNG of the photo's size.
    """
    head, _, code = uri.partition(",")
    try:
        if head != "data:image/png;base64" or len(code) > MAX_PAINTED:
            raise ValueError
        image = open_image(io.BytesIO(base64.b64decode(code, validate=True)))
        if image.format != "PNG" or image.size[::-1] != photo.hw:
            raise ValueError
        opaque = np.asarray(image.convert("RGBA"))[..., 3] >= 128
    except (ValueError, OSError, SyntaxError, binascii.Error) as error:
        raise UserError("what was painted did not arrive; clear it and paint again") from error
    if not opaque.any():
        raise UserError("nothing is painted: paint over the object in the example, or give a mask file")
    return opaque.astype(np.uint8)


def reduced(photo: Photo) -> Photo:
    return Photo(shrink(photo.image, MAX_SIDE), photo.name)


def check_size(path: str) -> None:
    """Check the size before anything is unpacked. `read_photo` and `read_mask` report files that are no image."""
    try:
        with open_image(path) as image:
            size = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return
    if max(size) > MAX_UPLOAD_SIDE:
        raise UserError(f"{Path(path).name} has {size[0]} x {size[1]} pixels; at most {MAX_UPLOAD_SIDE} each way, shrink it")


def bare_names(error: UserError, path: str) -> str:
    """Replace the folder of an upload in a message by the name that the user knows."""
    return str(error).replace(str(path), Path(path).name)
