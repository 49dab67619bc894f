"""Where a base is, and which bytes it is, whatever its place. Imports without torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lorabench.config import ConfigErrors, ModelConfig, nearest
from lorabench.hashes import file_hash, files_hash
from lorabench.model import foreign
from lorabench.model.hub import hub_commit

ZOO = Path(__file__).parent.parent / "zoo"
ADAPTER_FILE = "adapter_config.json"
WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
# Everything a tokenizer of transformers reads. Their order decides `identity`: append new ones.
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
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "normalizer.json",
    "prophetnet.tokenizer",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "target.spm",
    "target_vocab.json",
    "tekken.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "word_pronunciation.json",
    "word_shape.json",
)
# The same, of names that vary: more templates, and files that tokenizer_config.json lists by the
# version of transformers that reads them.
TOKENIZER_PATTERNS = ("additional_chat_templates/*.jinja", "tokenizer.*.json")


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
    errors = adapter_beside(model)
    if not (folder / "config.json").is_file():
        errors.append(
            f"model.path: a checkpoint folder must hold config.json; '{model.path}' has none; "
            f"save the model there with save_pretrained"
        )
    elif pickled := foreign.pickled_weights(model, folder):
        errors += pickled
    elif not any(folder.glob("*.safetensors")):
        errors.append(
            f"model.path: a checkpoint folder must hold weights (*.safetensors); "
            f"'{model.path}' has none"
        )
    if all("chat_template" in file.name for file in files(folder)["tokenizer"]):
        errors.append(
            f"model.path: a checkpoint folder must hold a tokenizer (tokenizer.json, or "
            f"tokenizer_config.json and what it needs); '{model.path}' has none; save it there "
            f"with save_pretrained"
        )
    return errors


def adapter_beside(model: ModelConfig) -> list[str]:
    """Refuse a base folder that holds an adapter too: transformers would load both."""
    folder = local_folder(model)
    if folder is None or not (folder / ADAPTER_FILE).exists():
        return []
    return [beside(model)]


def beside(model: ModelConfig) -> str:
    """Return the refusal of a base that comes with an adapter."""
    return (
        f"model.path: a base must come without an adapter; '{model.path}' holds {ADAPTER_FILE}, "
        f"whose adapter transformers would load on top of the base; move it out, or merge it first"
    )


def identity(model: ModelConfig) -> dict[str, str]:
    """Return which base this is, whatever its place: hashes of a folder, or the hub commit."""
    folder = local_folder(model)
    if folder is None:
        commit = hub_commit(model)
        return {"hub": model.path, "revision": commit, "weights": "", "tokenizer": ""}
    return {"hub": "", "revision": ""} | {
        part: files_hash(found, folder, file_hash) for part, found in files(folder).items()
    }


def files(folder: Path) -> dict[str, list[Path]]:
    """Return the files that `identity` hashes: of the weights, and of the tokenizer."""
    weights = [folder / "config.json"]
    for pattern in (*WEIGHT_PATTERNS, "*.index.json"):  # the index says which file holds what
        weights += sorted(folder.glob(pattern))
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for pattern in TOKENIZER_PATTERNS:
        tokenizer += sorted(folder.glob(pattern))
    return {"weights": weights, "tokenizer": tokenizer}
