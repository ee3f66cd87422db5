"""Image-level labels: which classes an image shows, and not where. What weakly supervised systems learn from."""

import json
from collections.abc import Mapping
from pathlib import Path

from util.data.folds import ClassNames
from util.errors import UserError

Labels = Mapping[str, tuple[int, ...]]  # image, by its path in the list or by its name without folders and ending -> classes


def read_image_labels(path: str | Path, names: ClassNames) -> dict[str, tuple[int, ...]]:
    """Classes (1-based, ascending) of each image that a file names.

    The file is JSON, {IMAGE: [CLASS, ...]}, or text of one image a line, `IMAGE CLASS, CLASS`. IMAGE is the path in the list or
    the name without folders and ending; CLASS a class name or an id, 1 for the first class. An image may have no class.

    Raises:
        UserError: not readable, an image twice, or a class that is not there.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else _lines(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Data.image_labels: {path} cannot be read ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(classes, list) for classes in content.values()):
        raise UserError(f"Data.image_labels: {path}: expected {{IMAGE: [CLASS, ...]}}")
    ids = {image: {_class(cls, f"{path}: {image}", names) for cls in classes} for image, classes in content.items()}
    return {image: tuple(sorted(classes)) for image, classes in ids.items()}


def classes_of(labels: Labels, image: str, source: str | Path) -> tuple[int, ...]:
    """Classes of an image of a list.

    Raises:
        UserError: the file says nothing about it.
    """
    for key in (image, Path(image).stem):
        if key in labels:
            return labels[key]
    raise UserError(f"{source}: no line for {image}; an image without any class still needs one, so that none is forgotten")


def _lines(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        image, _, rest = line.partition(" ")
        if image in found:
            raise ValueError(f"{image} is there twice")
        found[image] = [name for part in rest.split(",") if (name := part.strip())]
    return found


def _class(value: object, where: str, names: ClassNames) -> int:
    if value in names.names:
        return names.names.index(value) + 1
    number = int(value) if isinstance(value, int | str) and str(value).isdecimal() else 0
    if not 1 <= number <= len(names.names):
        raise UserError(f"{where}: {value!r} is no class; give names of the class list, or ids 1..{len(names.names)} (add 1 "
                        "to ids that start at 0)")
    return number
