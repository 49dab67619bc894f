"""Where examples come from: skills, gym, jsonl files, datasets of the hub; and what can be wrong.

`check` needs no network, tokenizer or model, and never imports datasets; only a hub source does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorabench.config import ConfigErrors, DataConfig, SourceConfig, nearest
from lorabench.data import gym
from lorabench.data.files import Remembered, folder_hashes
from lorabench.data.templates import SPLITS, columns_of, own_sources, row_error, unknown_columns
from lorabench.zoo import skills

GENERATED = ("skills", "gym")  # sources whose examples are made, not read
HUB_ID = re.compile(r"[\w\-][\w.\-]*(/[\w.\-]+)?")
SKILLS_KEYS = {  # what zoo.skills calls them
    "skills": "data.skills",
    "min_length": "data.min_word_length",
    "min_length, max_length": "data.min_word_length, data.max_word_length",
}


def check(cfg: DataConfig) -> list[str]:
    """Everything wrong with the data that this machine can see, one line each.

    Takes up where `config.range_errors` ends and repeats none of it.
    """
    if cfg.source not in ("skills", "gym", "jsonl", "hub"):
        return []
    errors = _idle_keys(cfg)
    if cfg.source == "skills":
        return list(dict.fromkeys(errors + _skills_errors(cfg)))
    if cfg.source == "gym":
        return errors + gym.errors(cfg)
    if cfg.train.path is None:
        return errors
    for split, source in own_sources(cfg).items():
        columns, template_errors = columns_of(cfg, split)
        errors += template_errors
        key = f"data.{split}.path"
        path = local(source)
        if cfg.source == "hub":
            if not path.is_dir() and (path.exists() or not HUB_ID.fullmatch(str(source.path))):
                errors.append(_no_such_path(key, path, "a dataset id or a folder"))
        elif path.is_file():
            errors += _jsonl_errors(key, path, columns)
        else:
            errors.append(_no_such_path(key, path, "an existing file"))
    return list(dict.fromkeys(errors))


def local(source: SourceConfig) -> Path:
    """The path, as it would be on this machine."""
    return Path(source.path or "").expanduser()


def generated(cfg: DataConfig, split: str) -> list[tuple[str, str]]:
    """The examples of a split, of a source in GENERATED that `check` has passed."""
    return gym.examples(cfg, split) if cfg.source == "gym" else skill_examples(cfg, split)


def skill_examples(cfg: DataConfig, split: str) -> list[tuple[str, str]]:
    """The generated examples of a split. Raises ValueError as `zoo.skills.examples`."""
    return _skill_examples(
        tuple(cfg.skills),
        split,
        getattr(cfg, f"num_{split}"),
        cfg.min_word_length,
        cfg.max_word_length,
    )


@lru_cache(maxsize=32)
def _skill_examples(names: tuple, split: str, num: int, shortest: int, longest: int) -> list:
    return skills.examples(names, split, num, min_length=shortest, max_length=longest)


def _skills_errors(cfg: DataConfig) -> list[str]:
    if not cfg.skills:
        return []  # a range error
    errors = []
    for split in SPLITS:
        key = f"data.num_{split}"
        if getattr(cfg, f"num_{split}") is None:
            errors.append(
                f"{key}: must be given with data.source=skills, words are made to order; "
                f"got None; set {key}=512"
            )
            continue
        try:
            skill_examples(cfg, split)
        except ValueError as error:
            name, _, rest = str(error).partition(": ")
            errors.append(f"{SKILLS_KEYS.get(name, key)}: {rest}")
    return errors


def _idle_keys(cfg: DataConfig) -> list[str]:
    """Keys that were given and would do nothing."""
    errors, default = [], SourceConfig()
    for split in SPLITS:
        source = getattr(cfg, split)
        given = [key for key, value in vars(source).items() if value != getattr(default, key)]
        if cfg.source in GENERATED:
            where, remedy = f"data.source={cfg.source}", "use data=jsonl or data=hub"
        elif source.path is None:
            where, remedy = f"data.{split}.path=null", f"give data.{split}.path too"
        elif cfg.source == "jsonl":
            where, remedy = "data.source=jsonl", "use data=hub"
            given = [key for key in given if key in ("subset", "split", "revision")]
        else:
            continue
        errors += [
            f"data.{split}.{key}: must be left out with {where}; "
            f"got {getattr(source, key)!r}; {remedy}"
            for key in given
        ]
    return errors


def _no_such_path(key: str, path: Path, law: str) -> str:
    """A path that is not there, with the nearest name in its folder."""
    if path.exists():
        came, remedy = (
            ("a folder", "use data=hub for it") if path.is_dir() else
            ("a file", "give its folder, or use data=jsonl for a jsonl file")
        )  # fmt: skip
        return f"{key}: must be {law}; '{path}' is {came}; {remedy}"
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, there)
    remedy = f"did you mean '{path.parent / close[0]}'?" if close else "correct the path"
    return f"{key}: must be {law}; '{path}' does not exist, seen from {Path.cwd()}; {remedy}"


# jsonl


def jsonl_rows(path: Path, digest: Any = None) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """Yield the number of each line that is not blank, and its object, or None and the reason.

    Read with `json`, not with datasets' reader: that one turns "2020-01-01" into a datetime, 1
    beside 2.5 into 1.0, and a long integer into a float.

    Args:
        digest: A hashlib object to feed with the bytes of the file as they are read.
    """
    with open(path, "rb") as file:  # lines end at \n alone: U+2028 may stand in the data
        for number, line in enumerate(file, 1):
            if digest is not None:
                digest.update(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{error.reason} in line {number} of {path}") from error
            except (ValueError, RecursionError) as error:
                yield number, None, str(error)
                continue
            is_object = isinstance(row, dict)
            yield number, row if is_object else None, "" if is_object else f"it is {row!r:.40}"


def jsonl_columns(
    key: str, source: SourceConfig, columns: dict[str, str], digest: Any
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file that `check` has passed; feed `digest` with the bytes read.

    Raises:
        ConfigErrors: A row that cannot be used: the file was edited since it was checked.
    """
    path = local(source)
    for number, row, reason in jsonl_rows(path, digest):
        if row is None or (reason := row_error(row, columns)):
            raise ConfigErrors(
                f"{key}: must not change while it is read; line {number} of {path} was valid "
                f"before, now: {reason}; run again once nothing writes to it"
            )
        yield row


_CHECKED = Remembered(64)


def _jsonl_errors(key: str, path: Path, columns: dict[str, str]) -> list[str]:
    """Return everything wrong with one file; of its bad lines the first, and how many more."""
    asked = (key, str(path), tuple(columns.items()))
    return _CHECKED.get(path, asked, lambda: _check_jsonl(key, path, columns))


def _check_jsonl(key: str, path: Path, columns: dict[str, str]) -> list[str]:
    there: list[str] = []
    bad: list[str] = []
    try:
        for number, row, reason in jsonl_rows(path):
            if row is not None:
                if not there:
                    there = list(row)
                    where = f"line {number} of {path}"
                    if unknown := unknown_columns(columns, there, where):
                        return unknown
                reason = row_error(row, columns)
            if reason:
                bad.append(f"line {number} of {path}: {reason}")
    except OSError as error:
        return [f"{key}: must be readable; {path}: {error.strerror}"]
    except ValueError as error:
        return [f"{key}: must be UTF-8 text; {error}; convert the file, or unpack it"]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        law = "every line must be a JSON object with text or a number in each column used"
        return [f"{key}: {law}; {bad[0]}{more}; correct or remove the line"]
    return [] if there else [f"{key}: must hold at least one example; {path} is empty"]


# hub


def hub_identity(source: SourceConfig) -> list[Any]:
    """Return what decides the rows of a dataset: the files of a local folder, or id and commit."""
    folder = local(source)
    if folder.is_dir():
        return [source.subset, source.split, folder_hashes(folder)]
    return [source.subset, source.split, source.path, source.revision]


def hub_rows(
    key: str, source: SourceConfig, columns: dict[str, str]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return the rows of a dataset, cut to the columns asked for, and its `hub_identity`.

    Raises:
        ConfigErrors: No network, no such dataset, subset or split, unfit columns, or a folder that
            changes while it is read.
    """
    folder, identity = local(source), hub_identity(source)
    if folder.is_dir():
        names, rows = _folder_rows(key, folder, source, columns)
        if (after := hub_identity(source)) != identity:
            raise ConfigErrors(
                f"{key}: must not change while it is read; the sha256 of the files in '{folder}' "
                f"was {_hash(identity)} before and {_hash(after)} after; run again once nothing "
                "writes to it"
            )
    else:
        names, rows = _load_dataset(key, source.path, source, columns, revision=source.revision)
    if errors := unknown_columns(columns, names, f"'{source.path}'"):
        raise ConfigErrors(errors)
    for number, row in enumerate(rows, 1):
        if reason := row_error(row, columns):
            law = "every row must hold text or a number in each column used"
            where = f"row {number} of '{source.path}': {reason}"
            raise ConfigErrors(f"{key}: {law}; {where}; correct or remove the row")
    return rows, identity


def _folder_rows(
    key: str, folder: Path, source: SourceConfig, columns: dict[str, str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return column names and rows of a local folder, read past datasets' cache.

    That cache is keyed by names, sizes and times of the files: an edit that keeps them would be
    answered with the rows of before.
    """
    import datasets

    home = Path(datasets.config.HF_DATASETS_CACHE)  # where the tables would lie in any case
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lorabench-", dir=home) as cache:
        return _load_dataset(key, str(folder), source, columns, cache_dir=cache)


def _load_dataset(
    key: str, path: str | None, source: SourceConfig, columns: dict[str, str], **options: Any
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the names of all columns, and the rows cut to those of `columns` that exist."""
    import datasets

    try:
        with _quiet_hub():
            table = datasets.load_dataset(path, source.subset, split=source.split, **options)
    except Exception as error:
        # datasets raises anything from ConnectionError to pyarrow's own: always a source's fault.
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        chosen = {"subset": source.subset, "split": source.split, "revision": source.revision}
        given = "".join(f", {name} '{value}'" for name, value in chosen.items() if value)
        remedy = (
            "correct the folder, or the subset and split"
            if "cache_dir" in options
            else f"correct the name; without network give a local folder as {key}, or a file with "
            "data=jsonl; a gated dataset wants its terms accepted and HF_TOKEN set"
        )
        message = f"must be a dataset that loads; '{path}'{given}: {reason.rstrip('. ')}; {remedy}"
        raise ConfigErrors(f"{key}: {message}") from error
    names = table.column_names
    wanted = [name for name in columns if name in names]
    return names, table.select_columns(wanted).to_list()


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
