"""Whether a base's files fit together: config.json, weights, tokenizer. Reads headers only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorabench.config import ConfigErrors, ModelConfig, and_more
from lorabench.model.place import WEIGHT_PATTERNS, local_folder


def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype (as safetensors spells it) and shape of every tensor in a folder.

    Files that cannot be read are left out: their loader says what is wrong with them.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(folder.glob(WEIGHT_PATTERNS[0])):
        try:
            with safe_open(file, "np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                    part = tensors.get_slice(name)
                    found[name] = part.get_dtype(), tuple(part.get_shape())
        except (SafetensorError, OSError):
            continue
    return found


def other_shapes(model: ModelConfig, expected: Mapping[str, Any]) -> list[str]:
    """Refuse a folder whose weights have other shapes than its config.json says.

    Args:
        expected: tensors of the skeleton, by name; those under other names are not compared.
    """
    folder = local_folder(model)
    if folder is None:
        return []
    wrong = [
        f"{name} {list(shape)} instead of {list(expected[name].shape)}"
        for name, (_, shape) in headers(folder).items()
        if name in expected and tuple(expected[name].shape) != shape
    ]
    if not wrong:
        return []
    return [
        f"model.path: weights must have the shapes of config.json; '{model.path}' has "
        f"{and_more(wrong)}; correct config.json (vocab_size, say), or save the model again with "
        f"save_pretrained"
    ]


def quantised(model: ModelConfig, content: Mapping[str, Any]) -> list[str]:
    """Refuse a base whose config.json says that its weights are quantised.

    Args:
        content: its config.json.
    """
    settings = content.get("quantization_config")
    if not settings:
        return []
    method = settings.get("quant_method", "quantised") if isinstance(settings, dict) else settings
    return [
        f"model.path: weights must not be quantised; '{model.path}' has quantization_config "
        f"({method}) in config.json; use the checkpoint it was made from"
    ]


def check_tokens(model: ModelConfig, tokenizer: Any, base: Any, used: set[int]) -> None:
    """Refuse token ids without an embedding, and a tokenizer to which every text is unknown.

    Args:
        base: the skeleton.
        used: ids of all examples.
    Raises:
        ConfigErrors: what does not fit, with both numbers.
    """
    rows = base.get_input_embeddings().weight.shape[0]
    if used and max(used) >= rows:
        raise ConfigErrors(
            f"model.path: every token must have an embedding; the tokenizer of '{model.path}' has "
            f"{len(tokenizer)} tokens, the base {rows} embeddings, and the data hold token "
            f"{max(used)} ({tokenizer.convert_ids_to_tokens(max(used))!r}); use "
            f"resize_token_embeddings and save_pretrained, or leave the token out of the data"
        )
    if tokenizer.unk_token_id in used and used <= set(tokenizer.all_special_ids):
        raise ConfigErrors(
            f"model.path: the tokenizer must know some of the text; that of '{model.path}' makes "
            f"everything {tokenizer.unk_token}; put the files of its tokenizer (tokenizer.json) "
            f"beside config.json"
        )
