"""Where the tensors of a pack lie: one dense block for every trained tensor of several runs.

Letters: R runs in the pack, M of them that train something here (members), P rows of all runs,
N rows of one run.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorabench.pack.rows import Block, Rows


class Part(NamedTuple):
    """Members of one block and one rank, neighbours in the storage: their place, their rows."""

    own: Any  # index of their part of what is stored, (members,) or (members, rank)
    stored: slice  # the members alone
    rank: int | None
    block: Block
    where: Any  # of the block's runs: a slice where they are neighbours, else indices

    def take(self, x_PD: Tensor) -> Tensor:
        """The members' rows, (M, N, D): a view where they are neighbours."""
        return self.block.of(x_PD)[self.where]

    def add_product(self, y_PO: Tensor, left_MNK: Tensor, right_MKO: Tensor) -> None:
        """y += left @ right, on the members' rows."""
        y = self.block.of(y_PO)
        if isinstance(self.where, slice):
            y[self.where].baddbmm_(left_MNK, right_MKO)
        else:
            y[self.where] = torch.baddbmm(y[self.where], left_MNK, right_MKO)

    def add(self, y_PO: Tensor, update_MNO: Tensor) -> None:
        """y += update, on the members' rows."""
        self.block.of(y_PO)[self.where] += update_MNO


class Members:
    """Which runs of a pack a layer trains: a slice where they are neighbours, else indices."""

    def __init__(self, runs: list[int], size: int):
        self.runs, self.size = runs, size
        self.is_all = len(runs) == size
        self.where = _neighbours(runs)
        self._parts: dict[Any, list[Part]] = {}  # of the step's few kinds of rows

    def parts(self, rows: Rows, ranks: tuple[int, ...] | None = None) -> list[Part]:
        """The members, block by block and rank by rank.

        Args:
            ranks: of each member, so that a product is no larger than its runs' own; None: what is
                stored has none.
        """
        key = rows, ranks
        if key in self._parts:
            return self._parts[key]
        found = []
        for block in rows.blocks:
            end = block.first_run + block.size
            inside = [i for i, run in enumerate(self.runs) if block.first_run <= run < end]
            for rank, alike in itertools.groupby(inside, lambda i: ranks[i] if ranks else None):
                members = list(alike)
                where = _neighbours([self.runs[i] - block.first_run for i in members])
                stored = slice(members[0], members[-1] + 1)
                own = stored if rank is None else (stored, slice(rank))
                found.append(Part(own, stored, rank, block, where))
        if len(self._parts) > 64:
            self._parts.clear()
        self._parts[key] = found
        return found


def _neighbours(runs: list[int]) -> Any:
    """A slice where these are neighbours, else the runs themselves."""
    contiguous = runs == list(range(runs[0], runs[-1] + 1))
    return slice(runs[0], runs[-1] + 1) if contiguous else runs


class Stacked:
    """One trained tensor of every member, with its gradient and moments, (M, *shape) each.

    Gradients are added straight into the storage: autograd sees only `anchor`, a scalar that makes
    it run the layer's backward.

    Args:
        decays: whether weight decay shrinks it.
        group_b: whether LoRA+ gives it B's learning rate.
    """

    def __init__(
        self,
        members: Members,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        low: torch.dtype | None,
        device: str,
        decays: bool = True,
        group_b: bool = False,
    ):
        self.members, self.decays, self.group_b = members, decays, group_b
        # One block a tensor: batched products write only into dense memory without a loop.
        self.value = torch.zeros(len(members.runs), *shape, dtype=dtype, device=device)
        self.grad = torch.zeros_like(self.value)
        self.exp_avg = torch.zeros_like(self.value)
        self.exp_avg_sq = torch.zeros_like(self.value)
        self.shadow = None if low is None else torch.zeros_like(self.value, dtype=low)
        self.cleared = True  # nothing of this step in `grad` yet, whatever it holds
        self.active, self.lr_scale = True, 1.0  # whether it trains, at which part of a run's rate
        self.steps = 0  # times it was updated: what its bias correction counts

    def for_compute(self) -> Tensor:
        """The tensor the products are taken with: a low-precision copy under autocast."""
        return self.value if self.shadow is None else self.shadow

    def refresh(self) -> None:
        """Bring the low-precision copy up to date."""
        if self.shadow is not None:
            self.shadow.copy_(self.value)

    def add(self, grads: list[tuple[Any, Tensor]]) -> None:
        """A part of this step's gradient, of all members: each where it is stored."""
        for own, grad in grads:
            if self.cleared:
                self.grad[own].copy_(grad)
            else:
                self.grad[own] += grad
        self.cleared = False

    def add_products(self, products: list[tuple[Any, Tensor, Tensor]]) -> None:
        """left @ right as a part of this step's gradient, in the gradient's own precision."""
        for own, left, right in products:
            grad = self.grad[own]
            in_place = grad.dtype == left.dtype and grad.is_contiguous()
            if in_place and self.cleared:
                torch.bmm(left, right, out=grad)
            elif in_place:
                grad.baddbmm_(left, right)
            elif self.cleared:
                grad.copy_(torch.bmm(left, right))
            else:
                grad += torch.bmm(left, right)
        self.cleared = False

    def clear(self) -> None:
        """Forget the gradient."""
        self.cleared = True
