"""Where examples come from: skills, gym, files, datasets of the hub; and what can be wrong.

`check` needs no network, tokenizer or model, and never imports datasets; only a hub source does.

found    what lies at a path
files    jsonl files, and whatever data.source=path finds here
hub      datasets, loaded by datasets
skills   generated examples
look     what a path holds, for people who write a config for it
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from lorabench.config import DataConfig, SourceConfig
from lorabench.config.parts import GENERATED
from lorabench.data import gym
from lorabench.data.readers import Refused, Row
from lorabench.data.sources import skills
from lorabench.data.sources.files import check_files, jsonl_file, read_files
from lorabench.data.sources.found import Found, find, local
from lorabench.data.sources.hub import check_hub, hub_identity, hub_rows
from lorabench.data.sources.skills import skill_examples
from lorabench.data.templates import SPLITS, Wanted, own_sources, wanted_of
from lorabench.hashes import file_hash

__all__ = [
    "GENERATED",
    "Reading",
    "Refused",
    "Row",
    "check",
    "check_source",
    "generated",
    "identity",
    "is_remote",
    "local",
    "read",
    "read_source",
    "remote_paths",
    "skill_examples",
]


class Reading:
    """The rows of a source, to be iterated once; `identity` is known after the last one."""

    def __init__(self, rows: Generator[Row, None, Any]) -> None:
        self._rows = rows
        self._identity: Any = None

    def __iter__(self) -> Iterator[Row]:
        self._identity = yield from self._rows

    @property
    def identity(self) -> Any:
        """What was read, for the content hash: see `identity` of the package."""
        assert self._identity is not None, "the rows must be read to their end first"
        return self._identity


def check(cfg: DataConfig) -> list[str]:
    """Everything wrong with the data that this machine can see, one line each.

    Takes up where `config.range_errors` ends and repeats none of it.
    """
    if cfg.source not in ("skills", "gym", "jsonl", "hub", "path"):
        return []
    errors = _idle_keys(cfg)
    if cfg.source == "skills":
        return list(dict.fromkeys(errors + skills.errors(cfg)))
    if cfg.source == "gym":
        return errors + gym.errors(cfg)
    if cfg.train.path is None and not cfg.mixture:
        return errors
    for split, source in own_sources(cfg).items():
        wanted, template_errors = wanted_of(cfg, split)
        errors += template_errors
        errors += check_source(cfg.source, f"data.{split}", source, wanted)
    return list(dict.fromkeys(errors))


def generated(cfg: DataConfig, split: str) -> list[tuple[str, str]]:
    """The examples of a split, of a source in GENERATED that `check` has passed."""
    return gym.examples(cfg, split) if cfg.source == "gym" else skill_examples(cfg, split)


def check_source(kind: str, key: str, source: SourceConfig, wanted: Wanted) -> list[str]:
    """Return everything wrong with one source that this machine can see, one line each.

    Args:
        kind: data.source: jsonl, hub or path.
        key: The key of the source, such as data.train.
    """
    path_key = f"{key}.path"
    try:
        if kind == "hub":
            check_hub(source)
            return []
        found = _find(kind, source)
    except Refused as error:
        return [error.line(path_key)]
    if found.kind == "hub":
        return _hub_keys(key, source)
    errors = _local_keys(kind, key, source, found)
    return errors + check_files(path_key, source, found, wanted, kind == "path")


def read(cfg: DataConfig, split: str) -> Reading:
    """Return the rows of a split that has its own source; see `read_source`."""
    wanted, _ = wanted_of(cfg, split)
    return read_source(cfg.source, f"data.{split}", getattr(cfg, split), wanted)


def read_source(kind: str, key: str, source: SourceConfig, wanted: Wanted) -> Reading:
    """Return the rows of a source that `check_source` has passed; arguments as there.

    Iterating raises:
        ConfigErrors: A row cannot be used, a file changes while it is read, a dataset does not
            load.
    """
    return Reading(_rows(kind, f"{key}.path", source, wanted))


def _rows(kind: str, key: str, source: SourceConfig, wanted: Wanted) -> Generator[Row, None, Any]:
    found = Found([], "hub") if kind == "hub" else _find(kind, source)
    if found.kind == "hub":
        return (yield from hub_rows(key, source, wanted))
    hashes = yield from read_files(key, source, found, wanted, kind == "path")
    return _files_identity(kind, source, found, hashes)


def identity(kind: str, source: SourceConfig) -> Any:
    """Return what decides the rows of a source, read from its files now, for the content hash.

    Of jsonl, the sha256 of the file. Of path, the kind of the files and the sha256 of each in
    order, wherever they lie; of text also what a row is. Of a dataset: see `hub_identity`.

    Raises:
        Refused: There is no such source.
    """
    found = Found([], "hub") if kind == "hub" else _find(kind, source)
    if found.kind == "hub":
        return hub_identity(source)
    return _files_identity(kind, source, found, [file_hash(file) for file in found.files])


def _files_identity(kind: str, source: SourceConfig, found: Found, hashes: list[str]) -> Any:
    if kind == "jsonl":
        return hashes[0]
    return [found.kind, *([source.sample_by] if found.kind == "text" else []), hashes]


def is_remote(kind: str, source: SourceConfig) -> bool:
    """Return whether a source lies on the hub, so that reading it may need a network."""
    if kind == "hub":
        return not local(source).is_dir()
    try:
        return kind == "path" and find(source).kind == "hub"
    except Refused:
        return False


def remote_paths(cfg: DataConfig) -> list[str]:
    """Return the paths of all splits that lie on the hub."""
    return [
        str(source.path) for source in own_sources(cfg).values() if is_remote(cfg.source, source)
    ]


def _find(kind: str, source: SourceConfig) -> Found:
    return jsonl_file(source) if kind == "jsonl" else find(source)


def _idle_keys(cfg: DataConfig) -> list[str]:
    """Keys that were given and would do nothing, whatever lies at the path."""
    errors = []
    for split in SPLITS:
        source = getattr(cfg, split)
        given = _given(source)
        if cfg.source in GENERATED:
            where, remedy = f"data.source={cfg.source}", "use data=path"
        elif source.path is None:
            where, remedy = f"data.{split}.path=null", f"give data.{split}.path too"
        elif cfg.source == "hub":
            given = [key for key in given if key == "sample_by"]
            where, remedy = "data.source=hub", "use data=path"
        else:
            continue
        errors += _must_go(f"data.{split}", source, given, where, remedy)
    return errors


def _local_keys(kind: str, key: str, source: SourceConfig, found: Found) -> list[str]:
    """Keys that would do nothing for files of this machine."""
    given = [name for name in _given(source) if name in ("subset", "split", "revision")]
    if kind == "jsonl":
        where, remedy = "data.source=jsonl", "use data=hub"
        if source.sample_by != SourceConfig().sample_by:
            given.append("sample_by")
    else:
        where, remedy = "a local file or folder", "give the path of that split's files"
    errors = _must_go(key, source, given, where, remedy)
    if kind == "path" and found.kind != "text" and "sample_by" in _given(source):
        errors += _must_go(key, source, ["sample_by"], f"{found.kind} files", "remove it")
    return errors


def _hub_keys(key: str, source: SourceConfig) -> list[str]:
    given = [name for name in _given(source) if name == "sample_by"]
    return _must_go(key, source, given, "a dataset of the hub", "remove it")


def _given(source: SourceConfig) -> list[str]:
    default = SourceConfig()
    return [key for key, value in vars(source).items() if value != getattr(default, key)]


def _must_go(key: str, source: SourceConfig, given: list[str], where: str, remedy: str) -> list:
    return [
        f"{key}.{name}: must be left out with {where}; got {getattr(source, name)!r}; {remedy}"
        for name in given
    ]
