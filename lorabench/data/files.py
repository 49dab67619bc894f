"""What was computed from files, remembered for as long as the files are certainly the same."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from lorabench.hashes import Signature, file_hash


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
        before = Signature.of(path)
        if (key, before) in self.results:
            self.results.move_to_end((key, before))
            return self.results[key, before]
        is_racy = before.is_racy
        result = compute()
        if not is_racy and Signature.of(path) == before:
            self.results[key, before] = result
            if len(self.results) > self.size:
                self.results.popitem(last=False)
        return result


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
