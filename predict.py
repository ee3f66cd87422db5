"""Segment your own images: what the supports show, and the text names, is found in every query. Or label every pixel.

    python predict.py --support a.jpg --mask a.png --query photos/ --out DIR

    --support b.jpg --box 10,20,200,300     a box x0,y0,x1,y1 in pixels instead of a mask; several --box for one support
    --weights W --text "golden retriever"   another system than the small network that comes along; PI-CLIP reads a name, too
    --weights imr_hsnet.safetensors --text dog --support a.jpg     examples without masks, where the system needs none (IMR-HSNet)
    --clip --text cat                       no training at all: rough masks from OpenAI's CLIP, which is downloaded, and words
    --clip demo/clip --text star            the same with the demo's CLIP, for the drawn world
    --tile 500                              large pictures through overlapping windows of 500 pixels, for small things in them
    --class cat --support a.jpg --mask a.png --class dog --support b.jpg --box 10,20,200,300       several things at once
    --absent-below auto                     an empty mask where the thing does not seem to be there
    --query FOLDER 'more/*.png' clip.mp4    files, folders, patterns, videos (--every N: every N-th frame)

    python predict.py --weights weclip.safetensors --query photos/                                 all classes of the model
    python predict.py --weights clip_rc.safetensors --classes "cat, dog, sofa" --query photos/     or names of yours, or a file

DIR gets masks/NAME.png (0 background, 255 object; of a system that labels every pixel: class numbers with VOC's colours),
overlays/NAME.jpg, supports/N.jpg (how they were understood), scores.json, overview.jpg, and with --polygons a file for another
tool. docs/predict.md tells what counts as the object in a mask, and the rest.
"""

# ruff: noqa: E402 (what is wrong on the command line is said before torch is imported)

from model.predict.arguments import asked_config, parse, use_threads
from util import cli

if __name__ == "__main__":
    cli.run(lambda: parse(__doc__))

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from model.predict.classes import ClassPredictor
from model.predict.dense_predictor import DensePredictor, Labelling, load_predictor, read_classes
from model.predict.opening import find_weights
from model.predict.predictor import Predictor
from model.predict.presence import threshold
from model.predict.text_predictor import Segmentation, TextPredictor
from util.errors import UserError
from util.photos.reading import Photo, annotated, find, frames, others, read_photo, unmarked
from util.photos.results import Results

POOR = 0.3  # IoU of an example in its own photo; a lower one is reported:
WEAK = ("an example is hardly found even in its own photo: expect nothing of others. Is its mask right (supports/)? Was the "
        "system trained on pictures of this kind?")  # fmt: skip


def main() -> None:
    given = parse(__doc__)
    use_threads(given.threads)
    # 1. what is to be done
    if any(given.out.resolve() == Path(query).resolve() for query in given.query):
        raise UserError(f"--out {given.out}: that folder is searched; give another, results would be found as photos next time")
    paths, weights = find(given.query), None if given.clip is not None else find_weights(given.weights or "photos")
    photos = [read_photo(support["image"]) for support in given.support]
    masks, boxes = ([support[key] for support in given.support] for key in ("mask", "boxes"))
    marked = any(masks) or any(boxes)
    examples = annotated(photos, masks, boxes) if marked else [(photo, unmarked(photo)) for photo in photos]

    # 2. the model, and what it looks for
    predictor, what = open_predictor(given, weights)
    if isinstance(predictor, DensePredictor):
        names, ious = [name for number, name in predictor.classes.items() if number], []
        asked = {"classes": predictor.classes}
    elif given.named:
        predictor = several(predictor, given, photos, masks, boxes)
        names, ious = given.named, predictor.check()
        asked = {"classes": predictor.classes, "supports": given.support, "found_in_supports": [round(iou, 4) for iou in ious]}
    else:
        predictor.set_support(photos, masks, given.text, boxes)
        names, ious = [given.text or "object"], predictor.check()
        asked = {"text": given.text, "supports": given.support, "found_in_supports": [round(iou, 4) for iou in ious]}
    absent_below = limit(predictor, given.absent_below)
    notes, left_out = [*predictor.notes, *([WEAK] if min(ious, default=1) < POOR else [])], [str(p) for p in others(given.query)]
    record = {"weights": weights and str(weights), "clip": given.clip, **asked, "device": str(predictor.device),
              "precision": predictor.precision, "notes": notes, "left_out": left_out,
              "tile": given.tile, "absent_below": absent_below}  # fmt: skip
    results = Results(given.out, given.polygons, names, record)
    for i, (photo, mask) in enumerate(examples, start=1):
        results.support(i, photo, mask)
    print(f"{what}, on {predictor.device} in {predictor.precision}")
    for iou, photo, boxed in zip(ious, photos, boxes, strict=False):  # no overlap where no masks are needed
        around = " (of the boxes around both)" if boxed else ""
        print(f"{photo.name}: an example; its overlap with what is found there is {iou:.2f}{around}")
    if left_out:
        some = ", ".join(left_out[:5]) + ", ..." * (len(left_out) > 5)
        notes = [*notes, f"left out, since only JPEG, PNG and the like and videos are read: {some}"]
    print("".join(f"note: {note}\n" for note in notes), end="")

    # 3. one image (on a GPU: eight) after the other
    try:
        for some in chunks(readable(paths, given.every, results), 8 if predictor.device.type == "cuda" else 1):
            for stem, photo, found, presence in predictions(predictor, some, results, absent_below):
                if isinstance(found, Labelling):
                    row = results.add_labels(stem, photo, found.label, found.score, predictor.classes, found.seconds, presence)
                else:
                    row = results.add(stem, photo, found.mask, found.score, found.seconds, presence)
                print(f"{photo.name}: {shares(row, absent_below)}  ({found.seconds:.2f} s)")
    except BaseException:
        results.finish()
        print(f"stopped; the results so far are in {results.out}, those of an earlier run are as they were", file=sys.stderr)
        raise
    results.close()
    count = len(results.record["images"])
    more = f", polygons ({given.polygons})" if given.polygons else ""
    print(f"{count} mask{'s' * (count != 1)} in {given.out}: masks/, overlays/, overview.jpg, scores.json{more}")
    if WEAK in notes:
        print(f"but note: {WEAK}")
    if unread := results.record["unread"]:
        raise UserError(f"{len(unread)} of the queries could not be read: {', '.join(item['image'] for item in unread)}")


def open_predictor(given: argparse.Namespace, weights: Path | None) -> tuple[Predictor | DensePredictor | TextPredictor, str]:
    """The predictor of a checkpoint, or that of a CLIP alone, and what to call it.

    Raises:
        UserError: options of another kind of system.
    """
    if weights is not None:
        config = asked_config(given, weights)
        predictor = load_predictor(weights, given.device, given.precision, config, given.arch)
        if isinstance(predictor, Predictor):
            if given.classes is not None:
                raise UserError(f"--classes: {weights} finds one thing, what --support shows or --text names; classes are for "
                                "systems that label every pixel (--weights of a zero-shot system)")
            predictor.set_tiles(given.tile)
            return predictor, f"{weights}, {predictor.system.shot}-shot"
        if given.support or given.text:
            option = "--support" if given.support else "--text"
            raise UserError(f"{option}: {weights} labels every pixel with its own classes and looks for no example; leave it out")
        if given.classes is not None:
            try:
                predictor.set_classes(read_classes(given.classes))
            except UserError as error:
                raise UserError(f"--classes with {weights}: {error}") from error
        return predictor, f"{weights}, {len(predictor.classes)} classes"
    if not Path(given.clip).exists():
        print(f"CLIP {given.clip} is downloaded, unless it was before", flush=True)
    return TextPredictor.from_clip(given.clip, given.device, given.precision), given.clip


def readable(paths: Sequence[Path], every: int, results: Results) -> Iterator[tuple[str, Photo]]:
    """Yield stem and photo of all images and frames; unreadable ones are reported, and the others continue."""
    for path in paths:
        try:
            yield from frames(path, every)
        except UserError as error:
            print(f"skipped: {error}")
            results.unread(str(path), str(error))


def several(predictor: Predictor | DensePredictor | TextPredictor, given: argparse.Namespace, photos: Sequence[Photo],
            masks: Sequence[str | None], boxes: Sequence[list]) -> ClassPredictor:  # fmt: skip
    """Look for the classes of --class, each with its supports."""
    found = ClassPredictor(predictor)
    for name in given.named:
        rows = [i for i, support in enumerate(given.support) if support["class"] == name]
        try:
            found.add(name, *([values[i] for i in rows] for values in (photos, masks, boxes)))
        except UserError as error:
            raise UserError(f"--class {name}: {error}") from error
    return found


def limit(predictor: Predictor | ClassPredictor | DensePredictor | TextPredictor, given: float | str | None) -> float | None:
    """Return the presence below which a thing is not there; None: it is always searched.

    Raises:
        UserError: this predictor knows no presence, or no threshold was measured for its network.
    """
    if given is None:
        return None
    one = predictor.predictor if isinstance(predictor, ClassPredictor) else predictor
    if not isinstance(one, Predictor) or not one.knows_presence:
        raise UserError(f"--absent-below {given}: presence is known where supports with masks or boxes show the thing")
    return threshold(one.system) if given == "auto" else given


def predictions(predictor: Predictor | ClassPredictor | DensePredictor | TextPredictor, some: Sequence[tuple[str, Photo]],
                results: Results, absent_below: float | None
                ) -> Iterator[tuple[str, Photo, Segmentation | Labelling, float | dict[str, float] | None]]:  # fmt: skip
    """Yield stem, photo, result and presence of each; what is not there has no pixel. A photo that a dense system cannot label is
    reported as one that cannot be read."""
    if isinstance(predictor, ClassPredictor):
        for stem, photo in some:
            presence = predictor.presence(photo)
            absent = [name for name, value in (presence or {}).items() if absent_below is not None and value < absent_below]
            yield stem, photo, predictor.predict(photo, absent), presence
        return
    if not isinstance(predictor, DensePredictor):
        for (stem, photo), found in zip(some, predictor.predict_batch([photo for _, photo in some]), strict=True):
            presence = predictor.presence(photo) if isinstance(predictor, Predictor) else None
            if absent_below is not None and presence < absent_below:
                found = replace(found, mask=np.zeros_like(found.mask))
            yield stem, photo, found, presence
        return
    for stem, photo in some:
        try:
            found = predictor.predict(photo)
        except UserError as error:
            print(f"skipped: {error}")
            results.unread(photo.name, str(error))
        else:
            yield stem, photo, found, None


def shares(row: Mapping[str, Any], absent_below: float | None = None) -> str:
    """Say what an entry of scores.json found, and how much of the image it is; and what is not there."""
    presence = row.get("presence")
    if "classes" in row:
        found = ", ".join(f"{found['class']} {100 * found['fraction']:.1f} %" for found in row["classes"])
        gone = [name for name, value in (presence or {}).items() if absent_below is not None and value < absent_below]
        return found + f"; not here: {', '.join(f'{name} (presence {presence[name]:.2f})' for name in gone)}" * bool(gone)
    if absent_below is not None and presence < absent_below:
        return f"not here (presence {presence:.2f})"
    return f"{100 * row['fraction']:.1f} % of the image" if row["score"] is not None else "nothing found"


def chunks(items: Iterator, size: int) -> Iterator[list]:
    """Lists of at most `size` items."""
    some = []
    for item in items:
        some.append(item)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


if __name__ == "__main__":
    cli.run(main)
