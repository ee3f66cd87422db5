"""Keep tensors that are worth computing once: in memory up to a number of bytes, and in a folder if one is named.

The key of an entry is a hash of its inputs and weights, so nothing in a cache can be out of date. A file is written beside its
place and then renamed; several processes may do so at once. A damaged file is computed again.
"""

import contextlib
import hashlib
import json
import logging
import os
import random
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from util.errors import UserError
from util.files import save_tensors

CGROUP = Path("/sys/fs/cgroup")
FALLBACK = 4 * 2**30  # bytes, where the system does not say what is free
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
        self.size = self.hits = self.misses = self.wanted = 0  # wanted: bytes of all that came, each key once
        self._entries: dict[str, Entry] = {}
        self._keys: list[str] = []  # of the entries, in no order
        self._seen: set[str] = set()
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

    def verdict(self) -> str:
        """Return a message where the budget was too small for what came; "" where it was not."""
        if self.wanted <= self.budget:
            return ""
        needed, given = self.wanted / 2**30, self.budget / 2**30
        return (f"the cache held {given:.1f} GB of {needed:.1f}, the rest was made again: Runtime.cache_gb={needed:.1f} keeps "
                "all in memory, Runtime.cache_dir=FOLDER on a disk")

    def _keep(self, key: str, entry: Entry) -> None:
        if key not in self._seen:
            self._seen.add(key)
            self.wanted += nbytes(entry)
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


def open_cache(gigabytes: float | None, folder: str, device: torch.device, share: float = 0.5) -> TensorCache:
    """Return the cache that a config describes.

    Args:
        gigabytes: of each process; None: a share of the memory that is free, on the CPU divided among the processes.
        device: where the tensors live; share: smaller where a training will need memory, too.
    Raises:
        UserError: the folder cannot be made.
    """
    if folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Runtime.cache_dir = {folder}: {error.strerror}; choose a folder that can be written") from error
    if gigabytes is None:
        processes = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun sets it
        budget = int(share * free_memory(device) / processes)
    else:
        budget = int(gigabytes * 2**30)
    return TensorCache(budget, Path(folder) if folder else None)


def free_memory(device: torch.device) -> int:
    """Return the bytes of memory that are free: the GPU's, or the machine's within the limit of a container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # no Linux
        return FALLBACK
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit, and many machines have none
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free


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
