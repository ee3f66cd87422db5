"""The wrong-support control: the same episodes with supports of another class.

Score minus control is the support gap. It is near zero for a system that ignores its supports.
"""

from collections.abc import Hashable, Sequence

from torch.utils.data import Dataset

from util.data.episodes import Episode, EpisodeDataset


def wrong_supports(classes: Sequence[int], queries: Sequence[Hashable], supports: Sequence[Sequence[Hashable]]) -> list[int]:
    """Choose for each episode another one whose supports (images and masks) replace its own.

    It is the next in the list, going round, of another class and without the query among its supports. -1: there is none, and the
    episode counts in neither run.

    Args:
        classes, queries, supports: class, query image and support images of each episode.
    """
    n, chosen = len(classes), []
    for i in range(n):
        following = ((i + t) % n for t in range(1, n))
        fits = (j for j in following if classes[j] != classes[i] and queries[i] not in supports[j])
        chosen.append(next(fits, -1))
    return chosen


class WrongSupports(Dataset):
    """The episodes 0..count-1 of a data set once more, each with the supports of another class: images and masks.

    All else is right: number, query, class and its name. Episodes without such supports are left out.
    """

    def __init__(self, data: EpisodeDataset, count: int) -> None:
        specs = [data.episodes.spec(i) for i in range(count)]
        chosen = wrong_supports([s.cls for s in specs], [s.query for s in specs], [s.supports for s in specs])
        self.data, self.pairs = data, [(i, j) for i, j in enumerate(chosen) if j >= 0]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, k: int) -> Episode:
        return self.data.swapped(*self.pairs[k])
