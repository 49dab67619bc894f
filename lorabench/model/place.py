"""Where a base is, and which bytes it is, whatever its place. Imports without torch."""

from __future__ import annotations

import hashlib
import os
import re
from functools import lru_cache
from pathlib import Path

from lorabench.config import ConfigErrors, ModelConfig, nearest
from lorabench.model.hub import hub_commit

ZOO = Path(__file__).parent.parent / "zoo"
WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def location(model: ModelConfig) -> str:
    """A path or hub id that transformers loads: embedded bases lie in the package."""
    if model.path.startswith("lorabench:"):
        name = model.path.removeprefix("lorabench:")
        folder = ZOO / name
        if not (folder / "config.json").is_file():
            embedded = sorted(p.parent.name for p in ZOO.glob("*/config.json"))
            raise ConfigErrors(
                f"model.path: 'lorabench:NAME' must name an embedded base "
                f"({', '.join(embedded)}); got '{name}'"
            )
        return str(folder)
    return model.path


def local_folder(model: ModelConfig) -> Path | None:
    """The checkpoint folder, or None where `path` is a hub id."""
    where = location(model)
    if Path(where).is_dir():
        return Path(where).resolve()
    if where.startswith((".", "/", "~", os.sep)) or not re.fullmatch(
        r"[\w.\-]+(/[\w.\-]+)?", where
    ):
        folder = Path(where).parent
        near = (
            nearest(Path(where).name, [p.name for p in folder.iterdir()]) if folder.is_dir() else []
        )
        raise ConfigErrors(
            f"model.path: must be a folder with a transformers checkpoint, or a hub id; no folder "
            f"'{where}'" + (f" (did you mean '{folder / near[0]}'?)" if near else "")
        )
    return None


def check(model: ModelConfig) -> list[str]:
    """What is wrong with where the base is said to be; needs neither network nor torch."""
    try:
        folder = local_folder(model)
    except ConfigErrors as error:
        return error.errors
    if folder is None:
        return []
    errors = []
    if not (folder / "config.json").is_file():
        errors.append(
            f"model.path: a checkpoint folder must hold config.json; '{model.path}' has none; "
            f"save the model there with save_pretrained"
        )
    elif not any(any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        errors.append(
            f"model.path: a checkpoint folder must hold weights ({', '.join(WEIGHT_PATTERNS)}); "
            f"'{model.path}' has none"
        )
    return errors


def identity(model: ModelConfig) -> dict[str, str]:
    """Which base this is, whatever its place: content hashes of a folder, or the hub commit."""
    folder = local_folder(model)
    if folder is None:
        commit = hub_commit(model)
        return {"hub": model.path, "revision": commit, "weights": "", "tokenizer": ""}
    weights = [folder / "config.json"]
    for pattern in WEIGHT_PATTERNS:
        weights += sorted(folder.glob(pattern))
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return {
        "hub": "",
        "revision": "",
        "weights": _files_hash(weights),
        "tokenizer": _files_hash(tokenizer),
    }


@lru_cache(maxsize=64)
def _file_hash(path: str, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _files_hash(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.name} {_cached_hash(path, stat)}\n".encode())
    return digest.hexdigest()


def _cached_hash(path: Path, stat: os.stat_result) -> str:
    """A file's sha256, remembered between processes while its size and time stay the same."""
    if stat.st_size < 1 << 26:
        return _file_hash(str(path), stat.st_size, stat.st_mtime_ns)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lorabench" / "hashes"
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
    known = cache / key
    if known.is_file():
        return known.read_text()
    value = _file_hash(str(path), stat.st_size, stat.st_mtime_ns)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        known.write_text(value)
    except OSError:
        pass  # a read-only home only costs hashing again
    return value
