"""What a base may not bring along: code of its own, and weights that are unpickled.

Every loader is told not to run code. Here such a base is refused before one is called, in a line
that names what it asks for. Imports without torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorabench.config import ModelConfig, and_more

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # what transformers looks for
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PICKLES = (*PICKLED, "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


def pickled_weights(model: ModelConfig, folder: Path) -> list[str]:
    """Refuse a folder whose weights, or some of them, are in files that are not safetensors."""
    content = _read_json(folder / "config.json")
    named = content.get("transformers_weights")
    names = [str(named)] if named else WEIGHTS
    there = next((name for name in names if (folder / name).is_file()), None)
    if there is None:
        found = dict.fromkeys(p.name for pattern in PICKLES for p in sorted(folder.glob(pattern)))
        return [no_safetensors(model, content, list(found))] if found else []
    shards = {there}
    if there.endswith(".index.json"):
        shards = set(map(str, _read_json(folder / there).get("weight_map", {}).values()))
    other = sorted(name for name in shards if not name.endswith(".safetensors"))
    return [no_safetensors(model, content, other)] if other else []


def no_safetensors(model: ModelConfig, content: dict[str, Any], names: list[str]) -> str:
    """Return the refusal of a base without safetensors weights, with the way to convert it.

    Args:
        content: its config.json.
        names: the files that hold its weights.
    """
    convert = "load it where you trust it, and save it with save_pretrained"
    if any(name in names for name in PICKLED):
        saved_as = (content.get("architectures") or [""])[0]
        to = model.path if Path(model.path).is_dir() else "NEW"
        maker = saved_as if str(saved_as).isidentifier() else "AutoModelForCausalLM"
        convert = (
            f'convert it once, if you trust it: python -c "from transformers import {maker} as M; '
            f"M.from_pretrained('{model.path}').save_pretrained('{to}')\""
        )
        if to == "NEW":
            convert += ", with its tokenizer, and set model.path=NEW"
    return (
        f"model.path: weights must be safetensors, for other formats can run code when they are "
        f"loaded; '{model.path}' has {and_more(names, 2)}; {convert}"
    )


def kernels(model: ModelConfig, content: dict[str, Any]) -> list[str]:
    """Refuse a config.json that names kernels, which transformers would fetch and run."""
    keys = ("attn_implementation", "_attn_implementation", "experts_implementation")
    return [
        f"model.path: a base must name no kernel to run; '{model.path}' names '{content[key]}' as "
        f"{key} in config.json; remove that key"
        for key in keys
        if "/" in str(content.get(key, ""))
    ]


def code_of_tokenizer(model: ModelConfig, content: dict[str, Any]) -> list[str]:
    """Refuse a tokenizer of a class that only its own code has.

    Args:
        content: its tokenizer_config.json.
    """
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    auto_map = content.get("auto_map")
    if isinstance(auto_map, list):  # as old ones write it
        auto_map = {"AutoTokenizer": auto_map}
    if not isinstance(auto_map, dict) or "AutoTokenizer" not in auto_map:
        return []
    name = content.get("tokenizer_class")
    if isinstance(name, str) and tokenizer_class_from_name(name) is not None:
        return []
    return [
        f"model.path: a tokenizer must need no code of its own, which lorabench never runs; "
        f"tokenizer_config.json of '{model.path}' names auto_map={auto_map}, and transformers has "
        f"no tokenizer_class '{name}'; use another base, or remove auto_map if transformers reads "
        f"its tokenizer.json as that code does"
    ]


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty if the file holds none: its loader says what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
