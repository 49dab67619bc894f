"""What lies at a path: a file, the files of a folder or glob, a dataset of the hub, or nothing."""

from __future__ import annotations

import glob
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from lorabench.config import SourceConfig, and_more, nearest
from lorabench.data.readers import ENDINGS, Refused, kind_of

HUB_ID = re.compile(r"[\w\-][\w.\-]*(/[\w.\-]+)?")
# Data that a reader of the folder would miss. The first two are datasets' save_to_disk.
UNREADABLE = (
    "dataset_dict.json", ".arrow", ".feather", ".orc", ".avro", ".xls", ".xlsx", ".pkl", ".npz",
    *(f"{end}{packed}" for end in ENDINGS for packed in (".zst", ".bz2", ".xz", ".zip", ".lz4")),
)  # fmt: skip
SPLIT_WORDS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "eval": "validation",
}  # fmt: skip


class Found(NamedTuple):
    """The files of a source in the order in which they are read; none for the hub's."""

    files: list[Path]
    kind: str  # a value of readers.ENDINGS, or "hub"


def local(source: SourceConfig) -> Path:
    """The path, as it would be on this machine."""
    try:
        return Path(source.path or "").expanduser()
    except RuntimeError:  # no such user, or no home
        return Path(source.path or "")


def find(source: SourceConfig) -> Found:
    """Return what the path of data.source=path is.

    What exists here comes first, then a glob, then an id of the hub (ORG/NAME).

    Raises:
        Refused: It is none of these, or files that cannot be read together.
    """
    path = local(source)
    mode = mode_of(path)
    if mode is not None and source.path:
        if stat.S_ISDIR(mode):
            return _together(_in_folder(path), f"'{path}'")
        must_be_a_file(path, mode)
        kind = kind_of(path)
        if kind is None:
            law = f"have a name that ends with {', '.join(ENDINGS)}, or .gz after one of them"
            raise Refused(law, f"got '{path}'", "rename the file, or use data=jsonl for JSON lines")
        return Found([path], kind)
    if glob.has_magic(str(path)):
        names = sorted(glob.glob(str(path), recursive=True))
        files = [Path(name) for name in names if not os.path.isdir(name)]
        if not files:
            came = f"'{path}' matches no file, seen from {Path.cwd()}"
            raise Refused("match a file", came, "correct the pattern")
        return _together(files, f"'{path}'", others=True)
    looks_like_id = "/" in str(source.path) and HUB_ID.fullmatch(str(source.path))
    if looks_like_id and kind_of(path) is None and not path.parent.is_dir():
        return Found([], "hub")
    raise missing(path, "a file, a folder, a glob or a dataset id (ORG/NAME)", looks_like_id)


def mode_of(path: Path) -> int | None:
    """Return what a path is, links followed; None if nothing is there.

    Raises:
        Refused: It cannot be looked at.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise Refused("be readable", f"'{path}': {reason}", "correct its rights or the path") from (
            error
        )


def must_be_a_file(path: Path, mode: int) -> None:
    """Refuse a pipe, a socket or a device: they cannot be read twice, to check and to train."""
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device"}
        what = kinds.get(stat.S_IFMT(mode), "a device")
        came = f"'{path}' is {what}, and data is read more than once"
        raise Refused("be a file", came, "write it into a file first")


def missing(path: Path, law: str, is_id: object = False) -> Refused:
    """Return the refusal of a path at which nothing lies, with the nearest name in its folder."""
    law = f"be {law}"
    if path.is_symlink():
        came = f"'{path}' is a link to '{os.readlink(path)}', which does not exist"
        return Refused(law, came, "correct the link or the path")
    try:
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:
        there = []
    close = nearest(path.name, there)
    remedy = f"did you mean '{path.parent / close[0]}'?" if close else "correct the path"
    if is_id and kind_of(path) is None:
        remedy += "; use data=hub if it is an id of the hub"
    return Refused(law, f"'{path}' does not exist, seen from {Path.cwd()}", remedy)


def _in_folder(folder: Path) -> list[Path]:
    """Return the files of a folder, not of its subfolders: those are mostly other splits."""
    try:
        there = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        remedy = "correct its rights or the path"
        raise Refused("be readable", f"'{folder}': {error.strerror}", remedy) from error
    files = [p for p in there if not p.is_dir() and (kind_of(p) or _is_unreadable(p))]
    if not files:
        folders = [p.name for p in there if p.is_dir()]
        came = f"'{folder}' has none"
        if folders:
            came += f", but subfolders: {and_more(folders, 3)}"
        remedy = f"give one of them, or a glob such as '{folder}/**/*.jsonl'"
        remedy = remedy if folders else f"put files that end with {', '.join(ENDINGS)} there"
        raise Refused("be a folder with data files", came, remedy)
    words = {
        SPLIT_WORDS[word]: p.name
        for p in reversed(files)
        for word in re.split(r"[^a-z]+", p.name.lower())
        if word in SPLIT_WORDS
    }
    if len(words) > 1:
        came = f"'{folder}' has {' and '.join(f'{words[word]!r}' for word in sorted(words))}"
        remedy = f"give a file of it, or a glob such as '{folder}/train*'"
        raise Refused("be a folder with the files of one split", came, remedy)
    return files


def _is_unreadable(path: Path) -> bool:
    return path.name.lower().endswith(UNREADABLE)


def _together(files: list[Path], what: str, others: bool = False) -> Found:
    """Return files that are read as one; refuse those that cannot be.

    Args:
        others: Whether there may be files of no known kind.
    """
    kinds: dict[str, Path] = {}
    for file in files:
        if (mode := mode_of(file)) is None:
            raise missing(file, "an existing file")
        must_be_a_file(file, mode)
        kind = kind_of(file)
        if _is_unreadable(file) or (others and kind is None):
            remedy = f"use files that end with {', '.join(ENDINGS)}, or .gz after one of them"
            if file.name.lower().endswith(UNREADABLE[:2]):
                remedy = "write the dataset with its to_parquet() or to_json()"
            raise Refused("match readable files only", f"{what} has '{file.name}'", remedy)
        kinds.setdefault(str(kind), file)
    if len(kinds) > 1:
        came = f"{what} has {' and '.join(f'{file.name!r}' for file in kinds.values())}"
        suffix = next(iter(kinds.values())).suffix
        remedy = f"choose with a glob, such as '*{suffix}'"
        raise Refused("hold files of one kind", came, remedy)
    return Found(files, next(iter(kinds)))
