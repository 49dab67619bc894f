"""model.dtype=auto: the dtype that a checkpoint is stored in, read from its files. No torch.

float16 becomes bfloat16: what trains in it needs a loss scaler, and lorabench has none.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorabench.config import Config, ConfigErrors, ModelConfig, range_errors
from lorabench.model.fits import headers
from lorabench.model.hub import hub_commit, hub_failure, must_be_reachable
from lorabench.model.place import local_folder

STORED = {"float64": "float64", "float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}
# As the header of a safetensors file spells them.
HEADER = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def resolved(model: ModelConfig) -> ModelConfig:
    """Return the same base with a dtype in place of `auto`.

    Raises:
        ConfigErrors: the checkpoint does not tell, or is stored in no float of 16 bits or more.
    """
    if model.dtype != "auto":
        return model
    stored = stored_dtype(model)
    if stored not in STORED:
        raise ConfigErrors(
            f"model.dtype: auto must find a checkpoint in {', '.join(STORED)}; '{model.path}' is "
            f"stored in {stored or 'none of them'}; set model.dtype=bfloat16 or float32"
        )
    return dataclasses.replace(model, dtype=STORED[stored])


def settled(config: Config) -> Config:
    """Return the same run with dtypes in place of `auto`; `trainer.dtype` follows `model.dtype`.

    Raises:
        ConfigErrors: what `resolved` raises; a `trainer.dtype` that does not go with the base's.
    """
    model, trainer = resolved(config.model), config.trainer
    if trainer.dtype == "auto":
        trainer = dataclasses.replace(trainer, dtype=model.dtype)
    if model is config.model and trainer is config.trainer:
        return config
    found = dataclasses.replace(config, model=model, trainer=trainer)
    if errors := range_errors(found):
        raise ConfigErrors(errors)
    return found


def dtype_notes(model: ModelConfig) -> list[str]:
    """Say where `auto` is another dtype than the checkpoint's."""
    if model.dtype != "auto" or (stored := stored_dtype(model)) == STORED.get(stored):
        return []
    return [
        f"model.dtype: the checkpoint is in {stored}, auto takes bfloat16: training in float16 "
        f"needs a loss scaler; model.dtype=float32 keeps every digit"
    ]


def stored_dtype(model: ModelConfig) -> str:
    """Return the dtype in a checkpoint's config.json, or else of most of its parameters."""
    folder = local_folder(model)
    if folder is None:
        must_be_reachable(model)
        return _on_hub(model.path, hub_commit(model))
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # its loader says what is wrong with it
        content = {}
    return _named(content if isinstance(content, dict) else {}) or _most(_in_folder(folder))


def _named(content: dict[str, Any]) -> str:
    """What config.json says: `dtype`, before transformers 5 `torch_dtype`, or its text model's."""
    for part in (content, content.get("text_config")):
        if isinstance(part, dict) and (name := part.get("dtype") or part.get("torch_dtype")):
            return str(name).removeprefix("torch.")
    return ""


def _most(counts: Counter[str]) -> str:
    """The float in which most parameters are; a scale or a mask in another one does not count."""
    floats = {name: n for name, n in counts.items() if name in HEADER}
    name = max(floats or counts, key=counts.__getitem__, default="")
    return HEADER.get(name, name)


def _in_folder(folder: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name, shape in headers(folder).values():
        counts[name] += math.prod(shape)
    return counts


@lru_cache
def _on_hub(path: str, commit: str) -> str:
    """The same of a hub model; weights that are not in the cache are not downloaded for it."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        file = Path(hf_hub_download(path, "config.json", revision=commit))
        if name := _named(json.loads(file.read_text(encoding="utf-8"))):
            return name
        counts = _in_folder(file.parent)
        if not counts:
            found = HfApi().get_safetensors_metadata(path, revision=commit)
            counts = Counter(found.parameter_count)
    except Exception as error:  # also of the client's own HTTP library: a proxy that refuses
        raise ConfigErrors(hub_failure("model.path", path, error)) from error
    return _most(counts)
