"""Hashes of files, remembered for as long as the files are certainly the same."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

# A file that changed more recently than this is read anew each time: the clock of a file system is
# coarse, so that a second edit may leave every field of the stamp as it was. Git's index does so.
RECENT_NS = 2_000_000_000


def stamp(path: Path) -> tuple[int, ...]:
    """Return what changes with every edit of a file, whatever size and time the editor restores."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class Remembered:
    """Results computed from the bytes of files, each until its file changes.

    Args:
        size: Number of results to keep; the ones used longest ago go first.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.results: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, path: Path, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return compute(), from memory if `path` is unchanged since the call with this key."""
        before = stamp(path)
        if (key, before) in self.results:
            self.results.move_to_end((key, before))
            return self.results[key, before]
        is_recent = time.time_ns() - before[-1] < RECENT_NS
        result = compute()
        if not is_recent and stamp(path) == before:
            self.results[key, before] = result
            if len(self.results) > self.size:
                self.results.popitem(last=False)
        return result


_HASHES = Remembered(4096)


def file_hash(path: Path) -> str:
    """Return the sha256 of a file."""
    return _HASHES.get(path, None, lambda: _file_hash(path))


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def folder_hashes(folder: Path) -> list[tuple[str, str]]:
    """Return name and sha256 of every file that datasets may read from a folder.

    Hidden files are left out, as datasets leaves them out. Names count: datasets reads the split
    from them.
    """
    files = sorted(
        (file.relative_to(folder).as_posix(), file) for file in folder.rglob("*") if file.is_file()
    )
    return [
        (name, file_hash(file))
        for name, file in files
        if not any(part.startswith(".") for part in name.split("/"))
    ]
