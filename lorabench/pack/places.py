"""What PEFT trains of one run, tensor by tensor, and why some runs cannot share a base forward."""

from __future__ import annotations

import re
from dataclasses import dataclass

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorabench import adapters
from lorabench import model as base_model
from lorabench.config import Config
from lorabench.pack.layers import BIAS_OWNERS

PREFIX = "base_model.model."
KINDS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "modules_to_save.weight": "copy",
    "modules_to_save.bias": "copy_bias",
}


@dataclass
class Place:
    """One trained tensor of one run: what it is, and where it lies."""

    state_name: str  # its name in a saved adapter
    kind: str  # lora_A | lora_B | copy | copy_bias | bias
    module: str  # its module's name in the base
    shape: tuple[int, ...]  # as PEFT saves it
    decays: bool  # whether weight decay shrinks it

    @property
    def group_b(self) -> bool:
        """Whether LoRA+ gives it B's learning rate."""
        return adapters.is_group_b(self.state_name, len(self.shape))


def places(wrapped: PeftModel) -> list[Place]:
    """Everything PEFT would train of one run, in its order."""
    found = []
    decayed = adapters.decayed(wrapped)
    for name, parameter in adapters.trainable(wrapped).items():
        shape, decays = tuple(parameter.shape), name in decayed
        inner = name.removeprefix(PREFIX)
        state_name = name.replace(f".{adapters.ADAPTER}.", ".").replace(".modules_to_save.", ".")
        match = re.fullmatch(
            rf"(.*?)(?:\.base_layer)?\.(lora_A|lora_B|modules_to_save)"
            rf"\.{adapters.ADAPTER}\.(weight|bias)",
            inner,
        )
        kind = KINDS.get(f"{match[2]}.{match[3]}") if match else None
        if match and kind:
            found.append(Place(state_name, kind, match[1], shape, decays))
        elif inner.endswith(".bias") and "modules_to_save" not in inner:
            module = inner.removesuffix(".bias").removesuffix(".base_layer")
            found.append(Place(state_name, "bias", module, shape, decays))
        else:
            found.append(Place(state_name, "other", inner, shape, decays))
    return found


def why_alone(
    skeleton: PreTrainedModel, config: Config, modules: list[str], wrapped: PeftModel
) -> str | None:
    """The reason a run must train by itself on PEFT's own modules; None where it packs."""
    if config.lora.use_dora:
        return "DoRA rescales the base weight"
    if config.lora.init in adapters.CHANGES_BASE:
        return f"init={config.lora.init} changes the base weight"
    if adapters.experts(skeleton):
        return "experts route tokens of all runs together"
    tree = dict(skeleton.named_modules())
    for mixer in adapters.state_space(skeleton).values():
        return f"{type(mixer).__name__} computes with weights of its layers beside calling them"
    if any(name.endswith(".rel_embeddings") for name in tree):  # DeBERTa
        return "its layers project relative positions, which all runs would share"
    for name in modules:
        if not isinstance(tree[name], (nn.Linear, Conv1D)):
            return f"{name} is a {type(tree[name]).__name__}"
    head = base_model.output_head(skeleton)
    if head is None or not isinstance(head[1], nn.Linear):
        return "the head is no linear layer"
    if reason := _rope_of_the_longest(skeleton, config):
        return reason
    found = places(wrapped)
    for place in found:
        if place.kind == "other":
            return f"{place.state_name} is trained"
        if place.kind == "copy" and place.module != head[0]:
            return f"{place.module} is trained in full"
        if place.kind == "bias" and type(tree[place.module]) not in BIAS_OWNERS:
            return f"{place.module} is a {type(tree[place.module]).__name__}"
    trained = {place.state_name for place in found}
    for name in sorted(trained ^ set(adapters.adapter_state(wrapped))):
        return f"PEFT {'trains but does not save' if name in trained else 'saves untrained'} {name}"
    return None


def _rope_of_the_longest(skeleton: PreTrainedModel, config: Config) -> str | None:
    """Rotary embeddings that change for all texts of a batch as soon as one is long (Phi-3's)."""
    text = skeleton.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, dict)]
    limit = rope.get("original_max_position_embeddings") or getattr(
        text, "original_max_position_embeddings", None
    )
    if not {"longrope", "dynamic"}.intersection(kinds):
        return None
    limit = limit or text.max_position_embeddings
    if config.data.max_length <= limit:
        return None
    return f"texts beyond {limit} tokens change its rotary embeddings for the whole batch"
