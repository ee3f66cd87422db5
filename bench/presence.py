"""Is the thing in the picture at all? How well scores tell queries with the class of the example from queries without it.

    python -m bench.presence --voc data/VOCdevkit/VOC2012 [--weights photos] [--episodes 100]

Each episode has an example of a novel class, a query that shows the class and one that does not, of lists/pascal_mini/val.txt.
AUROC: how often a query with the class has the higher score (0.5: by chance), over all pairs of the classes together. The
threshold is chosen on the episodes of even number, for the most right answers, and tested on those of odd number.
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
    pairs, rng = read_list("lists/pascal_mini/val.txt"), random.Random(0)
    labels = [read_label(given.voc / label) for _, label in pairs]
    novel = predictor.fold.novel
    showing = {c: [i for i, label in enumerate(labels) if (label == c).sum() >= MIN_PIXELS] for c in novel}
    without = {c: [i for i, label in enumerate(labels) if not (label == c).any()] for c in novel}
    scores = defaultdict(lambda: np.zeros((given.episodes, 2)))  # of the query with the class, and of the one without
    for n in range(given.episodes):
        c = novel[n % len(novel)]
        support = rng.choice(showing[c])
        queries = rng.choice([i for i in showing[c] if i != support]), rng.choice(without[c])
        mask = Image.fromarray(mask_table(c)[labels[support]], "P")
        predictor.set_support(given.voc / pairs[support][0], mask, predictor.names.texts[c - 1])
        for column, query in enumerate(queries):
            for name, score in candidates(predictor, given.voc / pairs[query][0]).items():
                scores[name][n, column] = score
    print("| score | AUROC | of each class |\n|---|---|---|")
    for name, both in sorted(scores.items(), key=lambda item: -auroc(item[1])):
        each = ", ".join(f"{predictor.names.names[c - 1]} {auroc(both[i :: len(novel)]):.2f}" for i, c in enumerate(novel))
        print(f"| {name} | {auroc(both):.3f} | {each} |")
    chosen, tested = scores["presence"][::2], scores["presence"][1::2]
    limit = best_threshold(chosen)
    kept, empty = 100 * (tested[:, 0] >= limit).mean(), 100 * (tested[:, 1] < limit).mean()
    print(f"\npresence, threshold {limit:.3f}: {100 * right(chosen, limit):.0f} % right on the episodes that chose it, "
          f"{100 * right(tested, limit):.0f} % on the others (AUROC {auroc(tested):.3f}): {kept:.0f} % of the queries with the "
          f"class are kept, {empty:.0f} % of those without it are left empty")


def candidates(predictor: Predictor, query: Path) -> dict[str, float]:
    """Scores of one query that could tell; beside `presence` they come from the network's probabilities."""
    found = predictor.predict(query)
    ordered = np.sort(found.score.ravel())
    return {"presence": predictor.presence(query), "highest probability": ordered[-1],
            "mean probability of the best 1 %": ordered[-max(1, len(ordered) // 100) :].mean(),
            "mean probability in the mask": found.score[found.mask].mean() if found.mask.any() else 0,
            "share of the mask": found.mask.mean(), "highest prior": max(map(np.max, found.maps.values()))}  # fmt: skip


def auroc(scores: np.ndarray) -> float:
    """scores: N 2, of queries with the class and of queries without it."""
    there, absent = scores[:, :1], scores[:, 1]
    return float((there > absent).mean() + (there == absent).mean() / 2)


def right(scores: np.ndarray, limit: float) -> float:
    return float(np.mean([scores[:, 0] >= limit, scores[:, 1] < limit]))


def best_threshold(scores: np.ndarray) -> float:
    """Return the threshold of the most right answers; of several, the middle one."""
    values = np.unique(scores)
    limits = (values[1:] + values[:-1]) / 2
    shares = np.array([right(scores, limit) for limit in limits])
    best = limits[shares == shares.max()]
    return float(best[len(best) // 2])


if __name__ == "__main__":
    cli.run(main)
