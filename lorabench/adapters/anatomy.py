"""What a base holds beside its text layers: experts, their routers, and parts for other inputs.

Read off names and shapes, so that a skeleton is enough.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from lorabench import model as base_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUTERS = {"router", "shared_expert_gate"}  # wherever they stand
TOWERS = {"vision_tower", "vision_model", "visual", "audio_tower", "multi_modal_projector"}


def is_linear(module: nn.Module) -> bool:
    """What PEFT's all-linear calls linear."""
    return isinstance(module, (nn.Linear, Conv1D))


def experts(base: PreTrainedModel) -> dict[str, int]:
    """Modules that hold experts, with their number: one matrix an expert, or one module each.

    Convolutions and the probes of a vision tower have three dimensions too, and are none.
    """
    outside = towers(base)
    found = {}
    for name, module in base.named_modules():
        if name in outside or isinstance(module, _ConvNd):
            continue
        stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3 and len(p) > 1]
        if stacked:
            found[name] = len(stacked[0])
        elif name.endswith(".experts") and isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            found[name] = len(module)
    return found


def routers(base: PreTrainedModel) -> dict[str, str]:
    """Modules that choose experts, with the part of their name that says so.

    Beside the experts and with one output an expert, or of a known name.
    """
    beside: dict[str, set[int]] = {}
    holders = experts(base)
    for name, count in holders.items():
        beside.setdefault(name.rpartition(".")[0], set()).add(count)
    found = {}
    for name, module in base.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None or weight.dim() != 2 or any(_below(name, h) for h in holders):
            continue
        parts = name.split(".")
        outputs = weight.shape[1 if isinstance(module, Conv1D) else 0]
        known = [part for part in parts if part in ROUTERS]
        if known:
            found[name] = known[-1]
        elif outputs in beside.get(name.rpartition(".")[0], ()):
            found[name] = parts[-1]
    return found


def towers(base: PreTrainedModel) -> dict[str, str]:
    """Modules outside the text model, with the part of their name where they leave it.

    The head, which may lie beside the text model, belongs to it.
    """
    text = ""
    if base.config.get_text_config() is not base.config:
        decoder = base.get_decoder()
        text = next((name for name, module in base.named_modules() if module is decoder), "")
    head = base_model.output_head(base)
    inside = [name for name in (text, head[0] if head else "") if name]
    found = {}
    for name, _ in base.named_modules():
        parts = name.split(".")
        known = [part for part in parts if part in TOWERS]
        if known:
            found[name] = known[0]
        elif name and text and not any(_below(name, i) or _below(i, name) for i in inside):
            depth = next(i for i, part in enumerate(parts) if not _below(text, _up_to(parts, i)))
            found[name] = parts[depth]
    return found


def state_space(base: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the state-space mixers of a base, by name: those of Mamba and of its hybrids."""
    return {
        name: module
        for name, module in base.named_modules()
        if {"A_log", "D"} <= set(module._parameters)
    }


def uncalled(base: PreTrainedModel, names: list[str]) -> list[str]:
    """Return those of the linear layers that their mixer never calls (Mamba's dt_proj).

    It multiplies by their weight itself, so that an adapter on them changes nothing.
    """
    mixers = state_space(base)
    source = {kind: inspect.getsource(kind) for kind in set(map(type, mixers.values()))}
    found = []
    for name in names:
        holder, _, leaf = name.rpartition(".")
        if holder in mixers and f"self.{leaf}.weight @" in source[type(mixers[holder])]:
            found.append(name)
    return found


def _up_to(parts: list[str], depth: int) -> str:
    return ".".join(parts[: depth + 1])


def _below(name: str, above: str) -> bool:
    """Whether a module is another one, or inside it."""
    return name == above or name.startswith(f"{above}.")
