"""Does a system look at its examples? Scores with the right example, and with one of another class in its place.

    python -m bench.supports --voc data/VOCdevkit/VOC2012 [--weights photos] [--episodes 100]

Novel classes of the checkpoint's fold, images of lists/pascal_mini/val.txt; queries do not show the other class.
"""

import argparse
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from model.predict.predictor import Predictor
from util import cli
from util.data.episodes import mask_table
from util.data.index import MIN_PIXELS, read_list
from util.data.transforms import read_label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, required=True, metavar="DIR")
    parser.add_argument("--weights", default="photos")
    parser.add_argument("--episodes", type=int, default=100)
    given = parser.parse_args()
    predictor = Predictor.from_checkpoint(given.weights)
    novel, rng = predictor.fold.novel, random.Random(0)
    pairs = read_list("lists/pascal_mini/val.txt")
    labels = [read_label(given.voc / label) for _, label in pairs]
    showing = {c: [i for i, label in enumerate(labels) if (label == c).sum() >= MIN_PIXELS] for c in novel}

    def find(support: int, cls: int, query: int) -> np.ndarray:
        mask = Image.fromarray(mask_table(cls)[labels[support]], "P")
        predictor.set_support(given.voc / pairs[support][0], mask, predictor.names.texts[cls - 1])
        return predictor.predict(given.voc / pairs[query][0]).mask

    counts, agree = {"right": defaultdict(list), "other": defaultdict(list)}, []
    for n in range(given.episodes):
        c = novel[n % len(novel)]
        other = rng.choice([x for x in novel if x != c])
        query = rng.choice([i for i in showing[c] if i not in showing[other]])
        right = rng.choice([i for i in showing[c] if i != query])
        wrong = rng.choice([i for i in showing[other] if i not in showing[c]])
        found = {"right": find(right, c, query), "other": find(wrong, other, query)}
        counted, truth = labels[query] != 255, labels[query] == c
        for name, mask in found.items():
            counts[name][c].append(((mask & truth & counted).sum(), ((mask | truth) & counted).sum()))
        agree.append((found["right"] & found["other"]).sum() / max(1, (found["right"] | found["other"]).sum()))
    for name, classes in counts.items():
        ious = [100 * np.divide(*np.sum(values, 0)) for values in classes.values()]
        print(f"example of the {name} class: mIoU {np.mean(ious):.2f}")
    print(f"IoU between the two masks of a query: {np.mean(agree):.2f}")


if __name__ == "__main__":
    cli.run(main)
