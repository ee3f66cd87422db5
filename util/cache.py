"""Tensors that are worth computing once: in memory up to a number of bytes, and in a folder where one is named.

Entries are keyed by content (what goes in, and which weights), so nothing in a cache can be out of date. Files are written
beside their place and renamed, which several processes may do at once; a damaged one is computed again.
"""

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from util.errors import UserError
from util.files import save_tensors

Entry = dict[str, Tensor]


class TensorCache:
    """Named tensors by key, the least recently used leaving first.

    Args:
        budget: bytes kept in memory (where the tensors live: the GPU's memory on a GPU).
        folder: keeps every entry for later runs; None: none is kept.
    """

    def __init__(self, budget: int, folder: Path | None = None):
        self.budget, self.folder = budget, folder
        self.size = self.hits = self.misses = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def get(self, key: str, device: torch.device) -> Entry | None:
        """The entry on a device, or None."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        elif self.folder is not None and (entry := self._read(key)) is not None:
            entry = {name: tensor.to(device) for name, tensor in entry.items()}
            self._keep(key, entry)
        self.hits += entry is not None
        self.misses += entry is None
        return entry

    def put(self, key: str, entry: Entry) -> Entry:
        """Keeps an entry and returns it in a memory of its own (a row of a batch would keep the batch alive)."""
        entry = {name: tensor.detach().clone() for name, tensor in entry.items()}
        self._keep(key, entry)
        if self.folder is not None:
            self._write(key, entry)
        return entry

    def _keep(self, key: str, entry: Entry) -> None:
        if nbytes(entry) > self.budget:
            return
        self._entries[key] = entry
        self.size += nbytes(entry)
        while self.size > self.budget:
            _, oldest = self._entries.popitem(last=False)
            self.size -= nbytes(oldest)

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
            logging.getLogger(__name__).warning("Runtime.cache_dir = %s: cannot be written (%s); this run goes on without it",
                                                self.folder, error)  # fmt: skip
            self.folder = None


def open_cache(gigabytes: float, folder: str) -> TensorCache:
    """The cache that a config asks for.

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
