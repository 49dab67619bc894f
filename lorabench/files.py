"""Files that are there whole or not at all, and on the disk before anything relies on them."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_atomic(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def replace(path: Path, text: str) -> None:
    """As `write_atomic`, by the only writer: what killed ones before it left is removed."""
    for left in path.parent.glob(f".{path.name}.*.part"):
        left.unlink(missing_ok=True)
    write_atomic(path, text)


def sync(path: Path) -> None:
    """Bring a file to the disk; of a folder the names in it, not what they name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring every file of a folder, and the folder itself, to the disk."""
    for path in (*folder.iterdir(), folder):
        sync(path)
