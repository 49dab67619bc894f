"""Hashes of files, and which of them may be remembered. Imports without torch."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from lorabench import cache

LARGE_BYTES = 1 << 26  # from this size on a hash is remembered between processes
RACY_SECONDS = 2.0  # the coarsest clock of a file system


class Signature(NamedTuple):
    """What changes with a file's content; not even `touch -d` puts the ctime back."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> Signature:
        stat = path.stat()
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    @property
    def is_racy(self) -> bool:
        """Whether another write could leave the signature as it is, within the clock's tick.

        As with git's index, the hash of such a file is used once and not remembered.
        """
        return time.time() - self.ctime_ns / 1e9 < RACY_SECONDS


def files_hash(paths: list[Path], folder: Path, hash_of: Callable[[Path], str]) -> str:
    """Return a hash over the names below `folder` and the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(folder).as_posix()} {hash_of(path)}\n".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return a file's sha256, remembered while its signature stays the same."""
    where, seen = path.resolve(), Signature.of(path)
    return fresh_hash(where) if seen.is_racy else _remembered(str(where), seen)


def fresh_hash(path: Path) -> str:
    """Return a file's sha256, read anew."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _remembered(path: str, seen: Signature) -> str:
    if seen.size < LARGE_BYTES:
        return fresh_hash(Path(path))
    key = hashlib.sha256(" ".join(map(str, (path, *seen))).encode()).hexdigest()
    known = _read(key)
    if known is None:
        known = fresh_hash(Path(path))
        _write(key, known)
    return known


def _read(key: str) -> str | None:
    """Return what an earlier process remembered; None where that is nothing or no hash."""
    if (where := cache.folder()) is None:
        return None
    try:
        known = (where / "hashes" / key).read_text()
    except (OSError, ValueError):  # unreadable; no text
        return None
    return known if re.fullmatch("[0-9a-f]{64}", known) else None


def _write(key: str, value: str) -> None:
    """Remember a hash, whole or not at all; a full disk or read-only home costs hashing again."""
    temporary = None
    if (where := cache.folder()) is None:
        return
    folder = where / "hashes"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            temporary = file.name
            file.write(value)
        os.replace(temporary, folder / key)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
