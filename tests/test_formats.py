"""What llama.cpp's converter would take of a run: predictions, and what PEFT really saved."""

from __future__ import annotations

import json
import re
from typing import Any

import gguf
import pytest
import transformers
from exports import RUNS, stock
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from lorabench import formats, record
from lorabench.config import LoraSettings

Q, HEAD = "model.layers.0.self_attn.q_proj", "lm_head"
TIED = "becomes output.weight.lora_a"
NO_OUTPUT = "has no output tensor"


def base_config(kind: str, **more: Any) -> Any:
    config = transformers.AutoConfig.for_model(kind, **more)
    config.architectures = ["SomethingForCausalLM"]
    return config


def predicted(kind: str, modules=(Q,), saved=(), tied=False, base=None, **lora: Any) -> str:
    config = base or base_config(kind)
    return formats.gguf(config, modules, saved, LoraSettings(**lora), HEAD, tied)


@pytest.mark.parametrize(
    ("kind", "arguments", "answer"),
    [
        ("llama", {}, formats.YES),
        ("mistral", {}, formats.YES),
        ("gemma", {"tied": True}, formats.YES),
        ("gemma3_text", {"tied": True}, formats.YES),
        ("qwen3", {"modules": [Q, HEAD]}, formats.YES),
        ("phi3", {"modules": ["model.layers.0.self_attn.qkv_proj"]}, formats.YES),
        ("gpt_neox", {"modules": ["gpt_neox.layers.1.attention.query_key_value"]}, formats.YES),
        # a head of its own, in an architecture whose GGUF has none
        ("gemma", {"modules": [Q, HEAD], "tied": True}, NO_OUTPUT),
        ("gemma", {"saved": [HEAD], "tied": True}, NO_OUTPUT),
        ("gemma", {"modules": ["model.embed_tokens"], "tied": True}, NO_OUTPUT),
        ("gemma2", {"modules": [HEAD], "tied": True}, NO_OUTPUT),
        ("cohere", {"modules": [HEAD], "tied": True}, NO_OUTPUT),
        ("cohere2", {"modules": [HEAD], "tied": True}, NO_OUTPUT),
        ("lfm2_moe", {"modules": [HEAD], "tied": True}, NO_OUTPUT),
        # a tied head where the GGUF could have one
        ("gemma3_text", {"modules": [HEAD], "tied": True}, TIED),
        ("llama", {"modules": [HEAD], "tied": True}, TIED),
        ("qwen2", {"modules": [HEAD], "tied": True}, TIED),
        ("gpt2", {"modules": [HEAD], "tied": True}, TIED),
        ("llama", {"modules": ["model.embed_tokens"], "tied": True}, "on the tied head as well"),
        ("llama", {"modules": ["model.embed_tokens"]}, formats.YES),
        # keys the converter does not take
        ("llama", {"use_dora": True}, "refuses DoRA's magnitudes"),
        ("qwen2", {"bias": "lora_only"}, "refuses trained biases"),
        ("gpt2", {"modules": ["lm_head"], "bias": "all"}, "refuses trained biases"),
        ("llama", {"saved": [HEAD]}, "refuses modules trained in full (lm_head)"),
        ("gemma", {"saved": ["score"], "tied": True}, "refuses modules trained in full (score)"),
        ("llama", {"modules": ["model.layers.0.zzz", Q]}, "has no tensor for model.layers.0.zzz"),
        ("gpt2", {"modules": ["transformer.h.0.attn.c_attn"]}, "transposes GPT-2's"),
        # scales: one alpha, over each module's rank
        ("llama", {"r": 4, "rank_pattern": {"q_proj": 2}}, formats.YES),
        ("llama", {"r": 4, "alpha_pattern": {"q_proj": 8}}, formats.YES),  # 8 is 2 r
        ("llama", {"r": 4, "alpha_pattern": {"q_proj": 3}}, "holds one alpha"),
        ("llama", {"use_rslora": True}, "an alpha of alpha * sqrt(r) would be right"),
        ("llama", {"use_rslora": True, "rank_pattern": {"q": 2}}, "rsLoRA by alpha / sqrt(r)"),
        # architectures
        ("opt", {}, "knows no causal model of the type 'opt'"),
        ("bert", {}, "knows no causal model of the type 'bert'"),
    ],
)  # fmt: skip
def test_gguf_predictions(kind, arguments, answer):
    found = predicted(kind, **arguments)
    if answer == formats.YES:
        assert found == formats.YES
    else:
        assert answer in found and "\n" not in found


def test_every_name_given_to_an_architecture_is_ggufs():
    assert set(formats.RENAMED.values()) <= set(gguf.MODEL_ARCH_NAMES.values())
    assert set(formats.RENAMED) <= set(transformers.CONFIG_MAPPING.keys())


def test_gguf_tells_every_reason_and_needs_an_architecture():
    found = predicted("gemma", modules=[HEAD], tied=True, use_dora=True, bias="all")
    assert [NO_OUTPUT in found, "DoRA" in found, "biases" in found] == [True] * 3
    config = base_config("llama")
    config.architectures = None
    assert "config.json names no architectures" in predicted("llama", base=config)


def test_scale_with_two_ranks_has_no_single_alpha():
    assert "sqrt(r) would" not in predicted("llama", use_rslora=True, rank_pattern={"q": 2})


# --- against what PEFT saved -----------------------------------------------------------------

CONVERTED = [settings for settings in RUNS if settings[0] != "bert"]


@pytest.mark.parametrize("settings", CONVERTED, ids=" ".join)
def test_what_the_converter_refuses_is_what_peft_saved(settings, trained):
    """It takes pairs of A and B, and nothing else."""
    run = trained(*settings)
    taken = re.compile(r"\.lora_[AB]\.weight$|\.lora_embedding_[AB]$")
    keys = load_file(run / "adapter" / "adapter_model.safetensors")
    others = any(not taken.search(key) for key in keys)
    reason = record.read(run).exports.gguf
    # Gemma's full head is one of them too, but nothing could be done with it anyway.
    assert others == ("refuses" in reason or settings == ("gemma", "head=full"))


@pytest.mark.parametrize("settings", CONVERTED, ids=" ".join)
def test_scales_that_come_out_wrong_are_those_that_are_not_alpha_over_r(settings, trained):
    run = trained(*settings)
    alpha = json.loads((run / "adapter" / "adapter_config.json").read_text())["lora_alpha"]
    layers = [layer for layer in stock(run).modules() if isinstance(layer, LoraLayer)]
    right = [
        layer.scaling["default"] == pytest.approx(alpha / layer.r["default"]) for layer in layers
    ]
    reason = record.read(run).exports.gguf
    assert len(right) > 2 and all(right) == ("scales" not in reason and "alpha" not in reason)
