"""Read an official download: a folder, or a tar archive from which only the needed files are unpacked.

An archive never decides where a file is written: only plain files whose path ends as expected are taken, under that ending.
"""

import gzip
import hashlib
import re
import shutil
import tarfile
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from util.errors import UserError
from util.files import atomic

MD5 = {  # publicly known sums of the official files
    "VOCtrainval_11-May-2012.tar": "6cd6e144f989b92b3379bac3b3de84fd",
    "benchmark.tgz": "82b4d87ceb2ed10f6038a1cba92111cb",
}
LARGEST = 2**26  # bytes; every needed file is much smaller


@dataclass(frozen=True)
class Source:
    """A data set in `folder`. With an archive, `fetch` fills the folder from it."""

    folder: Path
    archive: Path | None = None

    def fetch(self, pattern: str, stems: Collection[str] | None = None) -> None:
        """Unpack the files whose path ends in `pattern` and, where given, whose name without suffix is one of `stems`."""
        if self.archive:
            unpack(self.archive, self.folder, pattern, stems)


def open_source(path: Path, unpack_to: Path, inner: Sequence[str], holds: str) -> Source:
    """Open a download: an archive to unpack in `unpack_to`, or a folder that has `holds` inside, directly or in one of `inner`.

    Raises:
        UserError: nothing is there, the folder has no such data set, or the archive differs from the published one of its name.
    """
    if path.is_file():
        _check_md5(path)
        return Source(unpack_to, path)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    for folder in (path, *(path / name for name in inner)):
        if (folder / holds).is_dir():
            return Source(folder)
    raise UserError(f"{path}: no folder {holds} in it, nor in {', '.join(inner)} there; give the folder the archive unpacks to")


def unpack(archive: Path, folder: Path, pattern: str, stems: Collection[str] | None = None) -> None:
    """Write the plain files of a tar archive whose path ends in `pattern` to `folder` / that ending, each atomically.

    A file of the right size is kept: a second call continues the first.

    Raises:
        UserError: the archive is damaged or truncated, or has a path or link that leads out of it.
    """
    ending = re.compile(rf"(?:.*/)?({pattern})", re.ASCII)
    try:
        with tarfile.open(archive) as tar:
            for member in tqdm(tar, desc=f"unpacking {archive.name}", unit=" members", disable=None):
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise UserError(f"{archive}: {member.name!r} leads out of the archive; this is not the official file")
                match = ending.fullmatch(member.name)
                if match is None or (stems is not None and path.stem not in stems):
                    continue
                if not member.isreg():
                    raise UserError(f"{archive}: {member.name!r} is a link or device, not a file; this is not the official file")
                if not 0 <= member.size <= LARGEST:  # a sparse member of no bytes may claim terabytes
                    raise UserError(f"{archive}: {member.name!r} would be {member.size:,} bytes; this is not the official file")
                _write(tar, member, folder, match[1])
    except UserError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError) as error:
        raise UserError(f"{archive}: damaged, truncated or no tar archive ({error}); download it again") from error


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, name: str) -> None:
    target = folder / name
    if target.is_file() and target.stat().st_size == member.size:
        return
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{target.parent} is a link to {target.parent.resolve()}, nothing is unpacked there; "
                        "delete the link, or choose another --out")
    with atomic(target) as temporary, temporary.open("wb") as file:
        shutil.copyfileobj(tar.extractfile(member), file)


def _check_md5(path: Path) -> None:
    expected = MD5.get(path.name)
    if expected is None:
        return
    print(f"checking {path}", flush=True)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != expected:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes with MD5 {found}, the published file has {expected}; "
                        "a truncated download? fetch it again")
