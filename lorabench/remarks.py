"""What a plan says beside its numbers: lengths that do not fit the base, and what may surprise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorabench import identity, machine
from lorabench import model as base_model
from lorabench.config import Config, model_name


def position_errors(config: Config, base: Any) -> list[str]:
    """Examples, or prompts with the answers written to them, beyond the base's positions."""
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if not positions:
        return []
    longest, name = config.data.max_length, model_name(config.model)
    if longest > positions:
        return [
            f"data.max_length: must be at most the {positions} positions of base model "
            f"'{name}'; got {longest}; set data.max_length={positions} or less"
        ]
    asked = any(map(identity.is_generated, identity.wanted_metrics(config)))
    new = config.data.answer_max_new_tokens
    if asked and longest - 1 + new > positions:  # a prompt leaves a token to the completion
        remedy = (
            f"set data.answer_max_new_tokens={positions - longest + 1} or less, or a smaller "
            f"data.max_length"
            if positions > longest
            else f"set a data.max_length below {positions}"
        )
        return [
            f"data.answer_max_new_tokens: prompt and answer must fit the {positions} positions of "
            f"base model '{name}'; got {new} after prompts of up to {longest - 1} tokens "
            f"(data.max_length); {remedy}"
        ]
    return []


def warnings(config: Config, base: Any) -> list[str]:
    """Say what a setting means on this base and this machine, where a user may not expect it."""
    from transformers import AutoConfig

    found = []
    if config.trainer.warmup_steps >= config.trainer.num_steps:
        found.append("trainer.warmup_steps: the whole run is warm-up; lr never reaches its peak")
    patience, every = config.trainer.patience, config.trainer.eval_every
    if patience is not None and patience * every >= config.trainer.num_steps:
        found.append(
            f"trainer.patience: {patience} evaluations, one every {every} steps, are all of the run"
        )
    if config.model.dtype == "bfloat16" and machine.choose_device(config.trainer.device) == "cpu":
        found.append(
            "model.dtype: bfloat16 is rounded more than float32 and, on most CPUs, slower; on this "
            "CPU consider model.dtype=float32"
        )
    was = [name for name in base.config.architectures or () if "SequenceClassification" in name]
    if config.task == "seq_cls" and was:
        found.append(f"the checkpoint is a classifier itself ({was[0]}): its head is replaced")
    where = base_model.location(config.model)
    if Path(where).is_dir():
        original = AutoConfig.from_pretrained(where, trust_remote_code=False)
        for key, value in base_model.random_settings(original).items():
            found.append(f"the base's own {key}={value:g} is switched off: only lora_dropout acts")
    return found


def narrow(base: Any, ranks: dict[str, int]) -> list[str]:
    """Say where r is more than a module has rows or columns: PEFT takes it without a word."""
    sides = {name: min(base.get_submodule(name).weight.shape) for name in ranks}
    below: dict[int, list[str]] = {}
    for name, r in ranks.items():
        if r > sides[name]:
            below.setdefault(r, []).append(name)
    return [
        f"lora.r: {r} is more than the smaller side of {len(names)} module"
        f"{'s' if len(names) > 1 else ''} (such as {names[0]}: {sides[names[0]]}): ranks above "
        f"that add parameters without adding capacity"
        for r, names in below.items()
    ]
