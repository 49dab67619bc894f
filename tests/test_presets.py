"""The presets of conf/model/: each plans, and is the model that its name says.

The reference is the number of parameters that the Hub shows on each model's page
(`safetensors.total` of https://huggingface.co/api/models/ORG/NAME): a wrong width, head or class
gives another.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import composed

from lorabench import cli, plan
from lorabench import model as base_model

LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 128}
QWEN2 = {"num_key_value_heads": 2, "vocab_size": 151936}
QWEN3 = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "head_dim": 128}
SMOLLM2 = {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}

# Preset: class of the config, hyperparameters of its config.json, parameters.
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "gemma-2-9b": (
        "Gemma2Config",
        {
            "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
            "vocab_size": 256000,
        },
        9_241_705_984,
    ),
    "gemma-3-1b-it": (
        "Gemma3TextConfig",
        {
            "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
            "vocab_size": 262144, "sliding_window": 512,
        },
        999_885_952,
    ),
    "gemma-3-4b-it": (
        "Gemma3Config",
        {
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
                "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
                "vocab_size": 262208, "sliding_window": 1024,
            },
            "vision_config": {
                "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
                "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
                "vision_use_head": False,
            },
        },
        4_300_079_472,  # the vision tower included
    ),
    "llama-3.1-8b": (
        "LlamaConfig",
        LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        8_030_261_248,
    ),
    "llama-3.2-1b-instruct": (
        "LlamaConfig",
        LLAMA
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
        | {"tie_word_embeddings": True},
        1_235_814_400,
    ),
    "llama-3.2-3b-instruct": (
        "LlamaConfig",
        LLAMA
        | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
        | {"num_attention_heads": 24, "tie_word_embeddings": True},
        3_212_749_824,
    ),
    "qwen3-4b": (
        "Qwen3Config",
        QWEN3
        | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
        | {"tie_word_embeddings": True},
        4_022_468_096,
    ),
    "qwen3-8b": (
        "Qwen3Config",
        QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36},
        8_190_735_360,
    ),
    "qwen2.5-0.5b": (
        "Qwen2Config",
        QWEN2
        | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
        | {"num_attention_heads": 14, "tie_word_embeddings": True},
        494_032_768,
    ),
    "qwen2.5-1.5b": (
        "Qwen2Config",
        QWEN2
        | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
        | {"num_attention_heads": 12, "tie_word_embeddings": True},
        1_543_714_304,
    ),
    "qwen2.5-7b": (
        "Qwen2Config",
        {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        },
        7_615_616_512,
    ),
    "smollm2-135m": (
        "LlamaConfig",
        SMOLLM2
        | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        | {"num_attention_heads": 9, "num_key_value_heads": 3},
        134_515_008,
    ),
    "smollm2-360m": (
        "LlamaConfig",
        SMOLLM2
        | {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32}
        | {"num_attention_heads": 15, "num_key_value_heads": 5},
        361_821_120,
    ),
    "smollm2-1.7b": (
        "LlamaConfig",
        SMOLLM2
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
        | {"num_attention_heads": 32, "num_key_value_heads": 32},
        1_711_376_384,
    ),
    "mistral-7b": (
        "MistralConfig",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768,
            "max_position_embeddings": 32768, "sliding_window": None,
        },
        7_248_023_552,
    ),
    "phi-4-mini": (
        "Phi3Config",
        {
            "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064,
            "max_position_embeddings": 131072, "tie_word_embeddings": True,
            "pad_token_id": 199999,
        },
        3_836_021_760,
    ),
}  # fmt: skip
# Tuned models of the same shape.
SAME = {
    "gemma-2-9b-it": "gemma-2-9b",
    "llama-3.1-8b-instruct": "llama-3.1-8b",
    **{f"qwen2.5-{size}-instruct": f"qwen2.5-{size}" for size in ("0.5b", "1.5b", "7b")},
    **{f"smollm2-{size}-instruct": f"smollm2-{size}" for size in ("135m", "360m", "1.7b")},
}
PUBLISHED |= {name: PUBLISHED[same] for name, same in SAME.items()}
QUICK = "smollm2-135m"


@pytest.mark.parametrize(
    "name",
    [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED],
)
def test_a_preset_plans_with_the_published_number_of_parameters(name: str, tmp_path: Path) -> None:
    import transformers

    kind, settings, parameters = PUBLISHED[name]
    getattr(transformers, kind)(**settings).save_pretrained(tmp_path)
    # A plan reads names and shapes from the config; weights and tokenizer it only hashes.
    (tmp_path / "model.safetensors").write_bytes(b"")
    words = [f"model={name}", f"model.path={tmp_path}", "model.dtype=bfloat16"]
    config = composed(*words, "tracker=none", "head=lora")
    made = plan.make(config)
    assert made.total_parameters == parameters
    assert made.model == name and made.head.module == "lm_head"
    comment = (Path(cli.conf_folder()) / "model" / f"{name}.yaml").read_text().splitlines()[0]
    assert made.head.tied == ("untied head" not in comment)
    layers = settings.get("text_config", settings)["num_hidden_layers"]
    per_layer = 4 if "Phi3" in kind else 7  # Phi fuses q, k, v and gate, up
    assert len(made.lora_modules) == per_layer * layers + 1


def test_every_hub_preset_names_a_commit() -> None:
    """A name alone could be other weights tomorrow."""
    files = sorted((Path(cli.conf_folder()) / "model").glob("*.yaml"))
    found = {path.stem: yaml.safe_load(path.read_text()) for path in files}
    hub = {name: one for name, one in found.items() if "/" in one["path"]}
    assert set(PUBLISHED) <= set(hub)
    for name, one in hub.items():
        assert one["name"] == name and re.fullmatch("[0-9a-f]{40}", one["revision"]), name
    assert len({one["revision"] for one in hub.values()}) == len(hub)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_plan_says_that_a_hub_model_is_not_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model.place, "hub_commit", lambda model: COMMIT)
    folder = base_model.ZOO / "tiny-gemma"
    for room in (base_model.loading, base_model.dtypes, base_model.fits):
        monkeypatch.setattr(room, "local_folder", lambda model: folder)
    monkeypatch.setattr(base_model.loading, "location", lambda model: str(folder))
    free = plan.make(composed("model=org/name", "tracker=none"))
    pinned = plan.make(composed("model=org/name", f"model.revision={COMMIT}", "tracker=none"))
    told = (
        f"model.revision is not set: 'org/name' is at commit {COMMIT} now, and the Hub may move "
        f"on; model.revision={COMMIT} keeps it"
    )
    assert told in free.warnings and not any("revision" in text for text in pinned.warnings)
    assert free.run_id == pinned.run_id
    assert json.loads(free.model_dump_json())["contents"]["revision"] == COMMIT
