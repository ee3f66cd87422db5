"""Compute the frozen part of an image once: a batch asks for rows, and only new rows are computed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from util.cache import Entry, TensorCache

Compute = Callable[[Sequence[int] | slice], dict[str, Tensor]]  # rows of the batch -> named tensors, one row each


class Memo:
    """Look rows up in a cache.

    On the CPU missing rows are computed one by one. That is as fast, and a row has the same bits in any batch, with and without a
    cache. On a GPU they are computed together.

    Args:
        cache: shared by all systems with the same frozen weights.
        weights: hash of these weights and of the settings that the results depend on.
    """

    def __init__(self, cache: TensorCache, weights: str):
        self.cache, self.weights = cache, weights

    def rows(self, part: str, keys: Sequence[str], device: torch.device, compute: Compute) -> dict[str, Tensor]:
        """Return one row per key, stacked.

        Args:
            part: name of the computation. Part, key and weights together determine the result.
            keys: hash of the content of each row of the batch; none: compute all, keep nothing (training).
        """
        if not keys:
            return compute(slice(None))
        kind = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
        names = [f"{self.weights}/{part}/{kind}/{key}" for key in keys]
        found: dict[str, Entry | None] = {name: self.cache.get(name, device) for name in dict.fromkeys(names)}
        missing = [names.index(name) for name, entry in found.items() if entry is None]
        for rows in [[i] for i in missing] if device.type == "cpu" else [missing] if missing else []:
            made = compute(rows)
            for place, i in enumerate(rows):
                found[names[i]] = self.cache.put(names[i], {name: tensor[place] for name, tensor in made.items()})
        first = found[names[0]]
        return {name: torch.stack([found[key][name] for key in names]) for name in first}
