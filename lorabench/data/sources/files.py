"""Examples in files of this machine: checked in one pass, and read again to be used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lorabench.config import ConfigErrors, SourceConfig
from lorabench.data.files import Remembered
from lorabench.data.readers import Refused, Row, kind_of, rows
from lorabench.data.sources.found import Found, local, missing, mode_of, must_be_a_file
from lorabench.data.templates import Wanted, unknown_columns

SHOWN_FILES = 3  # with errors; the others are told of once these are correct
_CHECKED = Remembered(4096)


class Checked(NamedTuple):
    """What one pass over a file found."""

    errors: list[str]
    num_rows: int


def jsonl_file(source: SourceConfig) -> Found:
    """Return the file of data.source=jsonl, whatever its name. Raises Refused."""
    path = local(source)
    mode = mode_of(path)
    if mode is None:
        raise missing(path, "an existing file")
    if path.is_dir():
        remedy = "use data=hub for it, or data=path for data files in it"
        raise Refused("be an existing file", f"'{path}' is a folder", remedy)
    must_be_a_file(path, mode)
    return Found([path], "jsonl")


def file_rows(
    path: Path,
    kind: str,
    source: SourceConfig,
    wanted: Wanted,
    digest: Any = None,
    is_strict: bool = True,
) -> Iterator[Row]:
    """Yield the rows of one file; see `readers.rows`."""
    only = wanted.names()
    return rows(path, digest, kind=kind, strict=is_strict, only=only, sample_by=source.sample_by)


def check_files(
    key: str, source: SourceConfig, found: Found, wanted: Wanted, is_strict: bool
) -> list[str]:
    """Return everything wrong with the files; of the bad rows of each the first, and how many.

    Args:
        is_strict: False for data.source=jsonl.
    """
    errors: list[str] = []
    num_rows = num_bad = 0
    for path in found.files:
        asked = (key, str(path), found.kind, source.sample_by, is_strict, wanted.key())

        def check(path: Path = path) -> Checked:
            return _check(
                key,
                path,
                wanted,
                lambda: file_rows(path, found.kind, source, wanted, None, is_strict),
                is_strict,
            )

        try:
            checked = _CHECKED.get(path, asked, check)
        except OSError as error:
            reason = f"{path}: {error.strerror}"
            refused = Refused("be readable", reason, "correct its rights or the path")
            checked = Checked([refused.line(key)], 0)
        errors += checked.errors
        num_rows += checked.num_rows
        num_bad += bool(checked.errors)
        if num_bad == SHOWN_FILES:
            break
    if not errors and not num_rows:
        is_one = len(found.files) == 1
        came = f"{found.files[0]} is empty" if is_one else f"'{source.path}' holds none"
        return [f"{key}: must hold at least one example; {came}"]
    return errors


def _check(
    key: str,
    path: Path,
    wanted: Wanted,
    read: Callable[[], Iterator[Row]],
    is_strict: bool,
) -> Checked:
    num_rows = num_bad = 0
    first_bad = first_reason = ""
    unseen = dict(wanted.optional)
    there: dict[str, None] = {}
    try:
        for row in read():
            reason = row.error
            if not reason:
                if not num_rows:
                    unknown = unknown_columns(wanted.required(), list(row.columns), row.where)
                    if unknown:
                        return Checked(unknown, 0)
                num_rows += 1
                if unseen:
                    there.update(dict.fromkeys(row.columns))
                    for column in row.columns:
                        unseen.pop(column, None)
                reason = wanted.error(row.columns, wanted)
            if reason:
                num_bad += 1
                if not first_bad:
                    first_bad, first_reason = f"{row.where}: {reason}", reason
    except Refused as error:
        return Checked([error.line(key) + _other_reader(path, is_strict)], 0)
    if num_bad:
        more = f" (and {num_bad - 1} more)" if num_bad > 1 else ""
        if is_strict:
            law = "every row must be readable, with text or a number in each column used"
            remedy = "correct or remove the row"
        else:
            law = "every line must be a JSON object with text or a number in each column used"
            remedy = "correct or remove the line" + _other_reader(path, is_strict)
        if kind_of(path) == "jsonl" and first_reason.startswith("it is ["):
            remedy += "; a file that is an array must be named .json"
        return Checked([f"{key}: {law}; {first_bad}{more}; {remedy}"], num_rows)
    if unseen and num_rows:
        return Checked(unknown_columns(unseen, list(there), str(path)), 0)
    return Checked([], num_rows)


def _other_reader(path: Path, is_strict: bool) -> str:
    """Return the end of a remedy for what data.source=jsonl cannot read and data=path can."""
    if is_strict or (path.suffix.lower() in (".jsonl", ".ndjson")) or kind_of(path) is None:
        return ""
    return f"; use data=path, which reads {path.suffix} files"


def read_files(
    key: str, source: SourceConfig, found: Found, wanted: Wanted, is_strict: bool
) -> Generator[Row, None, list[str]]:
    """Yield the rows of files that `check_files` has passed; return the sha256 of each file read.

    Raises:
        ConfigErrors: A row that cannot be used: a file was edited since it was checked.
    """
    hashes = []
    for path in found.files:
        digest = hashlib.sha256()
        try:
            for row in file_rows(path, found.kind, source, wanted, digest, is_strict):
                if reason := row.error or wanted.error(row.columns, wanted):
                    raise ConfigErrors(
                        f"{key}: must not change while it is read; {row.where} was valid "
                        f"before, now: {reason}; run again once nothing writes to it"
                    )
                yield row
        except Refused as error:
            raise ConfigErrors(error.line(key)) from error
        except OSError as error:
            reason = f"'{path}': {error.strerror}"
            refused = Refused("be readable", reason, "correct its rights or the path")
            raise ConfigErrors(refused.line(key)) from error
        hashes.append(digest.hexdigest())
    return hashes
