"""LoRA modules on a base: which ones, their seeded weights, their files.

PEFT decides which modules are wrapped, their shapes and scales; this room resolves names before
PEFT sees them, seeds every module by its name, and reads and writes plain PEFT folders.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorabench import model as base_model
from lorabench.config import Config, ConfigErrors, did_you_mean, lora_alpha, model_name

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CHANGES_BASE = ("pissa", "olora")  # inits that take B A out of the base weight
ADAPTER = "default"  # a name PEFT's substring filters cannot confuse with a module
ATTENTION = {"attn", "self_attn", "attention", "self_attention", "cross_attn", "crossattention"}


# --- which modules ---------------------------------------------------------------------------


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


# --- injection -------------------------------------------------------------------------------


def peft_config(config: Config, modules: list[str], head_name: str | None) -> LoraConfig:
    """PEFT's own config for one run, target modules explicit."""
    lora = config.lora
    bias: Any = lora.bias
    alpha: Any = lora_alpha(lora)  # PEFT says int and takes any number
    init: Any = True if lora.init == "default" else lora.init
    return LoraConfig(
        task_type="CAUSAL_LM",
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
        modules_to_save=[head_name] if config.head.policy == "full" and head_name else None,
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
    # Initialisations that are PEFT's own (pissa, olora) draw from the global stream.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(config.seeds.init)
        warnings.simplefilter("ignore")  # tied-layer warnings: the plan says it in full
        wrapped = get_peft_model(
            tree,
            peft_config(config, modules, head[0] if head else None),
            adapter_name=ADAPTER,
            low_cpu_mem_usage=False,
        )
    seed_weights(wrapped, config)
    dtype = torch.float64 if config.trainer.dtype == "float64" else torch.float32
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return wrapped


def attach_skeleton(skeleton: PreTrainedModel, config: Config, modules: list[str]) -> PeftModel:
    """The adapter on the meta device: names and shapes of everything a run trains."""
    head = base_model.output_head(skeleton)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = peft_config(config, modules, head[0] if head else None)
        if settings.init_lora_weights not in (True, "gaussian"):
            settings.init_lora_weights = True  # pissa and olora need weights; shapes are the same
        return get_peft_model(
            base_model.share(skeleton, owned=lambda name: name.endswith("bias")),
            settings,
            adapter_name=ADAPTER,
            low_cpu_mem_usage=True,
        )


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


def key(*parts: Any) -> int:
    """A seed that depends on all parts and nothing else (63 bits of their sha256)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def initial_a(seed: int, name: str, r: int, in_features: int, init: str = "default") -> Tensor:
    """The initial A of one module, shape (r, in_features), float32, on the CPU.

    Row i depends only on (seed, name, in_features, i): r=16 is the first 16 rows of r=64.
    Distribution: PEFT's, Kaiming-uniform with a = sqrt(5), so U(-1/sqrt(in), 1/sqrt(in)); for
    `gaussian` N(0, 1/r^2).
    """
    generator = torch.Generator().manual_seed(key("init", seed, name))
    rows = []
    for _ in range(r):  # row by row: torch's normal_ fills a whole tensor in blocks
        row = torch.empty(in_features)
        if init == "gaussian":
            rows.append(row.normal_(generator=generator) / r)
        else:
            bound = math.sqrt(6 / ((1 + 5) * in_features))
            rows.append(row.uniform_(-bound, bound, generator=generator))
    return torch.stack(rows)


def seed_weights(wrapped: nn.Module, config: Config) -> None:
    """Overwrite PEFT's draw from the global stream by draws keyed by (seeds.init, module name)."""
    if config.lora.init not in ("default", "gaussian"):
        return
    layer: Any
    for name, layer in lora_layers(wrapped).items():
        seed, init = config.seeds.init, config.lora.init
        if ADAPTER in layer.lora_A:
            weight = layer.lora_A[ADAPTER].weight
            drawn = initial_a(seed, name, weight.shape[0], weight.shape[1], init)
        else:  # an embedding: A is zero and B is drawn, N(0, 1), shape (out, r)
            weight = layer.lora_embedding_B[ADAPTER]
            drawn = initial_a(seed, name, weight.shape[1], weight.shape[0], "gaussian").T
            drawn = drawn * weight.shape[1]
        with torch.no_grad():
            weight.copy_(drawn)


def lora_layers(wrapped: nn.Module) -> dict[str, LoraLayer]:
    """PEFT's LoRA layers by the name their module has in the base."""
    tree: Any = wrapped.get_base_model() if isinstance(wrapped, PeftModel) else wrapped
    return {name: m for name, m in tree.named_modules() if isinstance(m, LoraLayer)}


def trainable(wrapped: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by their name in the wrapped model, in model order."""
    return {name: p for name, p in wrapped.named_parameters() if p.requires_grad}


# --- dropout ---------------------------------------------------------------------------------


@dataclass
class Clock:
    """Where a run is: what its dropout masks are keyed by."""

    seed: int
    step: int = 0
    micro_step: int = 0
    training: bool = False
    window: tuple[slice, int] | None = None  # while the head sees some of its rows: which, of all


class KeyedDropout(nn.Module):
    """Dropout whose mask depends only on (seeds.dropout, step, micro-step, module).

    An extra evaluation, another run or a resume therefore leaves every mask as it was.
    """

    def __init__(self, p: float, clock: Clock, name: str):
        super().__init__()
        self.p, self.clock, self.name = p, clock, name

    def mask(self, shape: torch.Size, device: torch.device) -> Tensor:
        """The kept positions, scaled by 1 / (1 - p); float32."""
        seed = key("dropout", self.clock.seed, self.clock.step, self.clock.micro_step, self.name)
        generator = torch.Generator(device).manual_seed(seed)
        if self.clock.window is not None:
            chunk, rows = self.clock.window
            whole = torch.Size((*shape[:-2], rows, shape[-1]))
            kept = torch.rand(whole, generator=generator, device=device)[..., chunk, :] >= self.p
        else:
            kept = torch.rand(shape, generator=generator, device=device) >= self.p
        return kept.float() / (1 - self.p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.clock.training:
            return x
        return x * self.mask(x.shape, x.device).to(x.dtype)


def key_dropout(wrapped: nn.Module, clock: Clock) -> None:
    """Replace PEFT's dropout modules by keyed ones."""
    for name, layer in lora_layers(wrapped).items():
        dropout = layer.lora_dropout[ADAPTER]
        if isinstance(dropout, nn.Dropout):
            layer.lora_dropout[ADAPTER] = KeyedDropout(dropout.p, clock, name)


# --- files and hashes ------------------------------------------------------------------------


def state_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def adapter_state(wrapped: PeftModel) -> dict[str, Tensor]:
    """What a saved adapter holds, under PEFT's names; never a weight of the base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model_state_dict(wrapped, adapter_name=ADAPTER, save_embedding_layers=False)


def save(tensors: Mapping[str, Tensor], settings: LoraConfig, folder: Path) -> str:
    """Write an adapter in plain PEFT format and return the hash of its tensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    # PEFT holds names in sets, whose order changes from process to process.
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    for name in ("target_modules", "modules_to_save"):
        if isinstance(content.get(name), list):
            content[name] = sorted(content[name])
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return state_hash(state)
