"""How far apart the logits of two models lie, and how far rounding alone would move them.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SEEDED_SHAPE = (4, 32)  # B, T of the batch of random tokens


def seeded_batch(num_embeddings: int, positions: int | None) -> Tensor:
    """Token ids drawn uniformly, the same on every machine."""
    rows, length = SEEDED_SHAPE
    generator = torch.Generator().manual_seed(0)
    shape = (rows, min(length, positions or length))
    return torch.randint(num_embeddings, shape, generator=generator)


def logits(model: Any, batches: list[Tensor]) -> list[Tensor]:
    """Logits of every batch, each row of a (B, T) batch a full sequence, in the model's dtype."""
    with torch.no_grad():
        return [
            model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits
            for ids_BT in batches
        ]


def largest(parts: list[Tensor]) -> float:
    return float(torch.stack([part.abs().max() for part in parts]).max())


def relative_difference(reference: list[Tensor], other: list[Tensor]) -> float:
    """Largest difference over the largest logit; not a number where a logit is none."""
    difference = largest([b - a for a, b in zip(reference, other, strict=True)])
    return difference / largest(reference)


@dataclass
class Divergence:
    """What stands between a reference and a model of rounded weights."""

    kl: float  # mean over positions of KL(reference || other), nats
    top1: float  # share of positions with the same best token
    change: float  # largest change of a logit
    gap: float  # largest lead, in the reference, of its best token over another best token


def divergence(reference: list[Tensor], other: list[Tensor]) -> Divergence:
    """Compared in float64: at float16's rounding a float32 sum of p log p is mostly noise."""
    kl = agree = gap = change = 0.0
    count = 0
    for p_BTV, q_BTV in zip(reference, other, strict=True):
        p_NV, q_NV = p_BTV.flatten(0, -2).double(), q_BTV.flatten(0, -2).double()
        log_p, log_q = p_NV.log_softmax(-1), q_NV.log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        best_N, theirs_N = p_NV.argmax(-1), q_NV.argmax(-1)
        agree += int((best_N == theirs_N).sum())
        rows = torch.arange(len(p_NV))
        gap = max(gap, float((p_NV[rows, best_N] - p_NV[rows, theirs_N]).max()))
        change = max(change, float((p_NV - q_NV).abs().max()))
        count += len(p_NV)
    return Divergence(kl / count, agree / count, change, gap)


def round_stochastically(weight: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A float32 tensor rounded to one of the two 16-bit values around each number, in float32.

    The nearer one is the likelier, so that the expectation is the number itself; a number that
    the dtype holds stays.
    """
    nearest = weight.to(dtype)
    error = weight - nearest.float()
    bits = nearest.view(torch.int16)  # sign and magnitude: one more is one step away from zero
    outward = (error > 0) == (nearest > 0)
    beyond = bits + torch.where(outward, 1, -1).to(torch.int16)
    across_zero = torch.where(error > 0, 0x0001, -0x7FFF).to(torch.int16)  # smallest, + and -
    beyond = torch.where(nearest == 0, across_zero, beyond)
    other = beyond.view(dtype).float()
    chance = error.abs() / (other - nearest.float()).abs()
    drawn = torch.rand(weight.shape, generator=generator) < chance
    return torch.where(drawn, other, nearest.float())
