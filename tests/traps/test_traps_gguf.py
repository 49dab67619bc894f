"""Section 4 of docs/traps.md: what llama.cpp's converter makes of an adapter.

The converter itself is not run here: its rules are told in docs/traps.md. What PEFT writes, and
what `gguf`, the converter's own library, knows of architectures, is measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from conftest import composed
from safetensors import safe_open

from lorabench import cli, plan
from traps.halves import causal, moved, saved, wrapped

Falls = Callable[..., None]
ALLOWED = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


def written(settings: dict[str, Any], folder: Path) -> tuple[set[str], dict[str, Any], float]:
    """Keys of a plain PEFT adapter, its config, and the scale it trained with."""
    model = moved(wrapped(causal("qwen2"), **settings))
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    saved(model, folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        keys = set(file.keys())
    config = json.loads((folder / "adapter_config.json").read_text())
    return keys, config, layer.scaling["default"]


@pytest.mark.parametrize(
    ("settings", "unexpected"),
    [
        ({}, None),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_B.bias"),
        ({"bias": "lora_only"}, "base_layer.bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_tokens_delta"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
    ],
)
def test_tensors_the_converter_refuses(
    settings: dict[str, Any], unexpected: str | None, falls_in: Falls, tmp_path: Path
) -> None:
    """T4.1"""
    keys, _, _ = written(settings, tmp_path)
    others = {key for key in keys if not key.endswith(ALLOWED)}
    if unexpected is None:
        assert not others
    else:
        since = "0.21" if "bias" in settings else "0.19"  # older ones save no bias: T7.5
        falls_in(bool(others) and all(unexpected in key for key in others), others, since=since)


@pytest.mark.parametrize(
    ("settings", "off"),
    [
        ({"r": 16}, 1.0),
        ({"r": 16, "use_rslora": True}, math.sqrt(16)),
        ({"r": 16, "alpha_pattern": {"q_proj": 24}}, 24 / 8),
    ],
)
def test_a_scale_the_converter_does_not_see(
    settings: dict[str, Any], off: float, falls_in: Falls, tmp_path: Path
) -> None:
    """T4.2"""
    _, config, trained_with = written(settings, tmp_path)
    converted = config["lora_alpha"] / config["r"]  # one alpha in the file, divided by the rank
    falls_in(math.isclose(trained_with / converted, off), (trained_with, converted))


def test_architectures_without_an_output_tensor(falls_in: Falls) -> None:
    """T4.3"""
    without = {
        gguf.MODEL_ARCH_NAMES[arch]
        for arch, tensors in gguf.MODEL_TENSORS.items()
        if gguf.MODEL_TENSOR.OUTPUT not in tensors
    }
    lacking = {"gemma", "gemma2", "command-r", "cohere2", "openelm", "bitnet", "lfm2moe"}
    falls_in(lacking <= without and not {"llama", "qwen2", "gemma3"} & without, sorted(without))


# --- lorabench -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains one small run on the embedded base, and says where."""

    def train(*words: str) -> Path:
        folder = tmp_path_factory.mktemp("outputs")
        words = ("tracker=none", "data.num_train=32", "data.num_validation=4", "data.num_test=4",
                 "trainer=smoke", "trainer.num_threads=1", "lora.r=4", f"output_dir={folder}",
                 *words)  # fmt: skip
        assert cli.main(["train", *words]) == 0
        return plan.folder(composed(*words))

    return train


@pytest.mark.parametrize("words", [["head=full"], ["head=lora"], ["lora.use_dora=true"]])
def test_an_export_that_would_lose_something_is_refused(
    words: list[str], run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """T4.1 T4.3"""
    folder = run(*words)
    capsys.readouterr()
    assert cli.main(["export", str(folder), "--to", "gguf", str(tmp_path / "adapter.gguf")]) != 0
    told = capsys.readouterr().err
    recorded = json.loads((folder / "record.json").read_text())["exports"]["gguf"]
    assert recorded != "yes" and recorded in told and "the way out" in told
    assert not (tmp_path / "adapter.gguf").exists()


@pytest.mark.parametrize("words", [["lora.use_rslora=true"], ["lora.alpha_pattern={q_proj:4}"]])
def test_a_scale_that_would_be_lost_is_told(words: list[str], run: Callable[..., Path]) -> None:
    """T4.2"""
    recorded = json.loads((run(*words) / "record.json").read_text())["exports"]
    assert recorded["gguf"] != "yes" and recorded["merged"] == "yes"
    assert "alpha" in recorded["gguf"]
