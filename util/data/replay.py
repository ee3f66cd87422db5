"""The draws of published codes, repeated: `Test_Finetune.generator` chooses one (spec "protocols" sections 2.2 and 2.3).

    workers  Python's `random` in the W processes of PyTorch's loader, an image first: PFENet, BAM, HDMNet, PI-CLIP (W = 8 or 16)
    numpy    numpy's legacy generator, one stream in the main process: HSNet, Matcher, GF-SAM, INSID3, PATNet
    fold     one `random.Random(seed + fold)`, all drawn before the test: FSS-SAM3

Each is a pure function of the candidates, their order included, and the arguments. So the published episodes come out where the
list is the published one in its published order.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from util.data.index import Index
from util.errors import UserError

Item = TypeVar("Item", int, str)  # an image: its position in the index, or its name in a published list


class Drawn(NamedTuple, Generic[Item]):
    """One episode."""

    query: Item
    cls: int  # 1-based
    supports: tuple[Item, ...]


class Candidates(NamedTuple, Generic[Item]):
    """What a draw chooses from, in the order of the lists."""

    pairs: Sequence[tuple[Item, int]]  # (image, class)
    by_class: Mapping[int, Sequence[Item]]
    classes: Sequence[int]


def by_workers(index: Index, shot: int, count: int, seed: int, workers: int) -> list[Drawn[int]]:
    """Draw image after image, as the test of PFENet and its children does.

    In every pass over the images torch draws one 64-bit number from a CPU generator with the seed; worker w seeds its `random`
    with that number + w and serves images w, w + W, ... (This is what PyTorch's DataLoader does without shuffling, and what
    tests/test_replay.py compares it with.) A support is drawn, thrown away, and drawn again until it is another image than the
    query and the supports before; the network sees the supports in reverse order.

    workers: W, the published number; another one gives other episodes.
    """
    base_seeds, drawn = torch.Generator().manual_seed(seed), []
    while len(drawn) < count:
        base = int(torch.empty((), dtype=torch.int64).random_(generator=base_seeds))
        generators = [random.Random(base + worker) for worker in range(workers)]
        for query, present in enumerate(index.present[: count - len(drawn)]):
            generator = generators[query % workers]
            cls = present[generator.randint(1, len(present)) - 1]
            filed, supports = index.supports[cls], []
            for _ in range(shot):
                generator.randint(1, len(filed))
                while (support := filed[generator.randint(1, len(filed)) - 1]) == query or support in supports:
                    pass
                supports.append(support)
            drawn.append(Drawn(query, cls, tuple(reversed(supports))))
    return drawn


def by_numpy(candidates: Candidates[Item], start: str, shot: int, count: int, seed: int) -> list[Drawn[Item]]:
    """Draw as HSNet and its children do: supports, other images of the class, may repeat.

    start: "pair": pair after pair; "class": a drawn class, then an image of it; "cycle": class after class, then an image.
    Raises UserError for a class with a single image: the published loop would not end.
    """
    pairs, by_class, classes = candidates
    generator = np.random.RandomState(seed)

    def choice(values: Sequence) -> object:  # numpy's choice(values, 1, replace=False), without an array of all values
        return values[generator.permutation(len(values))[0]]

    for cls in classes:
        if len(by_class.get(cls, [])) < 2:
            raise UserError(f"class {cls} has {len(by_class.get(cls, []))} image(s), an episode needs two")
    drawn = []
    for i in range(count):
        if start == "pair":
            query, cls = pairs[i % len(pairs)]
        else:
            cls = choice(classes) if start == "class" else classes[i % len(classes)]
            query = choice(by_class[cls])
        supports: list[Item] = []
        while len(supports) < shot:
            if (support := choice(by_class[cls])) != query:
                supports.append(support)
        drawn.append(Drawn(query, cls, tuple(supports)))
    return drawn


def by_fold(index: Index, classes: Sequence[int], shot: int, count: int, seed: int) -> list[Drawn[int]]:
    """Draw a class, a query of it and different supports of it from one `random.Random(seed)`, as FSS-SAM3 does.

    seed: the published seed + fold.
    """
    generator, drawn = random.Random(seed), []
    for _ in range(count):
        cls = generator.choice(classes)
        query = generator.choice(index.by_class[cls])
        others = [support for support in index.supports[cls] if support != query]
        if len(others) < shot:
            raise UserError(f"class {cls} has {len(others)} image(s) large enough beside a query, {shot} shots need as many")
        drawn.append(Drawn(query, cls, tuple(generator.sample(others, shot))))
    return drawn

