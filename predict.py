"""Segment your own images: what the supports show, and the text names, is found in every query. Or label every pixel.

    python predict.py --support a.jpg --mask a.png --query photos/ --out DIR

    --support b.jpg --box 10,20,200,300     a box x0,y0,x1,y1 in pixels instead of a mask; several --box for one support
    --weights W --text "golden retriever"   another system than the small network that comes along; PI-CLIP reads a name, too
    --weights imr_hsnet.safetensors --text dog --support a.jpg     examples without masks, where the system needs none (IMR-HSNet)
    --clip --text cat                       no training at all: rough masks from OpenAI's CLIP, which is downloaded, and words
    --clip demo/clip --text star            the same with the demo's CLIP, for the drawn world
    --tile 500                              large pictures through overlapping windows of 500 pixels, for small things in them
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
from pathlib import Path
from typing import Any

from model.predict.dense_predictor import DensePredictor, Labelling, load_predictor, read_classes
from model.predict.predictor import Predictor, find_weights
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
    else:
        predictor.set_support(photos, masks, given.text, boxes)
        names, ious = [given.text or "object"], predictor.check()
        asked = {"text": given.text, "supports": given.support, "found_in_supports": [round(iou, 4) for iou in ious]}
    notes, left_out = [*predictor.notes, *([WEAK] if min(ious, default=1) < POOR else [])], [str(p) for p in others(given.query)]
    record = {"weights": weights and str(weights), "clip": given.clip, **asked, "device": str(predictor.device),
              "precision": predictor.precision, "notes": notes, "left_out": left_out}  # fmt: skip
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
            for stem, photo, found in predictions(predictor, some, results):
                if isinstance(found, Labelling):
                    row = results.add_labels(stem, photo, found.label, found.score, predictor.classes, found.seconds)
                else:
                    row = results.add(stem, photo, found.mask, found.score, found.seconds)
                print(f"{photo.name}: {shares(row)}  ({found.seconds:.2f} s)")
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


def predictions(predictor: Predictor | DensePredictor | TextPredictor, some: Sequence[tuple[str, Photo]], results: Results
                ) -> Iterator[tuple[str, Photo, Segmentation | Labelling]]:  # fmt: skip
    """Yield stem, photo and result of each; a photo that a dense system cannot label is reported as one that cannot be read."""
    if not isinstance(predictor, DensePredictor):
        for (stem, photo), found in zip(some, predictor.predict_batch([photo for _, photo in some]), strict=True):
            yield stem, photo, found
        return
    for stem, photo in some:
        try:
            found = predictor.predict(photo)
        except UserError as error:
            print(f"skipped: {error}")
            results.unread(photo.name, str(error))
        else:
            yield stem, photo, found


def shares(row: Mapping[str, Any]) -> str:
    """Say what an entry of scores.json found, and how much of the image it is."""
    if "classes" in row:
        return ", ".join(f"{found['class']} {100 * found['fraction']:.1f} %" for found in row["classes"])
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
