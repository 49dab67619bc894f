"""Where the tensors of a pack lie: one dense block for every trained tensor of several runs.

Letters: R runs in the pack, M of them that train something here (members), N rows of one run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Members:
    """Which runs of a pack a layer trains: a slice where they are neighbours, else indices."""

    def __init__(self, runs: list[int], size: int):
        self.runs, self.size = runs, size
        self.is_all = len(runs) == size
        contiguous = runs == list(range(runs[0], runs[-1] + 1))
        self.where: Any = slice(runs[0], runs[-1] + 1) if contiguous else runs

    def by_run(self, x: Tensor) -> Tensor:
        """A layer's input or output run by run, (R, N, D)."""
        assert len(x) % self.size == 0, "every row belongs to one run"
        return x.reshape(self.size, -1, x.shape[-1])

    def take(self, x_RND: Tensor) -> Tensor:
        """The members' part, (M, N, D): a view where they are neighbours."""
        return x_RND if self.is_all else x_RND[self.where]


class Stacked:
    """One trained tensor of every member, with its gradient and moments, (M, *shape) each.

    Gradients are added straight into the storage: autograd sees only `anchor`, a scalar that makes
    it run the layer's backward.

    Args:
        decays: whether weight decay shrinks it.
    """

    def __init__(
        self,
        members: Members,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        low: torch.dtype | None,
        device: str,
        decays: bool = True,
    ):
        self.members, self.decays = members, decays
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

    def add(self, grad: Tensor) -> None:
        """A part of this step's gradient."""
        if self.cleared:
            self.grad.copy_(grad)
        else:
            self.grad += grad
        self.cleared = False

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """left @ right as a part of this step's gradient, in the gradient's own precision."""
        if self.grad.dtype != left.dtype:
            self.add(torch.bmm(left, right))
        elif self.cleared:
            torch.bmm(left, right, out=self.grad)
            self.cleared = False
        else:
            self.grad.baddbmm_(left, right)

    def clear(self) -> None:
        """Forget the gradient."""
        self.cleared = True
