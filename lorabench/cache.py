"""Where large data lie on disk: `LORABENCH_CACHE`, or the user's cache folder.

Nothing in it is ever needed: what is missing or damaged is made again.
"""

from __future__ import annotations

import io
import mmap
import os
import tempfile
from pathlib import Path
from typing import IO, Any

SPILL_BYTES = 16 << 20  # what is larger lies in a file instead of in memory


def folder() -> Path | None:
    """Return the folder, or None where there is no home to put it in."""
    if given := os.environ.get("LORABENCH_CACHE"):
        return Path(given).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorabench"
    except RuntimeError:
        return None


class Spool:
    """Bytes that are written once and then read: in memory, or, if they are many, in a file.

    The file has no name, and goes when nobody has its content any more.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] = io.BytesIO()
        self._is_on_disk = self.closed = False

    def write(self, content: Any) -> int:
        written = self._file.write(content)
        if not self._is_on_disk and self._file.tell() > SPILL_BYTES:
            file = tempfile.TemporaryFile(dir=_scratch())  # noqa: SIM115
            file.write(self._file.getbuffer())  # type: ignore[attr-defined]
            self._file, self._is_on_disk = file, True
        return written

    def flush(self) -> None:
        self._file.flush()

    def content(self) -> Any:
        """Return what was written as a buffer; of a file, without reading it. Ends the writing."""
        self.closed = True
        if not self._is_on_disk:
            return self._file.getbuffer()  # type: ignore[attr-defined]
        self._file.flush()
        found = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._file.close()
        return found


def _scratch() -> Path | None:
    """Return a folder for files without a name; None: the system's, which may be memory."""
    where = folder()
    if where is None:
        return None
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return where if os.access(where, os.W_OK) else None
