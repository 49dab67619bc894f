"""Tokens of large sets on disk, by what decides them, so that they are made once.

A folder for each set, in `cache.folder()`/tokens: input_ids.i4 is mapped into memory, rest.npz
holds what is small, about.json the counts and the hash, which is checked whenever they are used.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import shutil
import tempfile
import zlib
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from lorabench import cache
from lorabench.config import DataConfig
from lorabench.data.chat import given_text
from lorabench.data.ragged import Ragged
from lorabench.data.tokens import Tokens

SMALLEST = 10_000  # examples; fewer take less than a second
SETS = 32  # kept at most; those used longest ago go first
RULES_VERSION = 1  # of this format, and of how examples become tokens
COUNTS = ("num_too_long", "num_cut", "num_empty", "num_examples", "num_losing_text")


def key_of(
    cfg: DataConfig, content: str, tokenizer: str, stops: Collection[int], labels: list[str]
) -> str:
    """Return what names the tokens of a split.

    Args:
        content: the content hash of its examples.
        tokenizer: what names the tokenizer; see `encoding.tokenise_once`.
    """
    template = cfg.chat_template
    decides = [
        RULES_VERSION, content, tokenizer, sorted(stops), labels, cfg.format, cfg.add_bos,
        cfg.add_eos, cfg.max_length, cfg.too_long,
        template if isinstance(template, bool) else given_text(template),
        cfg.chat_template_kwargs, version("transformers"), version("tokenizers"),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


def load(key: str) -> Tokens | None:
    """Return what was kept under a key; None where that is nothing, or not what it was."""
    folder = _folder(key)
    if folder is None or not (folder / "about.json").is_file():
        return None
    try:
        about = json.loads((folder / "about.json").read_text("utf-8"))
        content = io.BytesIO((folder / "rest.npz").read_bytes())
        with np.load(content, allow_pickle=False) as rest:
            arrays = {name: rest[name] for name in rest.files}
        with open(folder / "input_ids.i4", "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        first_loss = about["first_loss"]
        found = Tokens(
            Ragged(np.frombuffer(mapped, "<i4"), arrays["ends"]),
            Ragged(arrays["spans"], arrays["span_ends"]),
            [id.decode() for id in arrays["ids"].tolist()],
            arrays["indices"].tolist(),
            labels=about["labels"],
            label_ids=arrays["label_ids"].tolist(),
            all_lengths=arrays["all_lengths"],
            first_loss=None if first_loss is None else tuple(first_loss),
            **{name: about[name] for name in COUNTS},
        )
        is_whole = found.hash() == about["hash"]
        os.utime(folder)
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, BadZipFile, zlib.error):
        is_whole = False
    if not is_whole:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return found


def save(key: str, tokens: Tokens) -> None:
    """Keep tokens, whole or not at all; a full disk or a read-only home costs making them again."""
    folder = _folder(key)
    if folder is None:
        return
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        with open(temporary / "input_ids.i4", "wb") as file:
            file.write(tokens.input_ids.values.astype("<i4", copy=False).data)
        np.savez(
            temporary / "rest.npz",
            ends=tokens.input_ids.ends,
            spans=tokens.spans.values,
            span_ends=tokens.spans.ends,
            ids=np.array([id.encode() for id in tokens.ids], dtype=np.bytes_),
            indices=np.asarray(tokens.indices, np.int64),
            label_ids=np.asarray(tokens.label_ids, np.int64),
            all_lengths=tokens.all_lengths,
        )
        about: dict[str, Any] = {name: getattr(tokens, name) for name in COUNTS}
        about |= {"labels": tokens.labels, "first_loss": tokens.first_loss, "hash": tokens.hash()}
        (temporary / "about.json").write_text(json.dumps(about), "utf-8")
        os.rename(temporary, folder)
        _drop_oldest(folder.parent)
    except OSError:  # another process was first, too
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _folder(key: str) -> Path | None:
    where = cache.folder()
    return None if where is None else where / "tokens" / key


def _drop_oldest(where: Path) -> None:
    kept = sorted((one for one in where.iterdir() if (one / "about.json").is_file()), key=_used)
    for one in kept[:-SETS]:
        shutil.rmtree(one, ignore_errors=True)


def _used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # dropped by another process
        return 0.0
