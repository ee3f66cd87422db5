"""The published counts of each fold's images, and the comparison with ours (`python -m util.data index`).

The numbers: spec "PI-CLIP" section 1, Per-fold index.
"""

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from util.config import Config
from util.data.index import MIN_PIXELS, Index, Record
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
    """Say in one line whether this is the published index.

    part: "train" or "val"; lines: images in the list; images, pairs: those of the fold. Only the whole list and the published
    rules are compared.
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
    """Write index-DATASET-SPLIT-{train,val}-HASH.json: images, images by class name, and the hash of lists and rules."""
    rules = {"data_set": config.Train.data_set, "split": config.Train.split, "part": part, "classes": list(index.by_class),
             "min_pixels": config.Data.min_pixels, "filter_novel": part == "train" and config.Train.filter_novel}
    inputs = [rules, [(r.image, r.label, sorted(r.pixels.items())) for r in records]]
    digest = blake2b(json.dumps(inputs).encode(), digest_size=8).hexdigest()
    path = folder / f"index-{rules['data_set']}-{rules['split']}-{part}-{digest}.json"
    by_class = {names[c - 1]: [index.records[p].image for p in filed] for c, filed in index.by_class.items()}
    save_json(path, {"hash": digest, **rules, "images": [r.image for r in index.records], "by_class": by_class})
    return path


def _other_rules(config: Config, part: str) -> list[str]:
    """Return the keys whose values make the index differ from the published one."""
    train = config.Train
    rules = {
        f"Data.min_pixels = {config.Data.min_pixels}": config.Data.min_pixels != MIN_PIXELS,
        "Train.filter_novel = false": part == "train" and not train.filter_novel,
        "Train.use_split_coco = false": train.data_set == "coco" and not train.use_split_coco,
    }
    return [text for text, other in rules.items() if other]
