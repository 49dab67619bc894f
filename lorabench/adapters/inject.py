"""PEFT puts the adapter of a run on a base whose tensors are shared and never written."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorabench import model as base_model
from lorabench import tasks
from lorabench.adapters.seeding import drawn_head, initial_a, initial_ab
from lorabench.config import Config, ConfigErrors, and_more, first_line, lora_alpha, model_name

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CHANGES_BASE = ("pissa", "olora")  # inits that take B A out of the base weight
NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
ADAPTER = "default"  # a name PEFT's substring filters cannot confuse with a module


def peft_config(config: Config, modules: list[str], head_name: str | None) -> LoraConfig:
    """PEFT's own config for one run, target modules explicit."""
    lora = config.lora
    bias: Any = lora.bias
    alpha: Any = lora_alpha(lora)  # PEFT says int and takes any number
    init: Any = True if lora.init == "default" else lora.init
    # Of a classifier PEFT itself names the head to save.
    copied = config.head.policy == "full" and config.task != "seq_cls"
    return LoraConfig(
        task_type=tasks.PEFT_TYPES[config.task],
        base_model_name_or_path=base_model.location(config.model),
        revision=config.model.revision,
        r=lora.r,
        lora_alpha=alpha,
        lora_dropout=lora.lora_dropout,
        bias=bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=init,
        rank_pattern=dict(lora.rank_pattern or {}),
        alpha_pattern=dict(lora.alpha_pattern or {}),
        target_modules=list(modules),
        modules_to_save=[head_name] if copied and head_name else None,
    )


def attach(base: PreTrainedModel, config: Config, modules: list[str]) -> PeftModel:
    """The base with one run's adapter, weights seeded by module name; the base is left as it was.

    Args:
        base: a frozen base model; its tensors are shared, never written.
        modules: from `resolve_modules`.
    """
    head = base_model.output_head(base)
    owned = _trained_biases(base, config, modules)
    if config.lora.init in CHANGES_BASE:
        owned |= {f"{name}.weight" for name in modules}
    tree = base_model.share(base, owned=owned.__contains__)
    settings = peft_config(config, modules, head[0] if head else None)
    asked = settings.init_lora_weights
    if config.lora.init == "orthogonal":
        # seed_weights draws A and B; until then B = 0, so that DoRA's norms are the base weight's.
        settings.init_lora_weights = True
    # Initialisations that are PEFT's own (pissa, olora) draw from the global stream.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(config.seeds.init)
        warnings.simplefilter("ignore")  # tied-layer warnings: the plan says it in full
        wrapped = get_peft_model(tree, settings, adapter_name=ADAPTER, low_cpu_mem_usage=False)
    _name_init(wrapped, asked)
    seed_weights(wrapped, config)
    raise_precision(wrapped, torch.float64 if config.trainer.dtype == "float64" else torch.float32)
    if config.task == "seq_cls" and head:
        copy_of_head: Any = wrapped.get_base_model().get_submodule(head[0])
        with torch.no_grad():
            for part, parameter in copy_of_head.modules_to_save[ADAPTER].named_parameters():
                parameter.copy_(initial_head(base, config, part))
    return wrapped


def _name_init(wrapped: PeftModel, init: Any) -> None:
    """Put the init that was asked for in the config that is saved with the adapter."""
    settings: Any = wrapped.peft_config[ADAPTER]
    settings.init_lora_weights = init


# Modules that compute with a float32 bias over a bfloat16 base; others may add it as it is, and
# pass float32 on to layers that take none (FalconLinear).
MIXED_PRECISION = (nn.LayerNorm, nn.Linear, Conv1D)


def raise_precision(wrapped: PeftModel, dtype: torch.dtype) -> None:
    """Hold what trains in `dtype`: a bfloat16 parameter would lose most of its small updates."""
    for name, parameter in list(wrapped.named_parameters()):
        if not parameter.requires_grad or parameter.dtype == dtype:
            continue
        module = wrapped.get_submodule(name.rpartition(".")[0])
        if name.endswith(".bias") and type(module) not in MIXED_PRECISION:
            continue
        parameter.data = parameter.data.to(dtype)
        if isinstance(module, nn.LayerNorm):  # whose kernel wants weight and bias of one dtype
            module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)


def attach_skeleton(
    skeleton: PreTrainedModel,
    config: Config,
    modules: list[str],
    known: dict[str, PeftModel] | None = None,
) -> PeftModel:
    """Return the adapter on the meta device: names and shapes of everything a run trains.

    Args:
        known: what earlier calls returned for this skeleton, kept by the caller. Runs whose
            adapters differ in seeds or rates alone share one: it is to be read, not changed.
    Raises:
        ConfigErrors: PEFT refuses a module, or leaves one out.
    """
    known = {} if known is None else known
    lora = dataclasses.replace(config.lora, loraplus_lr_ratio=None)  # a rate
    key = repr((config.model, config.task, lora, config.head, modules))
    if key not in known:
        known[key] = _attach_skeleton(skeleton, config, modules)
    return known[key]


def wrap_skeleton(skeleton: PreTrainedModel, settings: LoraConfig) -> PeftModel:
    """Return an adapter of these settings on the meta device, by PEFT alone.

    Raises:
        ValueError, TypeError: PEFT refuses them on this base.
    """
    own = copy.deepcopy(settings)
    own.init_lora_weights = True  # others need real weights; shapes are the same
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(
            base_model.share(skeleton, owned=lambda name: name.endswith("bias")),
            own,
            adapter_name=ADAPTER,
            low_cpu_mem_usage=True,
        )


def _attach_skeleton(skeleton: PreTrainedModel, config: Config, modules: list[str]) -> PeftModel:
    head = base_model.output_head(skeleton)
    asked = config.target_modules.names or config.target_modules.select
    refused = f"target_modules: PEFT refuses {asked!r} on base model '{model_name(config.model)}'"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = peft_config(config, modules, head[0] if head else None)
        asked_init = settings.init_lora_weights
        if asked_init not in (True, "gaussian"):
            settings.init_lora_weights = True  # others need real weights; shapes are the same
        try:
            wrapped = get_peft_model(
                base_model.share(skeleton, owned=lambda name: name.endswith("bias")),
                settings,
                adapter_name=ADAPTER,
                low_cpu_mem_usage=True,
            )
        except (ValueError, TypeError) as error:
            why = first_line(error).partition(". ")[0]
            if found := re.search(r"Module '(\w+)' is incompatible", why):
                why += f"; set 'target_modules.exclude=[{found[1]}]'"
            raise ConfigErrors(f"{refused}: {why}") from error
    _name_init(wrapped, asked_init)
    missing = sorted(set(modules) - set(wrapped.targeted_module_names))
    if missing:
        raise ConfigErrors(f"{refused}: it leaves out {and_more(map(repr, missing))}")
    return wrapped


def _trained_biases(base: PreTrainedModel, config: Config, modules: list[str]) -> set[str]:
    """Base parameters that bias=all or lora_only trains: each run needs its own."""
    names = [name for name, _ in base.named_parameters() if name.rpartition(".")[2] == "bias"]
    if config.lora.bias == "all":
        return set(names)
    if config.lora.bias == "lora_only":
        return {name for name in names if name.rpartition(".")[0] in set(modules)}
    return set()


def check_bias(base: PreTrainedModel, config: Config, modules: list[str]) -> None:
    """Refuse a bias policy that trains nothing, which PEFT takes without a word."""
    policy = config.lora.bias
    if policy != "none" and not _trained_biases(base, config, modules):
        there = sum(name.rpartition(".")[2] == "bias" for name, _ in base.named_parameters())
        raise ConfigErrors(
            f"lora.bias: {policy} must find a bias to train; base model "
            f"'{model_name(config.model)}' has {there}, none of them on an adapted module; "
            f"use lora.bias=none"
        )


def check_saved(wrapped: PeftModel, base: PreTrainedModel, config: Config) -> None:
    """Refuse copies nobody asked for: PEFT finds modules_to_save by the end of a name, undotted."""
    head = base_model.output_head(base)
    copied = {owner(name) for name in trainable(wrapped) if ".modules_to_save." in name}
    more = sorted(copied - {head[0] if head else ""})
    if more:
        raise ConfigErrors(
            f"head: full must train a copy of {head[0] if head else 'the head'} alone; on base "
            f"model '{model_name(config.model)}' PEFT would also train {', '.join(more)}, whose "
            f"name ends alike; use another base or task"
        )


def check_init(base: PreTrainedModel, config: Config, modules: list[str]) -> None:
    """Refuse an init that would change the embeddings through a tied head."""
    head = base_model.output_head(base)
    tied = head is not None and head[0] in modules and base_model.is_tied(base)
    if config.lora.init in CHANGES_BASE and tied:
        raise ConfigErrors(
            f"lora.init: {config.lora.init} changes the weight of every adapted module, and the "
            f"head of '{model_name(config.model)}' is tied to its embeddings; use head=exclude or "
            f"lora.init=default"
        )


def as_plain_lora(
    state: Mapping[str, Tensor], initial: Mapping[str, Tensor], settings: LoraConfig
) -> tuple[dict[str, Tensor], LoraConfig]:
    """An adapter of an init that changed the base, as one of twice the rank on the base as it was.

    W_res + s B A = W + s (B A - B0 A0), so A' = [A; A0] and B' = [B, -B0] at the same scale.
    Source: PEFT's `subtract_mutated_init`.
    """
    joined = {}
    for name, tensor in state.items():
        if "lora_A" in name:
            joined[name] = torch.cat([tensor, initial[name]], 0)
        elif "lora_B" in name:
            joined[name] = torch.cat([tensor, -initial[name]], 1)
        else:
            joined[name] = tensor
    plain: Any = copy.deepcopy(settings)
    plain.init_lora_weights = True
    grown: Any = math.sqrt(2) if plain.use_rslora else 2  # so that the scale stays
    plain.r, plain.lora_alpha = 2 * plain.r, plain.lora_alpha * grown
    plain.rank_pattern = {name: 2 * r for name, r in (plain.rank_pattern or {}).items()}
    plain.alpha_pattern = {n: alpha * grown for n, alpha in (plain.alpha_pattern or {}).items()}
    return joined, plain


def seed_weights(wrapped: nn.Module, config: Config) -> None:
    """Overwrite PEFT's draw from the global stream by draws keyed by (seeds.init, module name)."""
    if config.lora.init in CHANGES_BASE:
        return
    layer: Any
    for name, layer in lora_layers(wrapped).items():
        seed, init = config.seeds.init, config.lora.init
        if ADAPTER in layer.lora_A:
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            r, in_features = a.shape
            drawn_a, drawn_b = initial_ab(seed, name, r, in_features, b.shape[0], init)
            with torch.no_grad():
                a.copy_(drawn_a)
                b.copy_(drawn_b)
        else:  # an embedding, with any init: A is zero and B is drawn, N(0, 1), shape (out, r)
            weight = layer.lora_embedding_B[ADAPTER]
            drawn = initial_a(seed, name, weight.shape[1], weight.shape[0], "gaussian").T
            with torch.no_grad():
                weight.copy_(drawn * weight.shape[1])


def initial_head(base: PreTrainedModel, config: Config, part: str) -> Tensor:
    """What a run's copy of the head starts from: the base's, or of a classifier, a draw.

    Args:
        part: weight or bias.
    """
    head = base_model.output_head(base)
    assert head is not None
    name, module = head
    own: Tensor = getattr(module, part)
    if config.task != "seq_cls" or part == "bias":
        return own  # a classifier's is zero
    std = getattr(base.config.get_text_config(), "initializer_range", 0.02)  # as transformers does
    return drawn_head(config.seeds.init, name, own.shape[0], own.shape[1], std)


def lora_layers(wrapped: nn.Module) -> dict[str, LoraLayer]:
    """PEFT's LoRA layers by the name their module has in the base."""
    tree: Any = wrapped.get_base_model() if isinstance(wrapped, PeftModel) else wrapped
    return {name: m for name, m in tree.named_modules() if isinstance(m, LoraLayer)}


def owner(name: str) -> str:
    """The module of the base that a trained parameter of this name belongs to."""
    inner = name.removeprefix("base_model.model.")
    # PEFT's own parts of a module; else a bias, which is the module's own parameter.
    module, *own = re.split(r"\.(?:base_layer|lora_\w+|modules_to_save)\.", inner, maxsplit=1)
    return module if own else inner.rpartition(".")[0]


def decayed(wrapped: nn.Module) -> set[str]:
    """Return the names of the parameters that weight decay shrinks, as the HF Trainer chooses them.

    Neither biases nor norms. Source: `Trainer.get_decay_parameter_names`; the Trainer itself takes
    a second to import.
    """
    from transformers.trainer_pt_utils import get_parameter_names

    return set(get_parameter_names(wrapped, [nn.LayerNorm], NOT_DECAYED))


def trainable(wrapped: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by their name in the wrapped model, in model order."""
    return {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
