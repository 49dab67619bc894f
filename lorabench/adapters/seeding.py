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


def initial_ab(
    seed: int, name: str, r: int, in_features: int, out_features: int, init: str
) -> tuple[Tensor, Tensor]:
    """Draw A, shape (r, in_features), and B, (out_features, r), of one module; float32, on the CPU.

    B is zero, except with `orthogonal`: there A and B are Gaussian within two orthogonal halves of
    the r dimensions between them, so B A = 0. They depend on all arguments: unlike with the other
    inits, a smaller r is not the first rows of a larger one.

    Args:
        r: even for `orthogonal`.
    Source: PEFT's `LoraLayer.orthogonal_init`, whose draws are not keyed by module.
    """
    if init != "orthogonal":
        return initial_a(seed, name, r, in_features, init), torch.zeros(out_features, r)
    generator = torch.Generator().manual_seed(key("orthogonal", seed, name))

    def normal(*shape: int) -> Tensor:
        # In float64, so that how a library orders its sums rarely shows after the last rounding.
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis, _ = torch.linalg.qr(normal(r, r))
    a = (normal(in_features, r // 2) @ basis[0::2]).T / 10
    b = normal(out_features, r // 2) @ basis[1::2] / 10
    return a.float().contiguous(), b.float()


def drawn_head(seed: int, name: str, classes: int, in_features: int, std: float) -> Tensor:
    """The initial weight of a classification head, N(0, std^2), float32, on the CPU."""
    generator = torch.Generator().manual_seed(key("head", seed, name))
    rows = [torch.empty(in_features).normal_(0, std, generator=generator) for _ in range(classes)]
    return torch.stack(rows)
