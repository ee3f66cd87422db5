"""Episodes as a text file, so that other codebases can be compared on the same ones.

    # format: episodes 1
    # shot: 1
    321 6 JPEGImages/2007_000032.jpg JPEGImages/2007_000129.jpg

Header lines `# key: value`, then one episode a line: seed, class (1-based), query, one support per shot; images as
Data.val_list names them. The episodes of a seed are numbered from 0 in the order in which they appear.
Written by `python -m util.data export`, evaluated by `test.py --episodes FILE`.
"""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType

from util.data.episodes import EpisodeList, EpisodeSpec
from util.data.folds import shown
from util.data.index import Index, Record, build_index
from util.errors import UserError
from util.files import atomic

FORMAT = "episodes 1"
HASH = "episodes hash"  # header line; checked where it is there


class ManifestEpisodes:
    """The episodes of one seed from a file; an evaluation takes it as it takes `util.data.episodes.EpisodeList`.

    index: the images that the file names, in list order; len(): number of episodes.
    """

    def __init__(self, index: Index, shot: int, seed: int, specs: Sequence[EpisodeSpec]) -> None:
        self.index, self.shot, self.seed, self._specs = index, shot, seed, tuple(specs)

    def __len__(self) -> int:
        return len(self._specs)

    def spec(self, i: int) -> EpisodeSpec:
        if not 0 <= i < len(self):
            raise IndexError(f"the manifest has {len(self)} episodes of seed {self.seed}; there is no episode {i}")
        return self._specs[i]


AnyEpisodes = EpisodeList | ManifestEpisodes


def episode_hash(lists: Mapping[int, AnyEpisodes], count: int | None = None) -> str:
    """Hash seed, class, query and supports of each seed's first `count` episodes (None: all of a manifest), 16 hex digits.

    The hash is that of the episode lines of a manifest, so an exported file has the same one, in any order of the seeds.
    """
    digest = blake2b(digest_size=8)
    for line in _lines(lists, count):
        digest.update(line.encode())
    return digest.hexdigest()


def write_manifest(path: str | Path, header: Mapping[str, str], lists: Mapping[int, AnyEpisodes], count: int | None) -> None:
    """Write the first `count` episodes of each seed, seeds ascending; the file appears whole or not at all."""
    with atomic(Path(path)) as temporary:
        temporary.write_text(manifest_text(header, lists, count), encoding="utf-8")


def manifest_text(header: Mapping[str, str], lists: Mapping[int, AnyEpisodes], count: int | None) -> str:
    """Return the text that `write_manifest` writes."""
    head = {"format": FORMAT, **header, HASH: episode_hash(lists, count)}
    return "".join([*(f"# {key}: {value}\n" for key, value in head.items()), *_lines(lists, count)])


def read_manifest(path: str | Path, records: Sequence[Record], classes: Sequence[int], shot: int,
                  repeats: bool = False, names: tuple[str, ...] = (), of: Mapping[str, object] = MappingProxyType({})
                  ) -> dict[int, ManifestEpisodes]:  # fmt: skip
    """Read the episodes of each seed, seeds in order of appearance.

    records: of Data.val_list (`util.data.index.scan`); classes: the fold's novel ones; shot: Train.shot;
    repeats: a support may occur twice; names: of all classes, for messages; of: header lines that must have these values where
    they are there.
    Raises UserError, naming file and line, for an episode that cannot be evaluated or would silently count as zero.
    """
    path, places = Path(path), {record.image: i for i, record in enumerate(records)}
    seeds: dict[int, list[tuple[int, list[int]]]] = {}  # seed -> (class, positions in `records`: query, supports)
    header: dict[str, str] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            if line.startswith("#"):
                _read_header(line, header, {"shot": shot, **of}, bool(seeds))
            elif line.strip():
                seed, cls, images = _read_episode(line, records, places, classes, shot, repeats, names)
                seeds.setdefault(seed, []).append((cls, images))
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from error
    if not seeds:
        raise UserError(f"{path}: no episode in it; expected lines `seed class query support [support ...]`")

    named = sorted({i for episodes in seeds.values() for _, images in episodes for i in images})
    index = build_index([records[i] for i in named], classes, False, 1, names)  # keeps all: each shows its class
    at = {i: position for position, i in enumerate(named)}
    lists = {
        seed: ManifestEpisodes(index, shot, seed, [
            EpisodeSpec(number, at[query], cls, tuple(at[s] for s in supports))
            for number, (cls, (query, *supports)) in enumerate(episodes)
        ])
        for seed, episodes in seeds.items()
    }  # fmt: skip
    if header.get(HASH) not in (None, found := episode_hash(lists)):
        raise UserError(f"{path}: its header has the {HASH} {header[HASH]}, its episodes have {found}: it was changed or is "
                        "cut off. Fetch it again, or drop that header line if the change is meant")
    return lists


def _lines(lists: Mapping[int, AnyEpisodes], count: int | None) -> Iterator[str]:
    """Yield the episode lines of a manifest."""
    for seed, episodes in sorted(lists.items()):
        for i in range(len(episodes) if count is None else count):
            spec = episodes.spec(i)
            names = (episodes.index.records[p].image for p in (spec.query, *spec.supports))
            yield f"{seed} {spec.cls} {' '.join(names)}\n"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); `python -m util.data export` writes one") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from error


def _read_header(line: str, header: dict[str, str], expected: Mapping[str, object], late: bool) -> None:
    """Add `# key: value` to the header."""
    key, colon, value = (part.strip() for part in line[1:].partition(":"))
    if not key or not colon or late:
        raise UserError(f"expected `# key: value` lines before the first episode, got {line!r}")
    if key in header:
        raise UserError(f"the header has {key!r} twice")
    if key == "format" and value != FORMAT:
        raise UserError(f"the format is {value!r}; this program reads {FORMAT!r}")
    if key in expected and value != str(expected[key]):
        raise UserError(f"the episodes are of {key} {value}, the config has {expected[key]}: Train.{key.replace(' ', '_')}")
    header[key] = value


def _read_episode(
    line: str, records: Sequence[Record], places: Mapping[str, int], classes: Sequence[int], shot: int, repeats: bool,
    names: Sequence[str],
) -> tuple[int, int, list[int]]:
    """Parse seed, class, and the positions of query and supports in `records`."""
    try:
        seed, cls = (int(field) for field in line.split()[:2])
    except ValueError:
        raise UserError(f"expected `seed class query support [support ...]`, got {line!r}") from None
    images = line.split()[2:]
    if len(images) != shot + 1:
        raise UserError(f"expected a query and {shot} support{'s' * (shot != 1)} (Train.shot = {shot}), got {len(images)} images")
    if cls not in classes:
        raise UserError(f"class {shown([cls], names)} is not one of the fold's novel classes, {shown(classes, names)} "
                        "(Train.split)")
    for i, image in enumerate(images):
        if image not in places:
            raise UserError(f"the image {image} is not in Data.val_list")
        if image in images[: min(i, 1) if repeats else i]:
            raise UserError(f"the image {image} is there twice; query and supports must be different images")
        if cls not in records[places[image]].pixels:
            role = "support" if i else "query"
            raise UserError(f"the label of the {role} {image} has no pixel of class {shown([cls], names)}: "
                            "the episode would count nothing")
    return seed, cls, [places[image] for image in images]
