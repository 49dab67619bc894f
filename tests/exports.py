"""Runs to export, and their models by transformers and PEFT alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

PATTERNS = ["lora.rank_pattern={q_proj:2}", "lora.alpha_pattern={v_proj:3}"]
RUNS = [  # base, overrides; gemma, gpt2 and bert are tied
    ("gemma", "head=lora"),
    ("gemma", "lora.use_dora=true"),
    ("gemma", "head=lora", "lora.use_rslora=true", *PATTERNS),
    ("gemma", "head=full"),
    ("gemma", "target_modules=custom", "target_modules.names=[embed_tokens,q_proj]"),
    ("gpt2", "head=lora", "lora.bias=all"),
    ("gpt2", "lora.init=pissa"),
    ("bert", "head=lora"),
    ("bert", "head=full"),
    ("llama", "head=lora", "lora.use_dora=true", *PATTERNS),
    ("llama", "head=full", "lora.use_rslora=true"),
    ("llama", "lora.init=olora", "lora.use_rslora=true"),
    ("qwen2", "head=lora", "lora.bias=lora_only"),
]


def base_of(run: Path) -> str:
    return json.loads((run / "record.json").read_text())["config"]["model"]["path"]


def stock(run: Path) -> Any:
    """The base with the run's adapter, by transformers and PEFT alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base_of(run), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tied layers and renamed calls
        return PeftModel.from_pretrained(model, str(run / "adapter")).eval()


def loaded(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()
