"""Seeds that depend on names, and the initial weights drawn from them."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


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


def drawn_head(seed: int, name: str, classes: int, in_features: int, std: float) -> Tensor:
    """The initial weight of a classification head, N(0, std^2), float32, on the CPU."""
    generator = torch.Generator().manual_seed(key("head", seed, name))
    rows = [torch.empty(in_features).normal_(0, std, generator=generator) for _ in range(classes)]
    return torch.stack(rows)
