"""Safe files: atomic writes, and weights that are read without ever running what is inside them."""

import contextlib
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from util.errors import UserError

NUMBERS = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16,
           torch.int32, torch.int64}  # fmt: skip


def entries(folder: Path) -> list[Path]:
    """List a folder, sorted, without hidden files. (A Mac leaves `._a.jpg` beside `a.jpg`.)"""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def local_path(source: str) -> Path | None:
    """Return the path of a source of weights, `~` expanded; None for a name that is no path (a hub's).

    A name is a path if it exists, begins like a path, or ends like a file of weights.
    """
    path = Path(source)
    if source.startswith("~"):
        with contextlib.suppress(RuntimeError):  # no such user: the path stays as it is, and is missing
            path = path.expanduser()
    is_path = path.exists() or source.startswith((".", "/", "~")) or path.suffix in (".pt", ".pth", ".bin", ".safetensors")
    return path if is_path else None


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder. It replaces `path` when the block succeeds, and is deleted otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn the errors of a failed write into one UserError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} could not be written ({error}). Is the disk full? What was there before is unharmed; make room "
                        "and run the same command again") from error


class _Plain(pickle.Unpickler):
    """Refuses everything but dict, list, str and numbers, so that a foreign file runs no code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_plain(path: Path) -> Any:
    """Read a pickle of plain values. Raises UserError where it is missing, broken, or has anything else in it."""
    try:
        with path.open("rb") as file:
            return _Plain(file).load()
    except Exception as error:  # a broken pickle fails in many ways
        raise UserError(f"{path}: not a pickle of dicts, lists, texts and numbers ({error})") from error


def save_json(path: Path, value: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file."""
    with atomic(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, dict(metadata or {}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except Exception as error:  # lying headers raise many kinds
        damaged = f"{path} is damaged or no safetensors file ({error}); delete it and make or download it again"
        raise UserError(_other_kind(path) or damaged) from error
    return _checked(path, tensors)


def load_state(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from `.safetensors` or from a torch file (`weights_only`: nothing in it is executed).

    Weights nested under "state_dict" or "model", as in published `.pth` files, are taken out; "module." prefixes are dropped.

    Raises:
        UserError: missing, damaged, something other than tensors inside, or tensors larger than the file.
    """
    return load_published(path)[0]


def load_published(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Reads a state dict as `load_state`, and the class names that mmcv's and mmengine's checkpoints have beside it, or ()."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_tensors(path), ()
    content, classes = _load_torch(path), ()
    if isinstance(content, dict) and isinstance(meta := content.get("meta"), dict):
        meta = meta | (meta["dataset_meta"] if isinstance(meta.get("dataset_meta"), dict) else {})
        named = meta.get("CLASSES") or meta.get("classes")
        classes = tuple(map(str, named)) if isinstance(named, (list, tuple)) else ()
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return {key.removeprefix("module."): value for key, value in _checked(path, content).items()}, classes


def load_array(path: Path) -> Tensor:
    """Reads one array: `.npy`, or a torch or safetensors file with one tensor in it. Nothing in it is executed.

    Raises:
        UserError: missing, damaged, or something other than one array of numbers.
    """
    path = Path(path)
    if path.suffix != ".npy":
        content = load_tensors(path) if path.suffix == ".safetensors" else _load_torch(path)
        found = _checked(path, content if isinstance(content, dict) else {"array": content})
        if len(found) != 1:
            raise UserError(f"{path} holds {len(found)} tensors; expected one")
        return next(iter(found.values()))
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except Exception as error:  # lying headers raise many kinds
        raise UserError(_other_kind(path) or f"{path} is damaged, or no array of numbers ({error})") from error


def _load_torch(path: Path) -> Any:
    if sum(member.file_size for member in zip_members(path)) > path.stat().st_size:  # torch compresses nothing
        raise UserError(f"{path} unpacks to more than its size: it is not what torch writes, and is not opened")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and foreign files raise many kinds
        kind = type(error).__name__  # without torch's text, which advises to open the file anyway
        damaged = (f"{path} is damaged, or holds more than tensors ({kind}); it is not opened otherwise, since unpickling could "
                   "run code. Download it again, or convert it to safetensors")
        raise UserError(_other_kind(path) or damaged) from error


def _other_kind(path: Path) -> str:
    """Say what a file without weights is, from its first bytes, and what to do; "" where they do not show it."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        start = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")
    lower = start.lower()
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer and not weights: fetch them with `git lfs pull`, or download the file from its page"
    if lower.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--", b"<script")):
        return f"{path} is a web page (HTML) and not weights: the link needs a click or a login; download it with a browser"
    text = start.decode(errors="replace")
    if len(text) > 8 and all(character.isprintable() or character in "\r\n\t" for character in text):
        return f"{path} is a text and not weights, it begins with {text[:60]!r}: what a server answers instead? Download it again"
    return ""


def zip_members(path: Path) -> list[zipfile.ZipInfo]:
    """List the members of a zip file, such as torch writes; empty for another kind of file.

    Raises:
        UserError: missing, or a damaged zip file.
    """
    try:
        if not zipfile.is_zipfile(path):
            path.stat()  # says whether it is there
            return []
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except Exception as error:
        raise UserError(f"{path} is damaged ({error}); make or download it again") from error


def _checked(path: Path, content: Any) -> dict[str, Tensor]:
    """Check that names lead to plain tensors whose numbers are all in the file."""

    def plain(value: Any) -> bool:
        return (isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
                and value.dtype in NUMBERS and value.nbytes <= value.untyped_storage().nbytes())  # fmt: skip

    if not isinstance(content, dict) or not all(isinstance(key, str) and plain(value) for key, value in content.items()):
        raise UserError(f"{path} is no state dict: expected names with tensors of numbers")
    return content
