"""Data sets that few-shot systems are only tested on (spec "protocols" section 5): a list of pairs (image, class) each.

    python -m util.prepare fss --from DIR_OR_ARCHIVE     likewise isic, lung, suim, deepglobe, isaid, pascal_part, paco_part, lvis

What counts is what the source says: one line of the list and one label for each of its masks. So an image with several classes is
there several times, under images/CLASS, which is a link to the source; masks that overlap do not hide each other. A label has its
class, 0 and, in iSAID, 255. Nothing is downloaded, the source is only read. `FACTS` has what is known of each data set.
"""

import shutil
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from util.data.transforms import IGNORE, check_sizes, image_hw, open_image, read_label
from util.errors import UserError
from util.prepare.common import each, is_done, link, settle, write_label, write_list
from util.prepare.layouts import Found, Pair, deepglobe, fss, isaid, isic, lung, suim
from util.prepare.parts import lvis, paco_part, pascal_part, rasterise

Counts = Mapping[str, int]


@dataclass(frozen=True)
class Facts:
    """What is known of a data set.

    find      (folder of the source, variant) -> what is in it, by the name of the part that has lists of its own ("": one list)
    variants  name -> the counts that make it this variant, as `tally` counts; what the source has names it
    choices   variants that `find` must be told
    """

    find: Callable[[Path, str], dict[str, Found]]
    variants: Mapping[str, Counts]
    choices: tuple[str, ...] = field(default=("",))


FACTS = {
    "fss": Facts(fss, {"FSS-1000, 240 test classes": {"masks": 2400, "classes": 240}}),
    "isic": Facts(isic, {"2018": {"masks": 2594, "nevus": 1867, "melanoma": 519, "seborrheic keratosis": 208}}),
    "lung": Facts(lung, {"566": {"masks": 566}, "704": {"masks": 704}}, ("", "566", "704")),
    "suim": Facts(suim, {"train and test": {"images": 1635}}),
    "deepglobe": Facts(deepglobe, {"5666": {"images": 5666}, "9174": {"images": 9174}}),
    "isaid": Facts(isaid, {"iSAID-5i": {"fold 0": 3108, "fold 1": 3657, "fold 2": 3298, "to train on": 28232},
                            "iSAID-5i without training": {"fold 0": 3108, "fold 1": 3657, "fold 2": 3298, "to train on": 0}}),
    "pascal_part": Facts(pascal_part, {"PASCAL-Part": {"classes": 56, "fold 1": 959}}),
    "paco_part": Facts(paco_part, {"PACO-Part": {"parts": 4}}),
    "lvis": Facts(lvis, {"1shot": {"classes": 920}, "5shot": {"classes": 680}}, ("1shot", "5shot")),
}


def prepare(data_set: str, source: Path, out: Path | None, lists: Path, variant: str, partial: bool) -> None:
    """Make `out` a data root (default data/NAME) and write `lists`/{val,classes}.txt and folds.yaml.

    Raises:
        UserError: the source is no such data set, or (without `partial`) its counts are of no known variant, or not of `variant`.
    """
    facts, out = FACTS[data_set], out or Path("data") / data_set
    variant = variant or facts.choices[0]
    if variant not in ("", *facts.choices, *facts.variants):
        known = ", ".join(sorted({*facts.variants, *facts.choices} - {""}))
        raise UserError(f"--variant {variant}: of {data_set} there are {known}")
    root = open_folder(source, out)
    found = facts.find(root, variant)
    counts = tally(found)
    known = {variant: facts.variants[variant]} if variant else facts.variants
    named = next((name for name, numbers in known.items() if all(counts[what] == n for what, n in numbers.items())), "")
    missing = [line for part in found.values() for line in part.missing]
    if not named:
        have = shown({what: counts[what] for numbers in known.values() for what in numbers})
        missing.append(f"{source} has {have}; {'; '.join(f'{name} has {shown(numbers)}' for name, numbers in known.items())}")
    settle(missing, partial)
    named = "" if missing else named
    if empty := [name or data_set for name, part in found.items() if not part.pairs]:
        raise UserError(f"{source}: no image and mask of {', '.join(empty)}; nothing to prepare")
    for name, part in found.items():
        write(part, root, out, name, lists / name, f"{data_set}, " + (f"variant {named}" if named else "a part"))
    print(f"{data_set}, {f'variant {named}' if named else 'a part of it'}: "
          + ", ".join(f"{counts[what]:,} {what}" for what in ("images", "masks", "classes")))


def shown(counts: Counts) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())


def tally(found: Mapping[str, Found]) -> Counter[str]:
    """Count images, masks, pairs to train on, classes, parts, and the masks of each class and of each fold, by their names."""
    counts = Counter(parts=len(found), classes=sum(len(part.classes) for part in found.values()))
    for part in found.values():
        counts["images"] += len({pair.image.stem for pair in part.pairs})
        counts["masks"] += len(part.pairs)
        counts["to train on"] += len(part.train)
        for pair in part.pairs:
            counts[part.classes[pair.cls - 1]] += 1
        for number, members in enumerate(part.folds):
            counts[f"fold {number}"] += sum(part.classes[pair.cls - 1] in members for pair in part.pairs)
    return counts


def open_folder(source: Path, out: Path) -> Path:
    """Return the folder of a source; an archive is unpacked to OUT/source, whole or not at all, unless it is there already."""
    if source.is_dir():
        return source
    if not source.is_file():
        raise UserError(f"--from {source}: no such folder or archive")
    folder = out / "source"
    if folder.is_dir():
        print(f"{folder} is there already and is read; delete it to unpack {source} again")
        return folder
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as temporary:
        unpacked = Path(temporary, "source")
        try:
            if zipfile.is_zipfile(source):
                shutil.unpack_archive(source, unpacked, "zip")  # which passes over paths that lead out
            else:
                with tarfile.open(source) as tar:
                    tar.extractall(unpacked, filter="data")  # which refuses them
        except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError, RuntimeError) as error:
            raise UserError(f"{source}: damaged, or no zip or tar archive ({error}); download it again, or give the folder that "
                            "it unpacks to") from error
        unpacked.rename(folder)
    return folder


def write(found: Found, root: Path, out: Path, name: str, lists: Path, title: str) -> None:
    """Write labels (and crops) and links to the images under out / name, then the lists, whose paths begin at `out`."""
    jobs, lines = [], []
    for pair in [*found.pairs, *found.train]:
        inner, cls, kind = pair.image.relative_to(root), f"{pair.cls:03d}", "crops" if pair.box else "images"
        image = Path(name, kind, cls, inner.with_suffix(".png") if pair.box else inner).as_posix()
        label = Path(name, "labels", cls, inner.with_suffix(".png")).as_posix()
        if any(character.isspace() for character in image):
            raise UserError(f"{pair.image}: a path must not hold spaces: rename the files, or link them under other names")
        jobs.append((pair, out / image, out / label))
        lines.append((image, label))
    for cls in sorted({pair.cls for pair in [*found.pairs, *found.train] if not pair.box}):
        link(root, out / name / f"images/{cls:03d}")
    written = sum(each(write_pair, jobs, "labels"))
    print(f"{out / name / 'labels'}: {written:,} labels written, {len(jobs) - written:,} were there")
    lists.mkdir(parents=True, exist_ok=True)
    names = [cls if "_" not in cls else f"{cls} | {cls.replace('_', ' ')}" for cls in found.classes]
    (lists / "classes.txt").write_text("".join(f"{line}\n" for line in names), encoding="utf-8")
    folds = [f"split{i}: [{', '.join(map(repr, members))}]\n" for i, members in enumerate(found.folds)]
    (lists / "folds.yaml").write_text(f"# {title}\n" + ("".join(folds) or "all\n"), encoding="utf-8")
    count = len(found.pairs)
    for split, part in (("val", lines[:count]), ("train", lines[count:])):
        if part:
            write_list(lists / f"{split}.txt", part)
            print(f"{lists / split}.txt: {len(part):,} pairs of image and class")


def write_pair(job: tuple[Pair, Path, Path]) -> bool:
    """Write the label of a pair, and its crop; return False where an earlier run did. Raises UserError for a broken mask."""
    pair, crop, target = job
    hw = image_hw(pair.image)
    box = pair.box or (0, 0, hw[1], hw[0])
    if is_done(target, (box[3] - box[1], box[2] - box[0]), IGNORE - 1) and (not pair.box or crop.is_file()):
        return False
    label = rasterise(pair.shapes, hw) * np.uint8(pair.cls) if pair.mask is None else read_mask(pair)
    check_sizes(pair.image, hw, pair.mask or pair.image, label.shape)
    x0, y0, x1, y1 = box
    if pair.box:
        crop.parent.mkdir(parents=True, exist_ok=True)
        open_image(pair.image).convert("RGB").crop(box).save(crop)
    write_label(target, label[y0:y1, x0:x1])
    return True


def read_mask(pair: Pair) -> np.ndarray:
    """Return the label of a mask file: its class where the mask has the pair's value, or is bright; H W uint8."""
    if pair.value:
        values = read_label(pair.mask)
        return np.where(values == pair.value, pair.cls, np.where(values == IGNORE, IGNORE, 0)).astype(np.uint8)
    try:
        grey = np.asarray(open_image(pair.mask).convert("L"))
    except (OSError, ValueError) as error:
        raise UserError(f"{pair.mask}: not a readable mask ({error}); fetch it again") from error
    return np.where(grey >= (128 if grey.max() > 1 else 1), pair.cls, 0).astype(np.uint8)

