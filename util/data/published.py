"""`python -m util.data.index --config FILE`: the images of a fold, counted, stored and compared with the published index.

The numbers: spec "PI-CLIP" section 1, Per-fold index.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from util.config import Config, load_config
from util.data.build import Source
from util.data.episodes import EpisodeList, check_novel, episodes_per_class
from util.data.index import MIN_PIXELS, Index, Record, table
from util.experiment import CACHE
from util.files import save_json

LINES = {("pascal", "train"): 5953, ("pascal", "val"): 1449, ("coco", "train"): 82081, ("coco", "val"): 40137}
# Per fold: images, (image, class) pairs; None where no number was published. COCO: interleaved folds.
COUNTS: dict[tuple[str, str], Sequence[tuple[int | None, int | None]]] = {
    ("pascal", "train"): ((4208, 5749), (3726, 4706), (2752, 3044), (4510, 5832)),
    ("pascal", "val"): ((364, 365), (445, 467), (592, 734), (336, 357)),
    ("coco", "train"): ((21917, None), (None, None), (None, None), (None, None)),
    ("coco", "val"): ((26052, None), (15305, 17912), (13138, 14563), (12640, 14315)),
}


def verdict(config: Config, part: str, lines: int, images: int, pairs: int) -> str:
    """One line: is this the published index?

    part: "train" or "val"; lines: images in the list; images, pairs: what the fold has of them. Only the whole list and
    the published rules are compared.
    """
    train = config.Train
    key = (train.data_set, part)
    if key not in COUNTS:
        return f"no counts were published for {train.data_set}"
    if lines != LINES[key]:
        return f"partial list, {lines:,} of {LINES[key]:,} images: not compared with the published index"
    if others := _other_rules(config, part):
        return f"not compared with the published index, which has other rules than {', '.join(others)}"
    published = dict(zip(("images", "pairs"), COUNTS[key][train.split], strict=True))
    known = {name: count for name, count in published.items() if count is not None}
    found = {"images": images, "pairs": pairs}
    if not known:
        return f"no counts were published for fold {train.split} of {train.data_set} {part}"
    wrong = [f"{found[name]:,} {name}, published are {count:,}" for name, count in known.items() if found[name] != count]
    if wrong:
        return f"DIFFERS from the published index: {'; '.join(wrong)}. Check the label folder and the list"
    return f"EQUALS the published index: {', '.join(f'{count:,} {name}' for name, count in known.items())}"


def store(folder: Path, config: Config, part: str, records: Sequence[Record], index: Index, names: Sequence[str]) -> Path:
    """Writes index-DATASET-SPLIT-{train,val}-HASH.json: images, images by class name, and the hash of what they follow from."""
    rules = {"data_set": config.Train.data_set, "split": config.Train.split, "part": part, "classes": list(index.by_class),
             "min_pixels": config.Data.min_pixels, "filter_novel": part == "train" and config.Train.filter_novel}
    inputs = [rules, [(r.image, r.label, sorted(r.pixels.items())) for r in records]]
    digest = blake2b(json.dumps(inputs).encode(), digest_size=8).hexdigest()
    path = folder / f"index-{rules['data_set']}-{rules['split']}-{part}-{digest}.json"
    by_class = {names[c - 1]: [index.records[p].image for p in filed] for c, filed in index.by_class.items()}
    save_json(path, {"hash": digest, **rules, "images": [r.image for r in index.records], "by_class": by_class})
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Both parts of the fold of a config. Raises UserError when a novel class has no episode."""
    parser = argparse.ArgumentParser(prog="python -m util.data.index", description="The images of a fold, counted and stored.")
    parser.add_argument("--config", required=True, help="config/DATASET/DATASET_EXP_NET.yaml")
    parser.add_argument("--arch", default="PI_CLIP", help="system whose recipe counts (default PI_CLIP)")
    parser.add_argument("overrides", nargs="*", metavar="Section.key=value")
    given = parser.parse_intermixed_args(arguments)
    config = load_config(given.config, given.arch, given.overrides)
    source = Source(config, "episodes", CACHE)
    for part in ("train", "val"):
        records, index = source.records(f"{part}_list"), source.index(training=part == "train")
        print(f"\n{config.Train.data_set}, fold {config.Train.split}, {part}: {getattr(config.Data, f'{part}_list')}")
        counts = None
        try:
            if part == "val":
                counts = _episodes(config, source, index)
        finally:  # the table helps to understand an error too
            print(table(index, source.names, counts))
        print(verdict(config, part, len(records), len(index.records), sum(map(len, index.by_class.values()))))
        print(f"stored in {store(CACHE, config, part, records, index, source.names.names)}")


def _episodes(config: Config, source: Source, index: Index) -> Counter[int]:
    """Class -> episodes, of the first seed."""
    test = config.Test_Finetune
    episodes = EpisodeList(index, config.Train.shot, test.seeds[0], start=config.Train.draw)
    check_novel(episodes, source.fold, source.names, test.test_num)
    return episodes_per_class(episodes, test.test_num)


def _other_rules(config: Config, part: str) -> list[str]:
    """The keys that make the index another than the published one."""
    train = config.Train
    rules = {
        f"Data.min_pixels = {config.Data.min_pixels}": config.Data.min_pixels != MIN_PIXELS,
        "Train.filter_novel = false": part == "train" and not train.filter_novel,
        "Train.use_split_coco = false": train.data_set == "coco" and not train.use_split_coco,
    }
    return [text for text, other in rules.items() if other]
