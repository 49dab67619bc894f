"""Files that are there whole or not at all, and on the disk before anything relies on them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import threading
from pathlib import Path

BELOW_BYTES = 255  # room for the path of what is written in a run's folder


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
        remove(left)
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


def remove(place: Path) -> None:
    """Remove whatever lies there, as far as it can be removed."""
    with contextlib.suppress(OSError):
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink()


def share(folder: Path) -> None:
    """Give every file of a folder the rights that new files have; safetensors writes for one user.

    The rights of the folder itself, which was made as any other, say what they are.
    """
    rights = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(rights)


def obstacle(folder: Path) -> tuple[Path, str] | None:
    """Return what keeps files from being written to a folder: the place, and what it is.

    The folder need not exist: the first place above it that does must let it be made.
    """
    place = folder
    missing: list[str] = []
    while True:
        try:
            place.stat()
            break
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                return place, "is a link to nothing"
            if place == place.parent:
                return place, "does not exist"
            missing.append(place.name)
            place = place.parent
        except OSError as error:  # too long; a circle of links; below what may not be entered
            return place, f"cannot be used ({error.strerror})"
        except ValueError as error:  # no path at all
            return place, f"cannot be used ({error})"
    if not place.is_dir():
        return place, "is a file"
    try:
        longest = max(len(os.fsencode(name)) for name in ["", *missing])
        whole = len(os.fsencode(folder.absolute())) + BELOW_BYTES
        if longest > os.pathconf(place, "PC_NAME_MAX") or whole > os.pathconf(place, "PC_PATH_MAX"):
            return folder, f"cannot be used ({os.strerror(errno.ENAMETOOLONG)})"
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return place, f"is not writable ({error.strerror})"


def nearest_folder(place: Path) -> Path:
    """Return a folder itself, or, if it is not there yet, the nearest one above it that is."""
    while not place.exists():
        place = place.parent
    return place
