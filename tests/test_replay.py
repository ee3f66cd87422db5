"""util/data/replay: the draws of published codes, against what these codes draw with, and against digests that never change."""

import random
from hashlib import sha256

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from util.data import replay
from util.data.episodes import EpisodeList
from util.data.index import Index, Record, build_index

CLASSES = (1, 2, 3, 4, 5)


def index(images: int = 37, support_pixels: int = 0) -> Index:
    """Images with one or two classes, some below the smallest object."""
    records = [Record(f"JPEGImages/im{n}.jpg", f"im{n}.png", 60, 60, {1 + n % 5: 3000 + n, 1 + (n * n) % 5: 900 + 200 * n}, ())
               for n in range(images)]  # fmt: skip
    return build_index(records, CLASSES, False, support_pixels=support_pixels)


class Published(Dataset):
    """PFENet's test data as spec "protocols" 2.2 words it (IMG): paths, and Python's own `random`."""

    def __init__(self, index: Index, shot: int) -> None:
        self.images = [record.image for record in index.records]
        self.classes = [sorted(c for c in record.pixels if c in CLASSES) for record in index.records]
        self.filed = {c: [index.records[i].image for i in filed] for c, filed in index.by_class.items()}
        self.shot = shot

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> str:
        query, present = self.images[item], self.classes[item]
        cls = present[random.randint(1, len(present)) - 1]
        chosen, supports = [], []
        for _ in range(self.shot):
            at, support = random.randint(1, len(self.filed[cls])) - 1, query
            while support == query or at in chosen:
                at = random.randint(1, len(self.filed[cls])) - 1
                support = self.filed[cls][at]
            chosen.append(at)
            supports.insert(0, support)  # they are stacked from the last to the first
        return "|".join([query, str(cls), *supports])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("workers", "shot", "seed"), [(1, 1, 321), (3, 5, 510), (8, 1, 988)])
def test_an_image_first_equals_the_loader_of_pytorch(workers: int, shot: int, seed: int) -> None:
    """Several passes over the images, of which each begins with one draw of torch."""
    found = index()
    count = 2 * len(found.records) + 5
    torch.manual_seed(seed)
    loader, published = DataLoader(Published(found, shot), batch_size=1, shuffle=False, num_workers=workers), []
    while len(published) < count:
        published += [episode for (episode,) in loader]
    drawn = replay.by_workers(found, shot, count, seed, workers)
    assert lines(found, drawn) == published[:count]
    assert lines(found, replay.by_workers(found, shot, count, seed, workers + 1)) != published[:count]


def test_a_cycle_is_numpys_choice() -> None:
    found = index()
    np.random.seed(0)
    published = []
    for i in range(200):
        filed = found.by_class[CLASSES[i % 5]]
        query, supports = np.random.choice(filed, 1, replace=False)[0], []
        while len(supports) < 5:
            if (support := np.random.choice(filed, 1, replace=False)[0]) != query:
                supports.append(support)
        published.append((query, CLASSES[i % 5], tuple(supports)))
    candidates = replay.Candidates(EpisodeList(found, 5, 0, start="cycle").pairs, found.by_class, CLASSES)
    assert replay.by_numpy(candidates, "cycle", 5, 200, 0) == published


def test_one_generator_a_fold() -> None:
    """FSS-SAM3: queries of any size, supports of more than 1,000 pixels, all of one generator."""
    found = build_index(index().records, CLASSES, False, min_pixels=1, support_pixels=2500)
    drawn = replay.by_fold(found, CLASSES, 3, 300, 123 + 2)
    pixels = [found.records[i].pixels for i in range(len(found.records))]
    assert min(pixels[e.query][e.cls] for e in drawn) < 2500 <= min(pixels[s][e.cls] for e in drawn for s in e.supports)
    assert all(len({e.query, *e.supports}) == 4 for e in drawn)
    generator = random.Random(125)
    assert [drawn[0].cls, drawn[0].query] == [generator.choice(CLASSES), generator.choice(found.by_class[drawn[0].cls])]


def test_the_draws_never_change() -> None:
    found = index()
    candidates = replay.Candidates(EpisodeList(found, 1, 0, start="pair").pairs, found.by_class, CLASSES)
    draws = {
        "workers": replay.by_workers(found, 1, 1000, 321, 8), "5 shots": replay.by_workers(found, 5, 1000, 510, 16),
        "pair": replay.by_numpy(candidates, "pair", 1, 1000, 0), "class": replay.by_numpy(candidates, "class", 5, 1000, 0),
        "cycle": replay.by_numpy(candidates, "cycle", 1, 600, 0), "fold": replay.by_fold(found, CLASSES, 1, 1000, 1),
    }  # fmt: skip
    digests = {name: sha256("\n".join(lines(found, drawn)).encode()).hexdigest()[:16] for name, drawn in draws.items()}
    assert digests == {"workers": "5d60017842fa8bfe", "5 shots": "a32a315d3f171ca1", "pair": "04396e3f21503c7f",
                       "class": "8a69b56ca3c261d5", "cycle": "2e6ae30dea8d504d", "fold": "6a3725742629dfa5"}  # fmt: skip


def lines(index: Index, drawn: list[replay.Drawn]) -> list[str]:
    return ["|".join([index.records[e.query].image, str(e.cls), *(index.records[s].image for s in e.supports)]) for e in drawn]
