"""LoRA+: a learning rate for B that differs from A's, in the groups that PEFT forms.

Source: Hayou et al. 2024, arXiv:2402.12354; `peft.optimizers.create_loraplus_optimizer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lorabench.config import Config

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import PreTrainedModel

EMBEDDING_LR = 1e-6  # PEFT's default for loraplus_lr_embedding


def is_group_b(name: str, num_dims: int) -> bool:
    """Return whether a trained parameter gets B's learning rate.

    B does, and so does whatever has one dimension: biases and DoRA's magnitudes. A trained copy
    of the head is in group A, but for its bias.
    """
    return "lora_B" in name or num_dims == 1


def lr_factors(parameters: Mapping[str, nn.Parameter], config: Config) -> dict[str, float]:
    """Return what multiplies the run's learning rate for each trained parameter, by name.

    Args:
        parameters: from `trainable`.
    """
    ratio = config.lora.loraplus_lr_ratio
    factors = dict.fromkeys(parameters, 1.0)
    if ratio is None:
        return factors
    for name, parameter in parameters.items():
        if "lora_embedding_" in name:  # PEFT 0.19 does not recognise them, and has them in group A
            factors[name] = EMBEDDING_LR / config.trainer.lr
        elif is_group_b(name, parameter.dim()):
            factors[name] = ratio
    return factors


def embedding_notes(base: PreTrainedModel, config: Config, modules: Iterable[str]) -> list[str]:
    """Warn that LoRA+ trains the adapters of embeddings at a learning rate of their own."""
    if config.lora.loraplus_lr_ratio is None:
        return []
    return [
        f"lora.loraplus_lr_ratio: the adapter of {name} trains at lr {EMBEDDING_LR:g}, as PEFT's "
        f"LoRA+ sets it for embeddings, whatever trainer.lr is"
        for name in modules
        if isinstance(base.get_submodule(name), nn.Embedding)
    ]
