"""Rows of hidden states: whose they are, and which of them anybody reads.

The rows of all runs lie end to end, run by run; neighbours in a pack that see the same batch have
the same number of rows each and form a block, whose products are taken together.

Letters: P rows of all runs, D width, N rows that carry a loss.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import mul
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def on_device(values: Any, device: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host as a tensor; the host waits for no GPU."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Block:
    """Neighbouring runs of as many rows each."""

    first_run: int
    size: int  # runs
    first_row: int
    count: int  # rows of one run

    def of(self, x_PD: Tensor) -> Tensor:
        """The block's rows run by run, (size, count, D): a view."""
        rows = x_PD[self.first_row : self.first_row + self.size * self.count]
        return rows.view(self.size, self.count, *x_PD.shape[1:])


@dataclass(frozen=True)
class Rows:
    """How many rows each run has.

    Args:
        sizes: runs of each block.
        counts: rows of one run of each block.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    total: int = field(init=False)  # rows of all runs
    blocks: tuple[Block, ...] = field(init=False)

    def __post_init__(self) -> None:
        ends = list(map(mul, self.sizes, self.counts))
        runs = itertools.accumulate(self.sizes, initial=0)
        rows = itertools.accumulate(ends, initial=0)
        blocks = [Block(*one) for one in zip(runs, self.sizes, rows, self.counts, strict=False)]
        object.__setattr__(self, "total", sum(ends))
        object.__setattr__(self, "blocks", tuple(blocks))

    def chunk(self, part: slice) -> Rows:
        """The same, of each run these rows only."""
        return Rows(self.sizes, tuple(len(range(*part.indices(count))) for count in self.counts))

    def spread(self, parts: list[Tensor]) -> Tensor:
        """Rows of each block, (count, ...), once for every run of it, end to end."""
        pairs = zip(parts, self.sizes, strict=True)
        return torch.cat([part.repeat(size, *[1] * (part.dim() - 1)) for part, size in pairs])


class Spans:
    """Tells the layers of a pack whose rows they are given.

    Args:
        size: runs of the pack.
    """

    def __init__(self, size: int):
        self.size = size
        self.rows: Rows | None = None  # None: every run has as many, such as in a padded batch

    def of(self, x: Tensor) -> tuple[Tensor, Rows]:
        """A layer's input or output row by row, (P, D), and whose they are."""
        x_PD = x.reshape(-1, x.shape[-1])
        rows = self.rows or Rows((self.size,), (len(x_PD) // self.size,))
        assert len(x_PD) == rows.total, "every row belongs to one run"
        return x_PD, rows

    @contextmanager
    def at(self, rows: Rows | None) -> Iterator[None]:
        """While these are the rows that go through the model."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before


class Picked:
    """Chosen rows, each once.

    Args:
        index: of the chosen rows, (N,).
        total: number of all rows.
    """

    def __init__(self, index: np.ndarray, total: int, device: str):
        inverse, there = np.zeros(total, np.int64), np.zeros(total, bool)
        inverse[index], there[index] = np.arange(len(index)), True
        self.count, self.total = len(index), total
        self.index_N = on_device(np.asarray(index, np.int64), device)
        self._inverse_P = on_device(inverse, device)
        self._left_out = on_device(np.flatnonzero(~there), device)

    def of(self, x_PD: Tensor) -> Tensor:
        """These rows of x, (N, D)."""
        return _Pick.apply(x_PD, self)

    def back(self, y_ND: Tensor) -> Tensor:
        """The inverse of `of`: zero in the rows that are not chosen, (P, D)."""
        # Reads by the inverse: on a GPU, writing by an index sorts it to be deterministic.
        return y_ND.index_select(0, self._inverse_P).index_fill_(0, self._left_out, 0)


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, picked: Picked) -> Tensor:
        ctx.picked = picked
        return x_PD.index_select(0, picked.index_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.picked.back(grads[0]), None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, picked: Picked) -> Tensor:
        ctx.picked = picked
        return picked.back(y_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.picked.index_N), None


class ChosenRows(nn.Module):
    """A frozen block that sees each row by itself, on the chosen rows; the others get zero.

    Behind the last attention no row reads another, and the head reads the chosen ones alone.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.picked: Picked | None = None  # None: every row is read

    @contextmanager
    def on(self, picked: Picked) -> Iterator[None]:
        """While a batch goes through the model."""
        self.picked = picked
        try:
            yield
        finally:
            self.picked = None

    def forward(self, x: Tensor) -> Tensor:
        picked = self.picked
        if picked is None or 4 * picked.count > 3 * picked.total:
            return self.block(x)  # every row is read, or little is to save
        y_ND = self.block(picked.of(x.reshape(-1, x.shape[-1]))[None])[0]
        return _Put.apply(y_ND, picked).reshape(x.shape)


def choose_rows(body: nn.Module) -> ChosenRows | None:
    """Put ChosenRows around the last layer's feed-forward block, where there is one to be sure of.

    That is: a frozen block of linear layers and functions, nothing in it trained or routed.
    """
    for name in ("layers", "h"):
        layers: Any = getattr(body, name, None)
        block = getattr(layers[-1], "mlp", None) if isinstance(layers, nn.ModuleList) else None
        if block is not None and _is_plain(block):
            layers[-1].mlp = ChosenRows(block)
            return layers[-1].mlp
    return None


def _is_plain(block: nn.Module) -> bool:
    if any(p.requires_grad for p in block.parameters()) or list(block.parameters(recurse=False)):
        return False
    if len(inspect.signature(block.forward).parameters) != 1:  # Bloom's adds the residual itself
        return False
    inside = [module for module in block.modules() if module is not block]
    return all(
        not list(m.children()) and (type(m) in (nn.Linear, Conv1D) or not list(m.parameters()))
        for m in inside
    )
