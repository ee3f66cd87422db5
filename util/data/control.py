"""The wrong-support control: the same episodes with supports of another class.

Score minus control is the support gap; it is near zero for a system that takes no notice of its supports.
"""

from collections.abc import Hashable, Sequence


def wrong_supports(classes: Sequence[int], queries: Sequence[Hashable], supports: Sequence[Sequence[Hashable]]) -> list[int]:
    """For each episode of a list the one whose supports (images and masks) replace its own: the next, going round, of another
    class whose supports do not hold the query. -1: there is none, and the episode counts in neither run.

    Args:
        classes, queries, supports: of each episode its class, its query image and its support images.
    """
    n, chosen = len(classes), []
    for i in range(n):
        following = ((i + t) % n for t in range(1, n))
        fits = (j for j in following if classes[j] != classes[i] and queries[i] not in supports[j])
        chosen.append(next(fits, -1))
    return chosen
