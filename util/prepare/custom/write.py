"""Write lists, folds and configs of a user's data set. Lists follow the images; existing configs are never changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from util.data.folds import NUM_FOLDS, ClassNames
from util.data.index import MIN_PIXELS, read_list
from util.errors import UserError
from util.files import atomic
from util.layers import CONFIGS
from util.prepare.custom.check import PARTS, Seen
from util.prepare.custom.sources import Found

TEMPLATE = CONFIGS / "template"  # base.yaml, recipes/ARCH.yaml, folds/NET.yaml, next_commands_{gpu,cpu}.txt: {name}, {split} vary


@dataclass(frozen=True)
class Places:
    """The files of a data set, relative to the repository."""

    name: str

    @property
    def data(self) -> Path:
        return Path("data") / self.name

    @property
    def lists(self) -> Path:
        return Path("lists") / self.name

    @property
    def classes(self) -> Path:
        return self.lists / "classes.txt"

    @property
    def folds(self) -> Path:
        return self.lists / "folds.yaml"

    @property
    def base(self) -> Path:
        return Path("config") / self.name / "base.yaml"

    def earlier_parts(self) -> dict[str, str]:
        """Return image -> train or val of an earlier run."""
        files = {part: self.lists / f"{part}.txt" for part in PARTS}
        return {image: part for part, file in files.items() if file.is_file() for image, _ in read_list(file)}


def template(name: str | Path) -> str:
    """Return the text of a file of config/template."""
    return (TEMPLATE / name).read_text(encoding="utf-8")


def make_folds(names: ClassNames, count: int | None) -> tuple[str, list[tuple[int, ...]]]:
    """Divide the classes into contiguous folds of nearly equal size; return the text of folds.yaml and the classes."""
    classes = len(names.names)
    count = min(NUM_FOLDS, classes) if count is None else count
    if not 2 <= count <= classes:
        raise UserError(f"--folds {count} with {classes} classes: possible are 2 to {classes}")
    folds = [tuple(map(int, group)) for group in np.array_split(range(1, classes + 1), count)]
    content = {f"split{i}": [names.names[c - 1] for c in fold] for i, fold in enumerate(folds)}
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True, width=10**6), folds


def write(
    places: Places, found: Found, seen: Sequence[Seen], folds_text: str, folds: int, min_pixels: int
) -> tuple[list[Path], list[Path]]:
    """Write lists and new configs; return the written files, and the existing configs that differ from new ones."""
    lists = {places.lists / f"{part}.txt": "".join(f"{s.record.image} {s.record.label}\n" for s in seen if s.part == part)
             for part in PARTS}
    lists[places.classes] = "".join(f"{name}\n" if name == text else f"{name} | {text}\n"
                                    for name, text in zip(found.names.names, found.names.texts, strict=True))
    lists[places.folds] = folds_text
    pixels = "" if min_pixels == MIN_PIXELS else f"  min_pixels: {min_pixels}\n"
    folder, name = places.base.parent, places.name
    configs = {places.base: template("base.yaml").format(name=name, min_pixels=pixels)}
    configs |= {folder / file.name: template(file) for file in sorted(TEMPLATE.glob("recipes/*.yaml"))}
    configs |= {folder / f"{name}_split{split}_{file.stem}.yaml": template(file).format(split=split)
                for file in sorted(TEMPLATE.glob("folds/*.yaml")) for split in range(folds)}
    changed = [path for path, text in (lists | configs).items()
               if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text]  # fmt: skip
    kept = [path for path in changed if path in configs and path.is_file()]
    written = [path for path in changed if path not in kept]
    for path in written:
        with atomic(path) as temporary:
            temporary.write_text((lists | configs)[path], encoding="utf-8")
    return written, kept
