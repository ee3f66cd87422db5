"""COCO JSON as a source: masks are painted as for COCO-20i (util/prepare/coco.py), with the file's own categories."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from util.data.folds import ClassNames, read_class_names
from util.errors import UserError
from util.prepare.coco import Labelled, find_images, paint, read_annotations, split_of
from util.prepare.common import absent, each
from util.prepare.custom.sources import CONVERTED, Found, Pair, put_label


def coco(images: Path, annotations: Sequence[Path], classes: Path, required: bool, out: Path) -> Found:
    """One JSON, whose split is drawn, or two, whose names say train and val.

    classes: which categories, in which order; where the file is not there and not `required`, all by id.
    """
    if len(annotations) == 1:
        splits = {"": annotations[0]}
    else:
        splits = {split_of(path): path for path in annotations}
        if len(annotations) != 2 or {split[:3] for split in splits} != {"tra", "val"}:
            raise UserError("--annotations: one file, or one with 'train' and one with 'val' in its name")
    categories: dict[Path, list[str]] = {}
    read = {split: read_annotations(path, split, partial(_ranks, categories)) for split, path in splits.items()}
    first, *others = categories.values()
    if any(other != first for other in others):
        raise UserError(f"{' and '.join(map(str, annotations))} have other categories; their ids and names must be the same")
    names = read_class_names(classes) if required or classes.is_file() else ClassNames(tuple(first), tuple(first))
    if strange := [name for name in names.names if name not in first]:
        raise UserError(f"{classes}: {', '.join(strange)}: no such category; {annotations[0]} has {', '.join(first)}")

    found = Found(names, [], {})
    found.notes += absent(f"categories not in {classes}, background", [name for name in first if name not in names.names])
    to = [names.names.index(name) + 1 if name in names.names else 0 for name in first]
    for split, (labelled, unlabelled) in read.items():
        wanted = [chosen for image in labelled if (chosen := _choose(image, to)).annotations]
        place, there = find_images(images, split, {image.name for image in wanted})
        if empty := unlabelled + len(labelled) - len(wanted):
            found.notes.append(f"{empty:,} images of {splits[split]} without an object of these classes, left out")
        found.notes += absent(f"images of {splits[split]} that are not in {place}, left out",
                              [image.name for image in wanted if image.name not in there])  # fmt: skip
        jobs = [image for image in wanted if image.name in there]
        target = out / CONVERTED / split
        list(each(partial(_make, splits[split], target), jobs, f"masks of {splits[split].name}"))
        name = split or "images"
        found.links[name] = place
        for image in jobs:
            stem = Path(image.name).stem
            part = ("train" if split.startswith("train") else "val") if split else ""
            label = target / f"{stem}.png"
            line = f"{name}/{image.name}", label.relative_to(out).as_posix()
            found.pairs.append(Pair(part, place / image.name, label, line))
    if not found.pairs:
        raise UserError(f"{images}: none of the annotated images is there")
    return found


def _ranks(categories: dict[Path, list[str]], path: Path, entries: Sequence[dict]) -> dict[int, int]:
    """Category id -> rank 1..n; the names, by rank, go to `categories`."""
    ordered = sorted(entries, key=lambda entry: entry["id"])
    names = [entry["name"] for entry in ordered]
    if wrong := [name for name in names if not isinstance(name, str) or not name.strip() or "|" in name or names.count(name) > 1]:
        raise UserError(f"{path}: category names {wrong}: each must be a text of its own, without '|'")
    categories[path] = names
    return {entry["id"]: rank for rank, entry in enumerate(ordered, start=1)}


def _choose(image: Labelled, to: Sequence[int]) -> Labelled:
    """Only the objects of wanted classes, with these classes."""
    return replace(image, annotations=[replace(a, cls=to[a.cls - 1]) for a in image.annotations if to[a.cls - 1]])


def _make(path: Path, target: Path, image: Labelled) -> None:
    put_label(target / f"{Path(image.name).stem}.png", paint(path, image)[0])
