"""Both halves of a trap: plain PEFT as a user writes it on a model of two layers, and lorabench."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from conftest import composed
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import SMALL, tiny_config
from torch import Tensor
from transformers.utils import logging as transformers_logging

from lorabench import plan
from lorabench.config import Config, ConfigErrors
from lorabench.data import IGNORED
from lorabench.pack import Batch
from lorabench.zoo import TINY_GEMMA

VOCAB = 64
IDS = torch.randint(3, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
# Said on every wrap or save, about nothing: a renaming in transformers, a base that has no folder.
NOISE = ("is_gradient_checkpointing", "Could not find a config file in ")
transformers_logging.disable_progress_bar()  # standard error is for what is said


# --- plain PEFT ------------------------------------------------------------------------------


def causal(kind: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A tiny causal language model, the same at every call."""
    config = tiny_config(kind, VOCAB)
    for key, value in changes.items():
        assert hasattr(config, key), key
        setattr(config, key, value)
    return built("AutoModelForCausalLM", config, seed)


def built(auto: str, config: Any, seed: int = 0) -> Any:
    """The model of a transformers config, in evaluation mode, seeded."""
    import transformers

    torch.manual_seed(seed)
    return getattr(transformers, auto).from_config(config).eval()


def experts(kind: str) -> Any:
    """A tiny mixture of experts."""
    import transformers

    sizes = SMALL | {"vocab_size": VOCAB, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    sizes |= {"num_local_experts": 4, "num_experts": 4, "bos_token_id": 2, "eos_token_id": 1}
    maker = {"mixtral": transformers.MixtralConfig, "qwen3_moe": transformers.Qwen3MoeConfig}
    return built("AutoModelForCausalLM", maker[kind](**sizes))


def lora(**changes: Any) -> LoraConfig:
    """LoRA on q_proj at scale 2, unless said otherwise."""
    settings: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
    }
    return LoraConfig(**(settings | changes))


def said(act: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What came of it (a refusal comes back as the exception), and every warning on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = act()
        except Exception as error:
            result = error
    texts = [str(warning.message) for warning in caught]
    return result, [text for text in texts if not any(noise in text for noise in NOISE)]


def quiet(act: Callable[[], Any]) -> Any:
    """What came of it, warnings dropped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return act()


def wrapped(model: Any = None, seed: int = 1, **changes: Any) -> PeftModel:
    """A model with a fresh adapter, warnings dropped."""
    model = causal() if model is None else model
    torch.manual_seed(seed)
    return quiet(lambda: get_peft_model(model, lora(**changes))).eval()


def reloaded(model: Any, folder: Path) -> PeftModel:
    """A saved adapter on a model, warnings dropped."""
    return quiet(lambda: PeftModel.from_pretrained(model, str(folder))).eval()


def saved(wrapped: PeftModel, folder: Path) -> Path:
    """The adapter in a folder, warnings dropped."""
    quiet(lambda: wrapped.save_pretrained(str(folder)))
    return folder


def moved(wrapped: Any, seed: int = 3) -> Any:
    """Every trainable parameter moved as a training would, at once."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def trains(wrapped: Any) -> list[str]:
    """Names of what requires a gradient."""
    return [name for name, p in wrapped.named_parameters() if p.requires_grad]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return float((a - b).abs().max())


def leaves(names: Any) -> set[str]:
    """Last parts of dotted names."""
    return {name.rpartition(".")[2] for name in names}


# --- lorabench -------------------------------------------------------------------------------


def folder_of(model: Any, folder: Path) -> Path:
    """A checkpoint folder lorabench plans on."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_GEMMA / name, folder)
    return folder


@cache  # a fifth of a second each, and most differ in the folder alone
def _composed(*overrides: str) -> Config:
    return composed("tracker=none", *overrides)


def config_of(folder: Path | None, *overrides: str) -> Config:
    """lorabench's config for a checkpoint folder, or for the embedded base."""
    if folder is None:
        return copy.deepcopy(_composed(*overrides))
    config = copy.deepcopy(_composed("model=local", "model.path=.", *overrides))
    config.model.path = str(folder)
    return config


def planned(folder: Path | None, *overrides: str) -> plan.Plan:
    """lorabench's plan, nothing loaded."""
    return plan.make(config_of(folder, *overrides))


def batch(runs: int) -> Batch:
    """IDS for every run of a pack, every token but the first a target."""
    labels = IDS.clone()
    labels[:, 0] = IGNORED
    return Batch.make([IDS.numpy()], [labels.numpy()], [runs])


def refusal(folder: Path | None, *overrides: str) -> str:
    """The line lorabench refuses with."""
    try:
        planned(folder, *overrides)
    except ConfigErrors as error:
        (line,) = error.errors
        return line
    raise AssertionError(f"lorabench takes {' '.join(overrides)}")
