"""Keep tensors that are worth computing once: in memory up to a number of bytes, and in a folder if one is named.

The key of an entry is a hash of its inputs and weights, so nothing in a cache can be out of date. A file is written beside its
place and then renamed; several processes may do so at once. A damaged file is computed again.
"""

import hashlib
import json
import logging
import random
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from util.errors import UserError
from util.files import save_tensors

CACHE = Path("exp/.cache")  # folder of what runs share: scans of lists, text banks
Entry = dict[str, Tensor]


class TensorCache:
    """Store named tensors by key.


    A full cache drops a random entry. An evaluation reads the same images in turn, so the least recently used entry is the one
    needed next.

    Args:
        budget: bytes kept in memory (where the tensors live: the GPU's memory on a GPU).
        folder: where every entry is kept for later runs; None: nowhere.
    """

    def __init__(self, budget: int, folder: Path | None = None):
        self.budget, self.folder = budget, folder
        self.writable = True
        self.size = self.hits = self.misses = 0
        self._entries: dict[str, Entry] = {}
        self._keys: list[str] = []  # of the entries, in no order
        self._random = random.Random(0)

    def get(self, key: str, device: torch.device) -> Entry | None:
        """Return the entry on a device, or None."""
        entry = self._entries.get(key)
        if entry is None and self.folder is not None and (entry := self._read(key)) is not None:
            entry = {name: tensor.to(device) for name, tensor in entry.items()}
            self._keep(key, entry)
        self.hits += entry is not None
        self.misses += entry is None
        return entry

    def put(self, key: str, entry: Entry) -> Entry:
        """Keep an entry and return a copy of it. (A row of a batch would keep the whole batch in memory.)"""
        entry = {name: tensor.detach().clone() for name, tensor in entry.items()}
        self._keep(key, entry)
        if self.folder is not None and self.writable:
            self._write(key, entry)
        return entry

    def _keep(self, key: str, entry: Entry) -> None:
        if nbytes(entry) > self.budget or key in self._entries:
            return
        while self.size + nbytes(entry) > self.budget:
            at = self._random.randrange(len(self._keys))
            self._keys[at], self._keys[-1] = self._keys[-1], self._keys[at]
            self.size -= nbytes(self._entries.pop(self._keys.pop()))
        self._entries[key] = entry
        self._keys.append(key)
        self.size += nbytes(entry)

    def _path(self, key: str) -> Path:
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, key: str) -> Entry | None:
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                entry = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
                known = file.metadata() or {}
        except (OSError, SafetensorError):
            return None
        return entry if known == {"key": key, "digest": digest(entry)} else None

    def _write(self, key: str, entry: Entry) -> None:
        try:
            save_tensors(self._path(key), entry, {"key": key, "digest": digest(entry)})
        except (OSError, SafetensorError) as error:
            logging.getLogger(__name__).warning("Runtime.cache_dir = %s: cannot be written (%s); this run only reads it",
                                                self.folder, error)  # fmt: skip
            self.writable = False


def open_cache(gigabytes: float, folder: str) -> TensorCache:
    """Return the cache that a config describes.

    Raises:
        UserError: the folder cannot be made.
    """
    if folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Runtime.cache_dir = {folder}: {error.strerror}; choose a folder that can be written") from error
    return TensorCache(int(gigabytes * 2**30), Path(folder) if folder else None)


def nbytes(entry: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in entry.values())


def digest(entry: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and values."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(entry.items()):
        tensor = tensor.detach().cpu().contiguous()
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
