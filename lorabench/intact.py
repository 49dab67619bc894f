"""Whether the files of a run are still what its record says. Imports without torch."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from lorabench import record
from lorabench.hashes import file_hash, fresh_hash
from lorabench.record import Record, RecordedFile


class Checked(NamedTuple):
    """A run of a folder, and which of its files are not what was recorded."""

    folder: Path
    entry: Record
    damaged: dict[str, str]  # name -> how it differs


def checked(folder: Path, hash_of: Callable[[Path], str] | None = None) -> list[Checked]:
    """Return every run of a folder that has a record.

    Args:
        hash_of: as for `damage`.
    """
    return [
        Checked(path, entry, damage(path, entry, hash_of)) for path, entry in record.find(folder)
    ]


def described(folder: Path, names: Iterable[str]) -> dict[str, RecordedFile]:
    """Files of a run folder as its record lists them."""
    found = {}
    for name in names:
        stat = (folder / name).stat()
        found[name] = RecordedFile(
            size=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=fresh_hash(folder / name)
        )
    return found


def damage(
    folder: Path, entry: Record, hash_of: Callable[[Path], str] | None = None
) -> dict[str, str]:
    """Say which files of a run are not what was recorded, and how each differs.

    Args:
        hash_of: reads every file; None: only those whose size or time is another, as in a copy.
    """
    found = {}
    for name, was in entry.files.items():
        path = folder / name
        try:
            stat = path.stat()
            if stat.st_size != was.size:
                found[name] = f"has {stat.st_size} bytes instead of {was.size}"
            elif hash_of is None and stat.st_mtime_ns == was.mtime_ns:
                continue
            elif (hash_of or file_hash)(path) != was.sha256:
                found[name] = "has other content than was recorded"
        except (FileNotFoundError, NotADirectoryError):
            found[name] = "is gone"
        except OSError as error:
            found[name] = f"cannot be read ({error.strerror})"
    return found


def of_adapter(found: dict[str, str]) -> dict[str, str]:
    """The part of what is damaged without which a run is worth nothing."""
    return {name: how for name, how in found.items() if name.startswith("adapter/")}


def described_damage(folder: Path, entry: Record, found: dict[str, str]) -> str:
    """What is wrong with a run's files, in a line, and what to run."""
    what = ", ".join(f"{name} {how}" for name, how in found.items())
    command = shlex.join(entry.provenance.get("command") or ["lorabench", "train", "..."])
    if of_adapter(found):
        remedy = f"remove '{folder}' and repeat `{command}`"
    elif any(name.startswith("evaluations/") for name in found):
        remedy = f"repeat `{command}`, which scores its adapter again"
    else:
        remedy = (
            "its adapter and its scores are whole; restore the file from a copy, if you need it"
        )
    return f"{folder}: {what}; {remedy}"
