"""COCO JSON as a source: masks are painted as for COCO-20i (util/prepare/coco.py), with the file's own categories."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from util.data.folds import ClassNames, clean_name, read_class_names
from util.errors import UserError
from util.prepare.coco import Labelled, find_images, lost_lines, paint, read_annotations, split_of
from util.prepare.common import absent, each
from util.prepare.custom.sources import CONVERTED, Found, Pair, check_stored, put_label, refuse

Category = tuple[str, str]  # name, supercategory


class Made(NamedTuple):
    """A painted mask, without its pixels: see `util.prepare.coco.Painted`."""

    contested: int
    lost: list[tuple[str, str]]
    shown: bool  # whether it has a pixel of a class


def coco(images: Path, annotations: Sequence[Path], classes: Path, required: bool, out: Path) -> Found:
    """Read one JSON, whose split is drawn, or two with train and val in their names.

    classes: a file with the categories and their order; where it does not exist and is not `required`, all by id.
    """
    if len(annotations) == 1:
        splits = {"": annotations[0]}
    else:
        splits = {split_of(path): path for path in annotations}
        if len(annotations) != 2 or {split[:3] for split in splits} != {"tra", "val"}:
            raise UserError("--annotations: one file, or one with 'train' and one with 'val' in its name")
    categories: dict[Path, list[Category]] = {}
    read = {split: read_annotations(path, split, partial(_ranks, categories)) for split, path in splits.items()}
    first, *others = categories.values()
    if any(other != first for other in others):
        raise UserError(f"{' and '.join(map(str, annotations))} have other categories; their ids and names must be the same")
    used = {annotation.cls for labelled, _ in read.values() for image in labelled for annotation in image.annotations}
    first, groups = _without_groups(annotations[0], first, used)
    own = [name for name in first if name]
    names = read_class_names(classes) if required or classes.is_file() else ClassNames(tuple(own), tuple(own))
    if strange := [name for name in names.names if name not in own]:
        raise UserError(f"{classes}: {', '.join(strange)}: no such category; {annotations[0]} has {', '.join(own)}")

    found = Found(names, [], {})
    found.notes += absent("categories that only group others and have no annotation, no classes", groups)
    found.notes += absent(f"categories not in {classes}, background", [name for name in own if name not in names.names])
    to = [names.names.index(name) + 1 if name in names.names else 0 for name in first]
    wrong: list[str] = []
    lost: list[str] = []
    for split, (labelled, unlabelled) in read.items():
        path, target = splits[split], out / CONVERTED / split
        wanted = [chosen for image in labelled if (chosen := _choose(image, to)).annotations]
        place, there = find_images(images, split, {image.name for image in wanted})
        if empty := unlabelled + len(labelled) - len(wanted):
            found.notes.append(f"{empty:,} images of {path} without an object of these classes, left out")
        found.notes += absent(f"images of {path} that are not in {place}, left out",
                              [image.name for image in wanted if image.name not in there])  # fmt: skip
        jobs = [image for image in wanted if image.name in there]
        made = list(each(partial(_make, path, place, target), jobs, f"masks of {path.name}"))
        wrong += [result for result in made if isinstance(result, str)]
        done = [(image, result) for image, result in zip(jobs, made, strict=True) if isinstance(result, Made)]
        lost += lost_lines(path, [loss for _, result in done for loss in result.lost])
        if contested := sum(result.contested for _, result in done):
            found.notes.append(f"{contested:,} pixels of {path.name} are claimed by several classes; the last annotation wins")
        found.notes += absent(f"images of {path} on which no annotation has a pixel, left out",
                              [image.name for image, result in done if not result.shown])  # fmt: skip
        name = split or "images"
        found.links[name] = place
        part = ("train" if split.startswith("train") else "val") if split else ""
        for image in (image for image, result in done if result.shown):
            label = target / f"{Path(image.name).stem}.png"
            line = f"{name}/{image.name}", label.relative_to(out).as_posix()
            found.pairs.append(Pair(part, place / image.name, label, line))
    refuse(wrong, len(found.pairs) + len(wrong))
    if lost and not found.pairs:
        raise UserError("no annotation has a pixel; needed are outlines (polygons or run lengths), boxes alone are no masks\n"
                        + "\n".join(lost))
    if not found.pairs:
        raise UserError(f"{images}: none of the annotated images is there")
    found.notes += lost
    return found


def _ranks(categories: dict[Path, list[Category]], path: Path, entries: Sequence[dict]) -> dict[int, int]:
    """Map category id to rank 1..n; names and supercategories, by rank, are put into `categories`."""
    ordered = sorted(entries, key=lambda entry: entry["id"])
    categories[path] = [(clean_name(f"{path}: category {entry['id']}", entry["name"]), str(entry.get("supercategory")))
                        for entry in ordered]  # fmt: skip
    return {entry["id"]: rank for rank, entry in enumerate(ordered, start=1)}


def _without_groups(path: Path, categories: Sequence[Category], used: Collection[int]) -> tuple[list[str], list[str]]:
    """Return names by rank, "" for a category without annotations that is the supercategory of others; and their names."""
    names, groups = [], []
    for rank, (name, _) in enumerate(categories, start=1):
        above = any(parent == name for other, (_, parent) in enumerate(categories, start=1) if other != rank)
        group = above and rank not in used
        names.append("" if group else name)
        groups += [name] * group
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise UserError(f"{path}: several categories are called {', '.join(twice)}; give each a name of its own")
    return names, groups


def _choose(image: Labelled, to: Sequence[int]) -> Labelled:
    """Keep the objects of wanted classes, with these classes."""
    return replace(image, annotations=[replace(a, cls=to[a.cls - 1]) for a in image.annotations if to[a.cls - 1]])


def _make(path: Path, place: Path, target: Path, image: Labelled) -> Made | str:
    """Write a mask, or return the fault. The size in the JSON is compared with the image before it takes memory."""
    try:
        check_stored(place / image.name, path, (image.height, image.width))
        painted = paint(path, image)
    except UserError as error:
        return str(error)
    if shown := bool(painted.label.any()):
        put_label(target / f"{Path(image.name).stem}.png", painted.label)
    return Made(painted.contested, painted.lost, shown)
