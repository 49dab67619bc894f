"""The tensors of a loaded base: shared between runs, counted, and known by their checksum."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lorabench import tasks

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def share(
    base: PreTrainedModel, owned: Callable[[str], bool] = lambda name: False
) -> PreTrainedModel:
    """A second module tree over the same tensors: injecting into it leaves the base as it was.

    Args:
        owned: parameter names that get a copy of their own, because a run trains them.
    """
    memo: dict[int, Any] = {id(t): t for t in base.buffers()}
    memo |= {id(p): p for name, p in base.named_parameters() if not owned(name)}
    return copy.deepcopy(base, memo)


def output_head(base: PreTrainedModel) -> tuple[str, nn.Module] | None:
    """Name and module of the output layer; None where the model has none."""
    if tasks.is_classifier(base):
        return tasks.classifier(base)
    head = base.get_output_embeddings()
    if head is None:
        return None
    return next(name for name, module in base.named_modules() if module is head), head


def is_tied(base: PreTrainedModel) -> bool:
    """Whether the head's weight is the input embedding's."""
    head = output_head(base)
    return head is not None and head[1].weight is base.get_input_embeddings().weight


def num_parameters(base: PreTrainedModel) -> int:
    """Parameters, tied ones counted once."""
    return sum(p.numel() for p in base.parameters())


def checksum(base: PreTrainedModel) -> str:
    """A hash over names, shapes and bits of every parameter and persistent buffer.

    Two position-weighted integer sums a tensor, taken on its own device: a single changed bit
    changes it, and a model of billions of weights costs a second.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in base.state_dict(keep_vars=True).items():
        bits = tensor.detach().contiguous().view(-1)
        bits = bits.view(
            {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()]
        )
        plain = weighted = 0
        for start in range(0, bits.numel(), 1 << 24):
            block = bits[start : start + (1 << 24)].to(torch.int64)
            position = torch.arange(start, start + block.numel(), device=block.device)
            plain += int(block.sum())
            weighted += int((block * (position * 2654435761 + 40503)).sum())  # wraps, by design
        entry = [name, list(tensor.shape), str(tensor.dtype), plain, weighted]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()
