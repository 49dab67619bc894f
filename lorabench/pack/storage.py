"""Where the tensors of a pack lie: the same tensors of several runs in one block, a row a run.

Letters: R runs in the pack, M of them that train something here (members), P rows of all runs,
N rows of one run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorabench.pack.rows import Block, Rows, on_device

VECTOR = 16  # numbers a CPU moves at once, at most: float32 in AVX-512


class Part(NamedTuple):
    """Members of one block and one rank, neighbours in the storage: their place, their rows."""

    stored: slice  # of what is stored
    rank: int | None
    block: Block
    where: Any  # of the block's runs: a slice where they are neighbours, else indices, (members,)

    def own(self, stored_M: Tensor) -> Tensor:
        """The members' part of what is stored, (members, ...) or (members, rank, ...): a view."""
        mine = stored_M[self.stored]
        return mine if self.rank is None else mine[:, : self.rank]

    def take(self, x_PD: Tensor) -> Tensor:
        """The members' rows, (M, N, D): a view where they are neighbours."""
        rows = self.block.of(x_PD)
        if isinstance(self.where, slice):
            return rows[self.where]
        return rows.index_select(0, self.where)

    def add_product(self, y_PO: Tensor, left_MNK: Tensor, right_MKO: Tensor) -> None:
        """y += left @ right, on the members' rows."""
        y = self.block.of(y_PO)
        if isinstance(self.where, slice):
            y[self.where].baddbmm_(left_MNK, right_MKO)
        else:
            y.index_copy_(0, self.where, torch.baddbmm(self.take(y_PO), left_MNK, right_MKO))

    def add(self, y_PO: Tensor, update_MNO: Tensor) -> None:
        """y += update, on the members' rows."""
        y = self.block.of(y_PO)
        if isinstance(self.where, slice):
            y[self.where].add_(update_MNO)
        else:
            y.index_add_(0, self.where, update_MNO)

    def put(self, y_PO: Tensor, own_MNO: Tensor | float) -> None:
        """y = own, on the members' rows."""
        y = self.block.of(y_PO)
        if isinstance(self.where, slice):
            y[self.where] = own_MNO
        elif isinstance(own_MNO, Tensor):
            y.index_copy_(0, self.where, own_MNO)
        else:
            y.index_fill_(0, self.where, own_MNO)


class Members:
    """Which runs of a pack a layer trains."""

    def __init__(self, runs: list[int], size: int, device: str = "cpu"):
        self.runs, self.size, self.device = runs, size, device
        self.is_all = len(runs) == size
        self._parts: dict[Any, list[Part]] = {}  # of the step's few kinds of rows

    def index(self, runs: list[int]) -> Any:
        """A slice where these are neighbours, else their indices on the device, (M,)."""
        if runs == list(range(runs[0], runs[-1] + 1)):
            return slice(runs[0], runs[-1] + 1)
        return on_device(runs, self.device)

    def parts(self, rows: Rows, ranks: tuple[int, ...] | None = None) -> list[Part]:
        """The members, block by block and rank by rank.

        Args:
            ranks: of each member, so that a product is no larger than its runs' own; None: what is
                stored has none.
        """
        found = self._parts.get((rows.sizes, rows.counts, ranks))
        if found is None:
            found = self._made(rows, ranks)
            if len(self._parts) > 64:
                self._parts.clear()
            self._parts[rows.sizes, rows.counts, ranks] = found
        return found

    def _made(self, rows: Rows, ranks: tuple[int, ...] | None) -> list[Part]:
        # In plain loops, which torch.compile follows.
        found = []
        for block in rows.blocks:
            end = block.first_run + block.size
            alike: list[list[int]] = []
            for i, run in enumerate(self.runs):
                if not block.first_run <= run < end:
                    continue
                if alike and (ranks is None or ranks[alike[-1][-1]] == ranks[i]):
                    alike[-1].append(i)
                else:
                    alike.append([i])
            for members in alike:
                where = self.index([self.runs[i] - block.first_run for i in members])
                rank = None if ranks is None else ranks[members[0]]
                found.append(Part(slice(members[0], members[-1] + 1), rank, block, where))
        return found

    def gathered(self, parts: list[Part], products: list[Tensor], shape: torch.Size) -> Tensor:
        """What was made part by part as one tensor of all members, zero beyond a part's rank."""
        if len(parts) == 1 and products[0].shape == shape:
            return products[0]
        whole = products[0].new_zeros(shape)
        for part, product in zip(parts, products, strict=True):
            part.own(whole).copy_(product)
        return whole


class Stacked:
    """One trained tensor of every member, (M, *shape): an ordinary parameter.

    Its gradient and its moments lie as it does.

    Attributes:
        copy: What products are taken with, scaled or of lower precision, brought up to date by
            `Store.refresh`; None: the tensor itself.
        scale_M11: What the copy is scaled by; None: by nothing.
        lr_scale: Of each member: at which part of the run's rate it trains; None: it is frozen.
        steps: Of each member: how often it was updated, which its bias correction counts.
    """

    value: nn.Parameter
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor | None

    def __init__(
        self, members: Members, shape: tuple[int, ...], scales: list[float] | None = None
    ):
        self.members, self.shape, self.scales = members, shape, scales
        self.scale_M11: Tensor | None = None
        count = len(members.runs)
        self.lr_scale: list[float | None] = [1.0] * count
        self.steps = [0] * count

    @property
    def size(self) -> int:
        """Numbers of one member, and what fills the last vector: no run's end is a part of one."""
        return -(-torch.Size(self.shape).numel() // VECTOR) * VECTOR

    @property
    def grad(self) -> Tensor:
        """This step's gradient so far."""
        assert self.value.grad is not None, "a trained tensor has a gradient after a backward pass"
        return self.value.grad

    @property
    def active(self) -> bool:
        """Whether any member trains it now."""
        return self.value.requires_grad

    def lr_scale_of(self, run: int) -> float | None:
        """At which part of its rate a run trains it; None: not now, or never."""
        runs = self.members.runs
        return self.lr_scale[runs.index(run)] if run in runs else None

    def count(self, run: int, steps: int) -> None:
        """Set how often a run's part was updated."""
        self.steps[self.members.runs.index(run)] = steps

    def train(self, lr_scale: list[float | None]) -> None:
        """Freeze or thaw it, for each member."""
        self.lr_scale = lr_scale
        self.value.requires_grad_(any(scale is not None for scale in lr_scale))


class Store:
    """Tensors that the same runs train in the same way, in one block.

    Args:
        low: lower precision that products are taken in, if any.
        decays: whether weight decay shrinks them.
        group_b: whether LoRA+ gives them B's learning rate.
    """

    def __init__(
        self,
        members: Members,
        dtype: torch.dtype,
        low: torch.dtype | None,
        device: str,
        decays: bool = True,
        group_b: bool = False,
    ):
        self.members, self.dtype, self.low, self.device = members, dtype, low, device
        self.decays, self.group_b = decays, group_b
        self.tensors: list[Stacked] = []
        self._seen = -1

    def add(self, shape: tuple[int, ...], scales: list[float] | None = None) -> Stacked:
        """Plan one more tensor.

        Args:
            scales: what products of each member are scaled by.
        """
        self.tensors.append(Stacked(self.members, shape, scales))
        return self.tensors[-1]

    def allocate(self) -> None:
        """Make room for all tensors, zeros."""
        total = sum(one.size for one in self.tensors)
        count = len(self.members.runs)
        # A full copy of a head has its gradient to itself: autograd hands it over as it was made.
        only = self.tensors[0]
        self.is_one = len(self.tensors) == 1 and only.size == torch.Size(only.shape).numel()
        self.values = torch.zeros(count, total, dtype=self.dtype, device=self.device)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self._grads = None if self.is_one else torch.zeros_like(self.values)
        self.columns: dict[Stacked, slice] = {}
        first = 0
        for one in self.tensors:
            self.columns[one] = slice(first, first + one.size)
            first += one.size
            one.value = nn.Parameter(self._view(one, self.values))
            one.exp_avg = self._view(one, self.exp_avg)
            one.exp_avg_sq = self._view(one, self.exp_avg_sq)
        self._copy()

    def _view(self, one: Stacked, of: Tensor) -> Tensor:
        columns, shape = self.columns[one], torch.Size(one.shape)
        return of[:, columns.start : columns.start + shape.numel()].unflatten(1, shape)

    def _copy(self) -> None:
        """Make the copies that products are taken with, where the values do not serve."""
        scales = [one.scales or [1.0] * len(self.members.runs) for one in self.tensors]
        is_scaled = any(scale != 1 for own in scales for scale in own)
        self.shadow = self.scale = None
        if is_scaled:
            of_tensors = [torch.tensor(x, dtype=self.dtype, device=self.device) for x in scales]
            self.scale = of_tensors[0][:, None]
            if any(own != scales[0] for own in scales):  # another one for some module
                pairs = zip(of_tensors, self.tensors, strict=True)
                self.scale = torch.cat([s[:, None].expand(-1, one.size) for s, one in pairs], 1)
            for one, scale_M in zip(self.tensors, of_tensors, strict=True):
                one.scale_M11 = scale_M[:, None, None]
        if is_scaled or self.low is not None:
            self.shadow = torch.zeros_like(self.values, dtype=self.low or self.dtype)
        for one in self.tensors:
            one.copy = None if self.shadow is None else self._view(one, self.shadow)

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the copies up to date."""
        # Whoever loads weights writes to views, which share the count of changes.
        version = self.values._version
        if self.shadow is None or version == self._seen:
            return
        self._seen = version
        if self.scale is None:
            self.shadow.copy_(self.values)
        elif self.low is None:
            torch.mul(self.values, self.scale, out=self.shadow)
        else:
            self.shadow.copy_(self.values * self.scale)

    def take_grads(self) -> Tensor | None:
        """Take this step's gradients off the parameters, (M, numbers of a member); None: none.

        Members that freeze a tensor which others train have zeros.
        """
        found = {one: one.value.grad for one in self.tensors if one.value.grad is not None}
        if not found:
            return None
        for one in self.tensors:
            one.value.grad = None
        if self._grads is None:
            grads = found[self.tensors[0]].flatten(1).contiguous()
        else:
            grads = self._grads
            views = [self._view(one, grads) for one in found]
            torch._foreach_copy_(views, list(found.values()))
        for one, columns in self.columns.items():
            if one not in found:
                grads[:, columns].zero_()
                continue
            for member, scale in enumerate(one.lr_scale):
                if scale is None:
                    grads[member, columns].zero_()
        return grads
