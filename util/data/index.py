"""Index of a fold: its images, each listed under the classes that count in it ("PI-CLIP Sec. 1, Per-fold index").

`scan` reads every label once and caches the pixel counts, for all folds. `build_index` applies the rules of one fold.
`python -m util.data index --config FILE` shows the result.
"""

import hashlib
import json
import logging
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path, PureWindowsPath

import numpy as np
from tqdm import tqdm

from util.data.folds import ClassNames
from util.data.image_labels import Labels, classes_of
from util.data.transforms import IGNORE, check_sizes, image_hw, read_label
from util.errors import BrokenFile, UserError
from util.files import save_json
from util.pool import cores, parallel

MIN_PIXELS = 2 * 32 * 32
SCAN_VERSION = 1  # raise it when the content of Record changes: old caches are then not read
SERIAL_BELOW = 1000  # a shorter list is read faster than worker processes start (about 1 ms a label)


@dataclass(frozen=True)
class Record:
    """One line of a list file, read. Paths are relative to the data root, classes 1-based."""

    image: str
    label: str
    height: int
    width: int
    pixels: dict[int, int]  # class -> labelled pixels; 0 and 255 left out
    annotated: tuple[int, ...]  # classes of the VOC XML where there is one, else those of the label
    broken: str = ""  # why the image or the label cannot be read (Data.on_error=skip)

    @property
    def known(self) -> bool:
        """Whether the label could be read, so that the classes are known; the image may be broken all the same."""
        return self.height > 0


@dataclass(frozen=True)
class Index:
    """The images of a fold. Positions count within `records`."""

    records: list[Record]
    by_class: dict[int, list[int]]  # class -> ascending positions of the images it counts in
    present: list[tuple[int, ...]]  # the fold's classes in each label, any size
    names: tuple[str, ...] = ()  # of all classes, for messages
    large: dict[int, list[int]] = field(default_factory=dict)  # by_class of supports, where they need more pixels

    @property
    def supports(self) -> dict[int, list[int]]:
        """Class -> ascending positions of the images that may be supports of it."""
        return self.large or self.by_class


def scan(
    data_root: str | Path,
    list_file: str | Path,
    class_names: ClassNames,
    cache_dir: str | Path,
    workers: int | None = None,
    skip: bool = False,
    values: np.ndarray | None = None,
    given: Labels | None = None,
    masks: bool = True,
) -> list[Record]:
    """Read every label (and VOC XML) of a list, in list order.

    Cached under `cache_dir` by the list, the class names and name, size and time of every label and XML.
    `given`: image-level labels, which come before those of an XML. `masks`: False where image-level labels are enough: a line may
    have no label, a label is only opened where nothing else tells the classes, and records have no `pixels`.
    `workers`: processes, by default one a core. `skip`: keep lines whose files are missing or damaged as `broken` records, with a
    warning, so that every other line keeps its place: episodes are drawn over the full list.
    `values`: 256 uint8, label value -> class; None: values are classes.
    Raises UserError for any other fault in the list or the files; it names the first files and counts the rest.
    """
    root, list_file = Path(data_root), Path(list_file)
    if not os.path.isdir(data_root):  # unlike Path.is_dir, no error for a name that cannot be one
        raise UserError(f"Data.data_root: no such folder: {str(data_root)!r}; the paths in the lists start there")
    pairs = read_list(list_file, masks)
    kind = [] if masks and given is None else [masks, sorted((given or {}).items())]
    cache = Path(cache_dir) / f"{list_file.stem}-{_fingerprint(root, pairs, class_names, values, kind)}.json"
    if cache.is_file() and not skip:  # a file may be gone since
        with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):  # damaged: read the labels again
            records = [_from_json(entry) for entry in json.loads(cache.read_text())]
            if len(records) == len(pairs):
                return records

    workers = cores() if workers is None else workers
    read = partial(_try_record, _Reader(root, class_names.names, values, given, masks))
    progress = partial(tqdm, total=len(pairs), desc=f"reading the labels of {list_file.name}", disable=None)
    if workers < 2 or len(pairs) < SERIAL_BELOW:
        records = list(progress(map(read, pairs)))
    else:
        records = list(progress(parallel(read, pairs, workers, chunk=32)))
    broken = [record.broken for record in records if isinstance(record, Record) and record.broken]
    wrong = [str(record) for record in records if isinstance(record, UserError)] or ([] if skip else broken)
    if wrong:
        more = "".join(f"\n{error}" for error in wrong[1:4]) + (f"\n... {len(wrong)} files in all" if len(wrong) > 4 else "")
        raise UserError(f"{wrong[0]}{more}")
    for error in broken:
        logging.getLogger(__name__).warning("%s: left out: %s", list_file.name, error)
    if not broken:
        save_json(cache, [asdict(record) for record in records])
    return records


def _try_record(reader: "_Reader", pair: tuple[str, str]) -> Record | UserError:
    try:
        return reader.record(*pair) if reader.masks else reader.image_record(*pair)
    except UserError as error:
        return error


def read_list(list_file: str | Path, labelled: bool = True) -> list[tuple[str, str]]:
    """Read a list file: one `image_path label_path` a line, relative to the data root, no image twice.

    Unless `labelled` a line may lack the label, which is then "".
    Raises UserError, naming the line, for paths that lead out of the data root or that only Windows understands.
    """
    path = Path(list_file)
    if not os.path.isfile(path):
        raise UserError(f"Data.train_list / Data.val_list: no such list: {str(list_file)!r}; lists/README.md says how to make it")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # some editors put a mark at the start
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from error
    seen: dict[str, int] = {}
    pairs = []
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 and (labelled or len(fields) > 2):
            hint = "; a path must not hold spaces: rename the files, or link them under other names" * (len(fields) > 2)
            raise UserError(f"{path}:{number}: expected `image_path label_path`, got {line!r}{hint}")
        for name in fields:
            if wrong := _wrong_path(name):
                raise UserError(f"{path}:{number}: {name!r} {wrong}; paths are relative to Data.data_root and use /")
        image, label = [*fields, ""][:2]
        if image in seen:
            raise UserError(f"{path}:{number}: {image} is already on line {seen[image]}; remove one")
        seen[image] = number
        pairs.append((image, label))
    if not pairs:
        raise UserError(f"{path}: the list is empty")
    return pairs


def build_index(
    records: Sequence[Record], classes: Sequence[int], only: bool, min_pixels: int = MIN_PIXELS, names: tuple[str, ...] = (),
    support_pixels: int = 0, pairs: Collection[tuple[str, int]] | None = None,
) -> Index:  # fmt: skip
    """Keep the images in which at least one of `classes` counts (has `min_pixels` labelled pixels), and list them by class.

    `classes`: the fold's base (training) or novel (evaluation) classes.
    `only`: BAM's filter, which drops an image whose label has any pixel of another class. Without it BAM's PASCAL mean
    falls from 67.8 to 64.7, so it belongs to the protocol.
    `support_pixels`: from how many on a class counts in a support, 0: as in a query.
    `pairs`: the (image, class) that count, whatever their size: a published list.
    """
    wanted = set(classes)
    index = Index([], {c: [] for c in sorted(wanted)}, [], names)
    for record in records:
        present = tuple(sorted(wanted.intersection(record.pixels)))
        counting = [c for c in present if (record.pixels[c] >= min_pixels if pairs is None else (record.image, c) in pairs)]
        if not counting or (only and len(present) < len(record.pixels)):
            continue
        for c in counting:
            index.by_class[c].append(len(index.records))
        index.records.append(record)
        index.present.append(present)
    if support_pixels:
        index.large.update({c: [i for i in filed if index.records[i].pixels[c] >= support_pixels]
                            for c, filed in index.by_class.items()})  # fmt: skip
    return index


def table(index: Index, class_names: ClassNames, episodes: Mapping[int, int] | None = None) -> str:
    """Format the number of images of each class (and of episodes, class -> number) and the totals, as lines for the log."""

    def row(c: int, images: int) -> str:
        count = "" if episodes is None else f"  {episodes.get(c, 0):6d} episodes"
        return f"{c:4d}  {class_names.names[c - 1]:<16} {images:6d} images{count}"

    pairs = sum(map(len, index.by_class.values()))
    rows = [row(c, len(filed)) for c, filed in index.by_class.items()]
    return "\n".join([*rows, f"{len(index.records)} images, {pairs} (image, class) pairs"])


def _wrong_path(name: str) -> str:
    """Return why a path of a list is refused, or ""."""
    windows = PureWindowsPath(name)  # knows drives, and both kinds of slashes
    if windows.anchor:
        return "is an absolute path"
    if ".." in windows.parts:
        return "leads out of the data root (`..`)"
    return "has a backslash, as Windows writes paths" if "\\" in name else ""


@dataclass(frozen=True)
class _Reader:
    """Makes a record of a line, see `scan`."""

    root: Path
    names: tuple[str, ...]
    values: np.ndarray | None
    given: Labels | None
    masks: bool

    def record(self, image: str, label: str) -> Record:
        try:
            array = read_label(self.root / label)
        except BrokenFile as error:
            return Record(image, label, 0, 0, {}, (), str(error))
        array = array if self.values is None else self.values[array]
        counts = np.bincount(array.ravel(), minlength=IGNORE + 1)
        values = [int(v) for v in np.flatnonzero(counts) if v not in (0, IGNORE)]
        strange = [v for v in values if v > len(self.names)]
        if strange:
            raise UserError(
                f"{self.root / label}: label values {strange} are no class; expected 0..{len(self.names)} and 255 (ignore). "
                "Is it the label of this data set (Train.data_set, Data.data_root), with contiguous class ids?"
            )
        broken = ""
        try:
            check_sizes(self.root / image, image_hw(self.root / image), self.root / label, array.shape)
        except BrokenFile as error:
            broken = str(error)
        annotated = self._annotated(image)
        if annotated is None:
            annotated = tuple(values)
        return Record(image, label, *array.shape, {v: int(counts[v]) for v in values}, annotated, broken)

    def image_record(self, image: str, label: str) -> Record:
        """Without `pixels`; the label is opened where nothing else tells the classes."""
        annotated = self._annotated(image)
        if annotated is not None:
            try:
                return Record(image, label, *image_hw(self.root / image), {}, annotated)
            except BrokenFile as error:
                return Record(image, label, 0, 0, {}, annotated, str(error))
        if not label or not (self.root / label).is_file():
            raise UserError(f"{self.root / image}: nothing tells which classes it shows; needed is a line in Data.image_labels, "
                            f"{_xml_path(self.root, image)}, or a label")
        return replace(self.record(image, label), pixels={})

    def _annotated(self, image: str) -> tuple[int, ...] | None:
        if self.given is not None:
            return classes_of(self.given, image, "Data.image_labels")
        return _annotated(_xml_path(self.root, image), self.names)


def _xml_path(root: Path, image: str) -> Path:
    return root / "Annotations" / f"{Path(image).stem}.xml"


def _annotated(xml: Path, names: tuple[str, ...]) -> tuple[int, ...] | None:
    """Read the classes of the objects of a VOC XML, ascending; None where there is no XML."""
    if not xml.is_file():
        return None
    try:
        found = {obj.findtext("name", "") for obj in ElementTree.parse(xml).getroot().findall("object")}
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the latter two: encodings
        raise UserError(f"{xml}: not a readable VOC annotation ({error}); fetch it again") from error
    unknown = sorted(found.difference(names))
    if unknown:
        raise UserError(f"{xml}: object names {unknown} are not in the class list; correct the list or the XML")
    return tuple(sorted(names.index(name) + 1 for name in found))


def _fingerprint(
    root: Path, pairs: Iterable[tuple[str, str]], class_names: ClassNames, values: np.ndarray | None, kind: Sequence = ()
) -> str:
    """Hash of everything a scan depends on, without opening a label."""
    digest = hashlib.blake2b(repr((SCAN_VERSION, class_names.names, *kind)).encode(), digest_size=16)
    digest.update(b"" if values is None else values.tobytes())
    for image, label in pairs:
        states = []
        for path in (root / label, _xml_path(root, image)):
            try:
                state = path.stat()
                states.append((state.st_size, state.st_mtime_ns))
            except (OSError, ValueError):  # not there, or a name that cannot be one
                states.append(None)
        digest.update(repr((image, label, states)).encode())
    return digest.hexdigest()


def _from_json(entry: dict) -> Record:
    pixels = {int(c): n for c, n in entry["pixels"].items()}
    return Record(**entry | {"pixels": pixels, "annotated": tuple(entry["annotated"])})
