"""Where examples come from: skills, jsonl files, datasets of the hub; and what can be wrong.

`check` needs no network, tokenizer or model, and never imports datasets; only a hub source does.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorabench.config import ConfigErrors, DataConfig, SourceConfig, nearest
from lorabench.data.templates import SPLITS, columns_of, own_sources, row_error, unknown_columns
from lorabench.zoo import skills

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
    if cfg.source not in ("skills", "jsonl", "hub"):
        return []
    errors = _idle_keys(cfg)
    if cfg.source == "skills":
        return list(dict.fromkeys(errors + _skills_errors(cfg)))
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
            errors += _jsonl_errors(key, str(path), stamp(path), tuple(columns.items()))
        else:
            errors.append(_no_such_path(key, path, "an existing file"))
    return list(dict.fromkeys(errors))


def local(source: SourceConfig) -> Path:
    """The path, as it would be on this machine."""
    return Path(source.path or "").expanduser()


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of a file: a cached reading holds as long as they do."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


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
        if cfg.source == "skills":
            where, remedy = "data.source=skills", "use data=jsonl or data=hub"
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
    remedy = f"did you mean '{path.parent / close[0]}'?" if close else "mend the path"
    return f"{key}: must be {law}; '{path}' does not exist, seen from {Path.cwd()}; {remedy}"


# jsonl


def jsonl_rows(path: str) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """Of each line that is not blank: its number, its object or None, and then the reason.

    Read with `json`, not with datasets' reader: that one turns "2020-01-01" into a datetime, 1
    beside 2.5 into 1.0, and a long integer into a float.
    """
    with open(path, "rb") as file:  # lines end at \n alone: U+2028 may stand in the data
        for number, line in enumerate(file, 1):
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


@lru_cache(maxsize=64)
def _jsonl_errors(key: str, path: str, stamp: tuple, columns: tuple) -> list[str]:
    """Everything wrong with one file; of its bad lines the first, and how many more."""
    there: list[str] = []
    bad: list[str] = []
    try:
        for number, row, reason in jsonl_rows(path):
            if row is not None:
                if not there:
                    there = list(row)
                    where = f"line {number} of {path}"
                    if unknown := unknown_columns(dict(columns), there, where):
                        return unknown
                reason = row_error(row, dict(columns))
            if reason:
                bad.append(f"line {number} of {path}: {reason}")
    except OSError as error:
        return [f"{key}: must be readable; {path}: {error.strerror}"]
    except ValueError as error:
        return [f"{key}: must be UTF-8 text; {error}; convert the file, or unpack it"]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        law = "every line must be a JSON object with text or a number in each column used"
        return [f"{key}: {law}; {bad[0]}{more}; mend or remove the line"]
    return [] if there else [f"{key}: must hold at least one example; {path} is empty"]


# hub


def hub_rows(key: str, source: SourceConfig, columns: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of a dataset of the hub or of a local folder, cut to the columns asked for.

    Raises:
        ConfigErrors: no network, no such dataset, subset or split, or unfit columns.
    """
    import datasets

    folder = local(source)
    is_folder = folder.is_dir()
    path = str(folder) if is_folder else source.path
    try:
        with _quiet_hub():
            table = datasets.load_dataset(
                path, source.subset, split=source.split,
                revision=None if is_folder else source.revision,
            )  # fmt: skip
    except Exception as error:
        # datasets raises anything from ConnectionError to pyarrow's own: always a source's fault.
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        chosen = {"subset": source.subset, "split": source.split, "revision": source.revision}
        given = "".join(f", {name} '{value}'" for name, value in chosen.items() if value)
        remedy = (
            "mend the folder, or the subset and split"
            if is_folder
            else f"mend the name; without network give a local folder as {key}, or a file with "
            "data=jsonl; a gated dataset wants its terms accepted and HF_TOKEN set"
        )
        message = f"must be a dataset that loads; '{path}'{given}: {reason.rstrip('. ')}; {remedy}"
        raise ConfigErrors(f"{key}: {message}") from error
    if errors := unknown_columns(columns, table.column_names, f"'{path}'"):
        raise ConfigErrors(errors)
    rows = table.select_columns(list(columns)).to_list()
    for number, row in enumerate(rows, 1):
        if reason := row_error(row, columns):
            law = "every row must hold text or a number in each column used"
            where = f"row {number} of '{path}': {reason}"
            raise ConfigErrors(f"{key}: {law}; {where}; mend or remove the row")
    return rows


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
