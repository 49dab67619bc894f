"""Datasets of the hub and of local folders, loaded by datasets."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorabench.config import ConfigErrors, SourceConfig
from lorabench.data.files import folder_hashes
from lorabench.data.readers import Refused, Row
from lorabench.data.sources.found import HUB_ID, local, missing, mode_of
from lorabench.data.templates import Wanted, unknown_columns

BATCH_ROWS = 1024


def check_hub(source: SourceConfig) -> None:
    """Refuse a path of data.source=hub that is neither a folder nor an id. Raises Refused."""
    path = local(source)
    is_there = mode_of(path) is not None
    if is_there and not path.is_dir():
        remedy = "give its folder, or use data=path for the file"
        raise Refused("be a dataset id or a folder", f"'{path}' is a file", remedy)
    if not is_there and not HUB_ID.fullmatch(str(source.path)):
        raise missing(path, "a dataset id or a folder")


def hub_identity(source: SourceConfig) -> list[Any]:
    """Return what decides the rows of a dataset: the files of a local folder, or id and commit."""
    folder = local(source)
    if folder.is_dir():
        return [source.subset, source.split, folder_hashes(folder)]
    return [source.subset, source.split, source.path, source.revision]


def hub_rows(key: str, source: SourceConfig, wanted: Wanted) -> Generator[Row, None, list[Any]]:
    """Yield the rows of a dataset, cut to the columns wanted; return its `hub_identity`.

    Raises:
        ConfigErrors: No network, no such dataset, subset or split, unfit columns, or a folder that
            changes while it is read.
    """
    folder, identity = local(source), hub_identity(source)
    if not folder.is_dir():
        table = _load_dataset(key, source.path, source, revision=source.revision)
        yield from _table_rows(key, table, source, wanted)
        return identity
    import datasets

    # Past datasets' cache: that one is keyed by names, sizes and times of the files, and an edit
    # that keeps them would be answered with the rows of before.
    home = Path(datasets.config.HF_DATASETS_CACHE)  # where the tables would lie in any case
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lorabench-", dir=home) as cache:
        table = _load_dataset(key, str(folder), source, cache_dir=cache)
        yield from _table_rows(key, table, source, wanted)
    if (after := hub_identity(source)) != identity:
        raise ConfigErrors(
            f"{key}: must not change while it is read; the sha256 of the files in '{folder}' "
            f"was {_hash(identity)} before and {_hash(after)} after; run again once nothing "
            "writes to it"
        )
    return identity


def _table_rows(key: str, table: Any, source: SourceConfig, wanted: Wanted) -> Iterator[Row]:
    names = table.column_names
    asked = wanted.required() | wanted.optional
    if errors := unknown_columns(asked, names, f"'{source.path}'"):
        raise ConfigErrors(errors)
    chosen = table.select_columns([name for name in wanted.names() if name in names])
    number = 0
    for start in range(0, len(chosen), BATCH_ROWS):  # from a file on disk, a batch at a time
        for columns in chosen.select(range(start, min(start + BATCH_ROWS, len(chosen)))).to_list():
            number += 1
            row = Row(number, columns, f"row {number} of '{source.path}'")
            if reason := wanted.error(columns, wanted):
                law = "every row must hold text or a number in each column used"
                raise ConfigErrors(
                    f"{key}: {law}; {row.where}: {reason}; correct or remove the row"
                )
            yield row


def _load_dataset(key: str, path: str | None, source: SourceConfig, **options: Any) -> Any:
    """Return the table of a split."""
    import datasets

    try:
        with _quiet_hub():
            return datasets.load_dataset(path, source.subset, split=source.split, **options)
    except Exception as error:
        # datasets raises anything from ConnectionError to pyarrow's own: always a source's fault.
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        chosen = {"subset": source.subset, "split": source.split, "revision": source.revision}
        given = "".join(f", {name} '{value}'" for name, value in chosen.items() if value)
        remedy = (
            "correct the folder, or the subset and split"
            if "cache_dir" in options
            else f"correct the name; without network give a local folder as {key}, or a file with "
            "data=path; a gated dataset wants its terms accepted and HF_TOKEN set"
        )
        message = f"must be a dataset that loads; '{path}'{given}: {reason.rstrip('. ')}; {remedy}"
        raise ConfigErrors(f"{key}: {message}") from error


def _hash(identity: list[Any]) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keeps the hub's retries, five a file, off the screen: one error is raised in the end."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
