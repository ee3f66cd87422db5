"""HSNet's own lists and episodes, from the folder `data/splits` of its repository (spec "IMR-HSNet" sections 9.2 and 9.5).

    splits/pascal/{trn,val}/fold{0..3}.txt     lines `2007_000032__01`: an image and a class (1-based)
    splits/coco/{trn,val}/fold{0..3}.pkl       a pickled {class, 0-based: [image, ...]}

The published test draws its episodes one after the other from numpy's legacy generator, seed 0. So the order and the length of
every list decide them, and they can only be repeated with these very lists. `python -m util.data hsnet` writes them as a file.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from util.data.episodes import EpisodeSpec
from util.data.index import Index, Record
from util.data.manifest import ManifestEpisodes
from util.data.replay import Candidates, Drawn, by_numpy
from util.errors import UserError
from util.files import atomic, load_plain

COUNT, SEED = 1000, 0  # episodes of the published test
# First 16 hex digits of `digest`, by (data set, shot), fold after fold.
PUBLISHED = {
    ("pascal", 1): ("da65bb259e39dfbb", "222047020aaec8e6", "30675d600de68771", "6348fd304d6a0981"),
    ("pascal", 5): ("2a2bf5c47f1e81e5", "bd5bbcadce27d9bb", "6aaaf829b3036d28", "6008bd6a0137b45d"),
    ("coco", 1): ("8934ade23f0eabc2", "d3697495ca6925dd", "aaafd702128d10f6", "b0a43c0541fca898"),
    ("coco", 5): ("6fa0b70ff6ab88cb", "297c69f83d8800b2", "0f91c1ea16ae0bad", "f33e1c6629e69e8a"),
}


class Pairs(NamedTuple):
    """One list of a fold; images under their names in the file."""

    file: Path
    pairs: list[tuple[str, int]]  # (image, class 1-based), in the order of the file

    def by_class(self) -> dict[int, list[str]]:
        """Return the images of each class, classes in ascending order."""
        found: dict[int, list[str]] = {cls: [] for cls in sorted({cls for _, cls in self.pairs})}
        for image, cls in self.pairs:
            found[cls].append(image)
        return found


def read(splits: Path, data_set: str, part: str, fold: int) -> Pairs:
    """Read one list: part "trn" or "val".

    Raises UserError, naming the file, where it is absent or has another content.
    """
    if data_set not in ("pascal", "coco"):
        raise UserError(f"HSNet has lists of pascal and coco, not of {data_set}")
    path = splits / data_set / part / f"fold{fold}.{'txt' if data_set == 'pascal' else 'pkl'}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give data/splits of HSNet's repository") from error
    pairs = _text(path, content) if data_set == "pascal" else _pickle(path)
    if not pairs:
        raise UserError(f"{path}: no image in it")
    return Pairs(path, pairs)


def draw(listed: Pairs, data_set: str, classes: Sequence[int], shot: int, count: int = COUNT,
         seed: int = SEED) -> list[Drawn[str]]:  # fmt: skip
    """Draw the first `count` episodes as the published test does.

    PASCAL: pair after pair. COCO: a class of `classes`, then an image of it. Supports, other images of the class, may repeat.
    Raises UserError for a class with a single image: the published loop would not end.
    """
    start = "pair" if data_set == "pascal" else "class"
    try:
        return by_numpy(Candidates(listed.pairs, listed.by_class(), classes), start, shot, count, seed)
    except UserError as error:
        raise UserError(f"{listed.file}: {error}") from error


def digest(episodes: Sequence[Drawn[str]]) -> str:
    """Return the first 16 hex digits of the SHA-256 of lines `query|class, 0-based|support...`."""
    return sha256("\n".join("|".join((e.query, str(e.cls - 1), *e.supports)) for e in episodes).encode()).hexdigest()[:16]


def image_name(data_set: str, name: str) -> str:
    """Return the name that our lists have for an image."""
    return f"JPEGImages/{name}.jpg" if data_set == "pascal" else name


def verdict(episodes: Sequence[Drawn[str]], data_set: str, fold: int, shot: int) -> str:
    """Say whether these are the published episodes."""
    found, known = digest(episodes), PUBLISHED.get((data_set, shot))
    if known is None:
        return f"digest {found}; none is known for {shot} shots"
    if found == known[fold]:
        return f"EQUAL to the published episodes (digest {found})"
    return f"DIFFERENT from the published episodes: digest {found}, not {known[fold]}. Are the lists those of the repository?"


def write_training_list(path: Path, splits: Path, data_set: str, fold: int) -> int:
    """Write the images of HSNet's training lists as lines `image label`, sorted; returns their number.

    PASCAL's training lists hold the pairs of the fold's own classes, so those of the other three folds are read. COCO's hold the
    pairs of the base classes.
    """
    folds = [f for f in range(4) if f != fold] if data_set == "pascal" else [fold]
    images = sorted({image for f in folds for image, _ in read(splits, data_set, "trn", f).pairs})
    if data_set == "pascal":
        lines = [f"JPEGImages/{image}.jpg SegmentationClassAug/{image}.png\n" for image in images]
    else:
        lines = [f"{image} annotations/{image.removesuffix('.jpg')}.png\n" for image in images]
    with atomic(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return len(images)


def as_manifest(drawn: Sequence[Drawn[str]], data_set: str, index: Index, shot: int, seed: int = SEED) -> ManifestEpisodes:
    """Look the images up in an index. Raises UserError for one that it does not have."""
    at = {record.image: i for i, record in enumerate(index.records)}

    def place(name: str) -> int:
        try:
            return at[image_name(data_set, name)]
        except KeyError:
            raise UserError(f"the image {image_name(data_set, name)} is not in Data.val_list") from None

    specs = [EpisodeSpec(i, place(e.query), e.cls, tuple(map(place, e.supports))) for i, e in enumerate(drawn)]
    return ManifestEpisodes(index, shot, seed, specs)


def known_pairs(listed: Pairs, data_set: str, records: Sequence[Record], classes: Sequence[int]) -> set[tuple[str, int]]:
    """Return the (image, class) of a list, images as Data.val_list names them.

    Raises UserError for an image that it does not have, and for one whose label lacks the class: a list of another index.
    """
    pixels = {record.image: record.pixels for record in records}
    pairs = [(image_name(data_set, image), cls) for image, cls in listed.pairs]
    for what, wrong in (
        ("name a class that is not novel in this fold", [p for p in pairs if p[1] not in classes]),
        ("name an image that is not in Data.val_list", [p for p in pairs if p[0] not in pixels]),
        ("name an image whose label does not show the class", [p for p in pairs if p[1] not in pixels.get(p[0], (p[1],))]),
    ):
        if wrong:
            raise UserError(f"{listed.file}: {len(wrong):,} of its {len(pairs):,} lines {what}; the first: {wrong[0][0]}, class "
                            f"{wrong[0][1]}. It belongs to another fold or another list")  # fmt: skip
    return set(pairs)


def compare(listed: Pairs, data_set: str, index: Index) -> str:
    """Say how many pairs of image and class only one of both lists has."""
    theirs = {(image_name(data_set, image), cls) for image, cls in listed.pairs}
    ours = {(index.records[i].image, cls) for cls, filed in index.by_class.items() for i in filed}
    return (f"{listed.file}: {len(theirs):,} pairs of image and class; ours {len(ours):,}, "
            f"{len(theirs & ours):,} in both, {len(theirs - ours):,} only there, {len(ours - theirs):,} only here")  # fmt: skip


def _text(path: Path, content: bytes) -> list[tuple[str, int]]:
    pairs = []
    for number, line in enumerate(content.decode("utf-8", "replace").split(), start=1):
        image, separator, cls = line.rpartition("__")
        if not (image and separator and cls.isdigit() and 1 <= int(cls) <= 20):
            raise UserError(f"{path}:{number}: expected a line like 2007_000032__01, got {line[:60]!r}")
        pairs.append((image, int(cls)))
    return pairs


def _pickle(path: Path) -> list[tuple[str, int]]:
    found = load_plain(path)
    if not isinstance(found, dict) or not all(
        isinstance(cls, int) and isinstance(images, list) and all(isinstance(image, str) for image in images)
        for cls, images in found.items()
    ):
        raise UserError(f"{path}: expected {{class: [image, ...]}}")
    return [(image, cls + 1) for cls in sorted(found) for image in found[cls]]
