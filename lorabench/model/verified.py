"""Loading what was planned: the bytes that were loaded are those the run's id was made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config import ConfigErrors, ModelConfig
from lorabench.hashes import Signature, files_hash, fresh_hash
from lorabench.model.loading import load, tokenizer
from lorabench.model.place import files, local_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = 12  # hex digits of a hash or commit in a message


def load_verified(
    model: ModelConfig, device: str, classes: int, planned: dict[str, str]
) -> PreTrainedModel:
    """Return the base, as `load` does, if it still is the one that was planned.

    Args:
        planned: what `identity` said of the base when the run was planned.
    Raises:
        ConfigErrors: the base changed since, or while it was loaded.
    """
    return _verified(model, planned, "weights", lambda one: load(one, device, classes))


def tokenizer_verified(model: ModelConfig, planned: dict[str, str]) -> Any:
    """Return the base's tokenizer, if it still is the one that was planned.

    Raises:
        ConfigErrors: it changed since, or while it was loaded.
    """
    return _verified(model, planned, "tokenizer", tokenizer)


def _verified(
    model: ModelConfig, planned: dict[str, str], part: str, load: Callable[[ModelConfig], Any]
) -> Any:
    folder = local_folder(model)
    if folder is None:
        return _verified_commit(model, planned, load)
    before = _signatures(folder, part)
    try:
        loaded = load(model)
    except Exception as error:  # of half a file, say: what changed is the better message
        _must_be_planned(model, planned, part, folder)
        raise error
    _must_be_planned(model, planned, part, folder)
    if _signatures(folder, part) != before:
        raise ConfigErrors(
            f"model.path: must stay as it is while it is loaded; files of '{model.path}' were "
            f"written meanwhile; repeat the command"
        )
    return loaded


def _must_be_planned(model: ModelConfig, planned: dict[str, str], part: str, folder: Path) -> None:
    """Hash the files anew: a remembered hash is not proof enough of what was loaded."""
    try:
        now = files_hash(files(folder)[part], folder, fresh_hash)[:SHOWN]
    except FileNotFoundError:
        now = "fewer files"
    if now != planned[part][:SHOWN]:
        raise _changed(model, part, planned[part], now)


def _verified_commit(
    model: ModelConfig, planned: dict[str, str], load: Callable[[ModelConfig], Any]
) -> Any:
    """Load the planned commit, whatever the branch has come to since."""
    commit = planned["revision"]
    loaded = load(dataclasses.replace(model, revision=commit))
    now = getattr(getattr(loaded, "config", None), "_commit_hash", None)  # a tokenizer keeps none
    if now not in (None, commit):
        raise _changed(model, "commit", commit, now[:SHOWN])
    return loaded


def _signatures(folder: Path, part: str) -> dict[str, Signature]:
    return {str(path): Signature.of(path) for path in files(folder)[part] if path.is_file()}


def _changed(model: ModelConfig, part: str, planned: str, now: str) -> ConfigErrors:
    return ConfigErrors(
        f"model.path: must still be the base that was planned, {part} {planned[:SHOWN]}; "
        f"'{model.path}' now has {now}; put it back, or repeat the command to plan with the new one"
    )
