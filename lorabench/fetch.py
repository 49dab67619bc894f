"""What a command needs from the Hub, downloaded before it runs: models and data sets.

A model's files are named one by one, as its loaders open them: safetensors, never a second format
of the same weights. Data sets are read once by the code that reads them for a run, whose cache then
answers without a network.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorabench import data
from lorabench import model as base_model
from lorabench.config import Config, ConfigErrors, ModelConfig, SourceConfig, model_name
from lorabench.config.parts import GENERATED, READ_AS, parts_of
from lorabench.data import sources
from lorabench.data.templates import own_sources
from lorabench.files import nearest_folder
from lorabench.hub import hub_failure
from lorabench.model import foreign
from lorabench.model.place import ADAPTER_FILE, TOKENIZER_PATTERNS, beside

CONFIGS = ("config.json", "generation_config.json")
PLACES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
    "LORABENCH_CACHE",
    "XDG_CACHE_HOME",
)  # of the caches
TABLES = 2  # bytes on disk per byte of a data set: its files, and the tables made of them


@dataclass
class Needed:
    """One repository of the Hub, and what is to be downloaded of it."""

    what: str  # model or data
    name: str  # ORG/NAME, of a data set with its subset
    commit: str
    num_files: int
    total_bytes: int
    missing_bytes: int  # not in the cache yet
    room_bytes: int  # that the download takes on the disk
    cache: Path  # where it is put
    get: Callable[[], Path]  # downloads it; returns its folder


def needed(configs: Sequence[Config]) -> list[Needed]:
    """Return what these runs need from the Hub, each repository once; downloads no weights.

    Raises:
        ConfigErrors: all that is refused, not there, or cannot be loaded.
    """
    models = {(one.model.path, one.model.revision): one.model for one in configs}
    settings = {json.dumps(list(map(repr, _sources(one).values()))): one for one in configs}
    parts = [
        *(partial(of_model, m) for m in models.values() if base_model.local_folder(m) is None),
        *(partial(of_data, one) for one in settings.values()),
    ]
    found: list[Needed] = []
    errors: list[str] = []
    for part in parts:
        try:
            found += part()
        except ConfigErrors as refused:
            errors += refused.errors
    if errors:
        raise ConfigErrors(errors)
    return found


def of_model(model: ModelConfig) -> list[Needed]:
    """Return the files of a base that its loaders open.

    Raises:
        ConfigErrors: no network, no access, no safetensors weights, or an adapter beside them.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    base_model.must_be_reachable(model)
    revision = model.revision or "main"

    def snapshot(**options: Any) -> Any:
        return snapshot_download(
            model.path, revision=revision, allow_patterns=list(map(glob.escape, names)), **options
        )

    try:
        info = HfApi().model_info(model.path, revision=revision)
        there = [one.rfilename for one in info.siblings or ()]
        single, index = foreign.WEIGHTS
        weights = [single]
        if single not in there and index in there:
            file = hf_hub_download(model.path, index, revision=revision)
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            weights = [index, *sorted(set(content["weight_map"].values()))]
        _must_be_loadable(model, there, weights)
        names = [name for name in there if name in weights or _is_read(name)]
        with _without_bars():
            files = snapshot(dry_run=True)
    except ConfigErrors:
        raise
    except Exception as error:  # also of the client's own HTTP library
        raise ConfigErrors(hub_failure("model.path", model.path, error)) from error

    def get() -> Path:
        try:
            with nullcontext() if sys.stderr.isatty() else _without_bars():
                return Path(snapshot())
        except Exception as error:
            raise ConfigErrors(hub_failure("model.path", model.path, error)) from error

    missing = sum(one.file_size for one in files if one.will_download)
    return [
        Needed(
            "model", model.path, str(info.sha), len(files), sum(one.file_size for one in files),
            missing, missing, Path(constants.HF_HUB_CACHE), get,
        )
    ]  # fmt: skip


@contextmanager
def _without_bars() -> Iterator[None]:
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    were_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            enable_progress_bars()


def _is_read(name: str) -> bool:
    """Whether a loader of configs or tokenizers opens a file."""
    return name in (*CONFIGS, *base_model.TOKENIZER_FILES) or any(
        fnmatch.fnmatch(name, pattern) for pattern in TOKENIZER_PATTERNS
    )


def _must_be_loadable(model: ModelConfig, there: list[str], weights: list[str]) -> None:
    """Refuse before the download what the runs would refuse after it."""
    if ADAPTER_FILE in there:
        raise ConfigErrors(beside(model))
    if set(weights) <= set(there):
        return
    pickled = [name for name in there if name in foreign.PICKLED]
    if pickled and not set(foreign.WEIGHTS) & set(there):
        raise ConfigErrors(foreign.no_safetensors(model, {}, pickled))
    lacking = sorted(set(weights) - set(there))
    raise ConfigErrors(
        f"model.path: a checkpoint must hold weights (model.safetensors, or an index and its "
        f"files); '{model.path}' lacks {lacking[0]}; use another base or revision"
    )


def _sources(config: Config) -> dict[str, SourceConfig]:
    """Return the data sets of a run that lie on the Hub, by their config keys."""
    kind = READ_AS if config.data.source in GENERATED else config.data.source
    splits = {f"data.{split}": one for split, one in own_sources(config.data).items()}
    all_of_them = splits | parts_of(config.data)
    return {key: one for key, one in all_of_them.items() if sources.is_remote(kind, one)}


def of_data(config: Config) -> list[Needed]:
    """Return the data sets of a run, each with the files of its subset.

    Raises:
        ConfigErrors: no network, no access, no such subset.
    """
    import datasets

    found: list[Needed] = []
    seen = set()
    for where, source in _sources(config).items():
        key = (source.path, source.subset, source.revision)
        if key in seen:
            continue
        seen.add(key)
        try:
            commit, sizes, is_there = _files_of(source)
        except Exception as error:  # datasets raises anything
            told = hub_failure(f"{where}.path", str(source.path), error, "dataset")
            raise ConfigErrors(told) from error
        total = sum(sizes)

        def get() -> Path:
            data.load(config.data)
            return Path(datasets.config.HF_DATASETS_CACHE)

        missing = 0 if is_there else total
        name = " ".join(filter(None, (source.path, source.subset)))
        found.append(
            Needed(
                "data", name, commit, len(sizes), total, missing, TABLES * missing,
                Path(datasets.config.HF_DATASETS_CACHE), get,
            )
        )  # fmt: skip
    return found


def _files_of(source: SourceConfig) -> tuple[str, list[int], bool]:
    """Return a data set's commit, the sizes of its subset's files, and whether it is cached."""
    import datasets
    from huggingface_hub import HfApi

    builder = datasets.load_dataset_builder(
        str(source.path), source.subset, revision=source.revision
    )
    prefix = f"hf://datasets/{source.path}@"
    names = [str(name) for files in (builder.config.data_files or {}).values() for name in files]
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    commit = inside[0].partition("/")[0] if inside else str(source.revision or "main")
    paths = [name.partition("/")[2] for name in inside]
    infos = HfApi().get_paths_info(str(source.path), paths, repo_type="dataset", revision=commit)
    return commit, [getattr(one, "size", 0) for one in infos], Path(builder.cache_dir).is_dir()


def check_room(parts: Iterable[Needed]) -> None:
    """Refuse downloads for which their disk has no room.

    Raises:
        ConfigErrors: the disk, what is needed and what is free.
    """
    rooms: dict[int, list[Needed]] = {}
    for part in parts:
        rooms.setdefault(nearest_folder(part.cache).stat().st_dev, []).append(part)
    errors = []
    for there in rooms.values():
        wanted = sum(part.room_bytes for part in there)
        free = shutil.disk_usage(nearest_folder(there[0].cache)).free
        if wanted > free:
            errors.append(
                f"disk: must have room for {wanted / 1e6:,.1f} MB of downloads; got "
                f"{free / 1e6:,.1f} MB free at '{there[0].cache}'; make room, or set HF_HOME to a "
                f"folder on another disk, here and where the command runs"
            )
    if errors:
        raise ConfigErrors(errors)


def offline_command(words: Sequence[str]) -> str:
    """Return the command that needs no network any more, for a shell.

    Args:
        words: of the verb, as they were given to `fetch`.
    """
    places = [f"{name}={shlex.quote(os.environ[name])}" for name in PLACES if os.environ.get(name)]
    return " ".join([*places, "HF_HUB_OFFLINE=1", "lorabench", "train", shlex.join(words)]).strip()


def local_bases(configs: Sequence[Config]) -> list[str]:
    """Return the bases that are folders of this machine; those of lorabench itself left out."""
    found = {
        str(folder): model_name(one.model)
        for one in configs
        if (folder := base_model.local_folder(one.model)) is not None
        and not one.model.path.startswith("lorabench:")
    }
    return list(found)
