"""Which modules get an adapter: names checked here, the choice left to PEFT."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorabench import model as base_model
from lorabench.config import Config, ConfigErrors, did_you_mean, model_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = {"attn", "self_attn", "attention", "self_attention", "cross_attn", "crossattention"}


def resolve_modules(skeleton: PreTrainedModel, config: Config) -> list[str]:
    """Every module that gets a LoRA adapter, by full name, in the model's order.

    Args:
        skeleton: the base model on the meta device.
    Raises:
        ConfigErrors: a name matches nothing, or nothing is left to adapt.
    """
    targets = config.target_modules
    head = base_model.output_head(skeleton)
    head_name = head[0] if head else None
    linear = [
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name != head_name
    ]
    worth_naming = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    chosen: list[str] | str
    if targets.select == "auto":
        model_type = skeleton.config.model_type
        if model_type not in PEFT_TARGETS:
            raise ConfigErrors(
                f"target_modules: PEFT has default modules for {len(PEFT_TARGETS)} architectures, "
                f"'{model_type}' is not among them; use target_modules=all-linear, or "
                f"target_modules=custom with target_modules.names out of: {worth_naming}"
            )
        default = PEFT_TARGETS[model_type]
        chosen = default if isinstance(default, str) else list(default)
    elif targets.select == "attention":
        chosen = [name for name in linear if _is_attention(name)]
    elif targets.select == "mlp":
        chosen = [n for n in linear if re.search(r"\.\d+\.", n) and not _is_attention(n)]
    elif targets.select == "all-linear":
        chosen = "all-linear"
    else:
        chosen = targets.names
        if isinstance(chosen, list):
            _must_match("target_modules.names", chosen, skeleton)
    if not chosen:
        raise ConfigErrors(
            f"target_modules: '{targets.select}' must match a linear layer of base model "
            f"'{model_name(config.model)}'; it matches none; use target_modules=custom with "
            f"target_modules.names out of: {worth_naming}"
        )

    adapted = _wrapped_by_peft(skeleton, chosen, config)
    if head_name in adapted and targets.select == "custom":
        raise ConfigErrors(
            f"target_modules.names: the head ({head_name}) belongs to the head policy; got "
            f"{targets.names!r}; leave it out and use head=lora"
        )
    if isinstance(chosen, list) and targets.select == "custom":
        # A router is a module and no linear layer: a name can match and still adapt nothing.
        _must_match("target_modules.names", chosen, skeleton, among=adapted)
    _must_match("target_modules.exclude", targets.exclude, skeleton, among=adapted)
    adapted = [n for n in adapted if not any(_ends_with(n, e) for e in targets.exclude)]
    if config.head.policy == "lora":
        if head_name is None:
            raise ConfigErrors(
                f"head: base model '{model_name(config.model)}' has no head; use head=exclude"
            )
        adapted.append(head_name)
    if not adapted:
        raise ConfigErrors(
            "target_modules.exclude: must leave at least one module to adapt; it takes them all"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        for name in getattr(config.lora, key) or ():
            if not any(re.fullmatch(rf"(.*\.)?{name}", module) for module in adapted):
                raise ConfigErrors(
                    f"lora.{key}: every entry must match an adapted module; unmatched: "
                    f"{did_you_mean(name, {m.rpartition('.')[2] for m in adapted})}"
                )
    return adapted


def _is_attention(name: str) -> bool:
    return not ATTENTION.isdisjoint(name.split("."))


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _must_match(
    key: str, names: Iterable[str], skeleton: PreTrainedModel, among: list[str] | None = None
) -> None:
    modules = among if among is not None else [name for name, _ in skeleton.named_modules() if name]
    known = {name.rpartition(".")[2] for name in modules} | set(modules)
    unmatched = [n for n in names if not any(_ends_with(module, n) for module in modules)]
    if unmatched:
        what = "an adapted module" if among is not None else "a module"
        raise ConfigErrors(
            f"{key}: every name must match {what} of base model "
            f"'{skeleton.config.model_type}'; unmatched: "
            + ", ".join(did_you_mean(name, sorted(known)) for name in unmatched)
        )


def _wrapped_by_peft(
    skeleton: PreTrainedModel, chosen: list[str] | str, config: Config
) -> list[str]:
    """The modules PEFT wraps for this choice, learnt by letting it wrap a skeleton."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(
                base_model.share(skeleton),
                LoraConfig(r=1, target_modules=chosen, task_type="CAUSAL_LM"),
                low_cpu_mem_usage=True,
            )
    except (ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigErrors(
            f"target_modules: PEFT refuses {chosen!r} on base model "
            f"'{model_name(config.model)}': {first}"
        ) from error
    order = {name: i for i, (name, _) in enumerate(skeleton.named_modules())}
    return sorted(wrapped.targeted_module_names, key=order.__getitem__)
