"""Ten architectures from configs, each through the command line and back by plain PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed, scores
from safetensors import safe_open

from lorabench import cli, data, versions
from lorabench import model as base_model

# The head policies of the sweep besides exclude; a copy of BERT's head would train its bias too.
HEADS = {
    "gemma": "lora",
    "gemma2": "full",
    "gemma3": "lora",
    "llama": "full",
    "qwen2": "lora",
    "qwen3": "full",
    "qwen3_moe": "lora",
    "gpt2": "full",
    "opt": "lora",
    "bert": "lora",
}
PREFIX = "base_model.model."


def command(kind: str, folder: Path, jsonl: Path, *more: str) -> list[str]:
    return [
        "model=local",
        f"model.path={folder}",
        # transformers has no soft-capping of attention under sdpa, and refuses it
        *(["model.attn_implementation=eager"] if kind == "gemma2" else []),
        "data=jsonl",
        f"data.train.path={jsonl}",
        "data.max_length=64",
        "trainer=smoke",
        "trainer.steps=3",
        "trainer.warmup_steps=0",
        "trainer.eval_examples=null",
        "tracker=none",
        *more,
    ]


def nll_by_plain_peft(adapter: Path, words: list[str]) -> list[float]:
    """Each test example's nll a token, from transformers and PEFT alone."""
    from peft import AutoPeftModelForCausalLM

    config = composed(*words)
    settings = {"attn_implementation": config.model.attn_implementation}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT, about tied layers
        model: Any = AutoPeftModelForCausalLM.from_pretrained(adapter, **settings).eval()
    tokenizer = base_model.tokenizer(config.model)
    tokens = data.tokenise(data.load(config.data).test, tokenizer, config.data)
    values = []
    for ids, start in zip(tokens.input_ids, tokens.completion_start, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        values.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:])).item())
    return values


@pytest.mark.parametrize("kind", HEADS)
def test_an_architecture_trains_and_comes_back_by_plain_peft(
    kind: str,
    tiny_folder: Callable[[str], Path],
    jsonl: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tiny_folder(kind)
    words = command(kind, folder, jsonl, f"output_dir={tmp_path / 'out'}")
    weights = (folder / "model.safetensors").read_bytes()
    code = cli.main(["train", "-m", *words, f"head=exclude,{HEADS[kind]}"])
    if kind == "qwen3_moe" and (too_old := versions.too_old_for_experts()):
        assert code == 2 and too_old in capsys.readouterr().err
        return
    assert code == 0
    paths = sorted((tmp_path / "out").glob("default/*/record.json"))
    assert len(paths) == 2
    checksum = base_model.checksum(base_model.load(composed(*words).model, "cpu"))
    assert (folder / "model.safetensors").read_bytes() == weights
    for path in paths:
        record = json.loads(path.read_text())
        assert record["status"] == "finished" and record["steps_done"] == 3
        assert record["plan"]["pack"]["size"] == (1 if kind == "qwen3_moe" else 2)
        assert record["hashes"]["base"] == checksum
        assert record["hashes"]["adapter"] != record["hashes"]["initial_adapter"]

        planned = record["plan"]
        wanted = {f"{PREFIX}{m}.lora_{x}.weight" for m in planned["lora_modules"] for x in "AB"}
        wanted |= {f"{PREFIX}{module}.weight" for module in planned["saved_modules"]}
        with safe_open(path.parent / "adapter" / "adapter_model.safetensors", "pt") as tensors:
            assert set(tensors.keys()) == wanted

        nll = scores(record)["test"]["nll"]
        values = nll_by_plain_peft(path.parent / "adapter", words)
        assert nll["num_examples"] == len(values) > 1
        # The bound: float32 sums of other shapes, one example at a time.
        assert abs(nll["value"] - sum(values) / len(values)) < 1e-6


def test_the_ten_are_ten_architectures(tiny_folder: Callable[[str], Path]) -> None:
    types = {
        json.loads((tiny_folder(kind) / "config.json").read_text())["model_type"] for kind in HEADS
    }
    assert types == {
        "gemma", "gemma2", "gemma3_text", "llama", "qwen2", "qwen3", "qwen3_moe", "gpt2", "opt",
        "bert",
    }  # fmt: skip
