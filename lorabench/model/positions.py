"""How many tokens a base has positions for, from its config.json. No torch."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config import ConfigErrors, ModelConfig
from lorabench.identity import is_generated
from lorabench.model.hub import hub_commit, must_be_reachable
from lorabench.model.place import local_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig

KEYS = ("max_position_embeddings", "n_positions")  # GPT-2's configs have the second


def positions(model: ModelConfig) -> int | None:
    """Return the positions that a base's config.json names.

    Returns:
        None: it names none, or cannot be had; the plan then says what is wrong with the base.
    """
    try:
        folder = local_folder(model)
        if folder is None:
            must_be_reachable(model)
            return _of(_hub_file(model.path, hub_commit(model)))
        return _of(folder / "config.json")
    except (ConfigErrors, OSError, ValueError):
        return None


def fitting(cfg: DictConfig, longest: int) -> int:
    """Return how many tokens an example can have: `longest`, or what the base has positions for.

    Args:
        cfg: A composed config. Where answers are generated, they need positions too.
    """
    model = cfg.model
    if "path" not in model or not model.path:
        return longest
    found = positions(ModelConfig(path=os.path.expanduser(model.path), revision=model.revision))
    if found is None:
        return longest
    metrics = [*cfg.data.metric, str(cfg.objective).partition("/")[2]]
    after = cfg.data.answer_max_new_tokens - 1 if any(map(is_generated, metrics)) else 0
    room = found - after  # a prompt leaves a token to the completion
    return min(longest, room if room > 1 else found)


def _of(file: Path) -> int | None:
    content: Any = json.loads(file.read_text(encoding="utf-8"))
    for part in (content.get("text_config"), content):
        for key in KEYS:
            if isinstance(part, dict) and isinstance(part.get(key), int):
                return int(part[key])
    return None


@lru_cache
def _hub_file(path: str, commit: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, "config.json", revision=commit))
    except Exception as error:  # also of the client's own HTTP library
        raise OSError(str(error)) from error
