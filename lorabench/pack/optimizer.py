"""AdamW over the blocks of a pack: torch's fused kernel, each run with its own rate and clipping.

Nothing here looks at a number on the device: rates, clipping and which runs may move are tensors.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101; `torch.optim.AdamW(fused=True)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorabench.config import TrainerConfig
from lorabench.pack.rows import on_device
from lorabench.pack.storage import Stacked, Store

PIECE = 1 << 24  # numbers that one call of the kernel moves, at most, but a member's at least
SUMMED = 256  # squares of a gradient that are summed in its own precision


class Settings(NamedTuple):
    """What torch's kernel must know, one for all it moves."""

    beta1: float
    beta2: float
    eps: float


@dataclass
class Piece:
    """A dense part of a store whose numbers are moved alike, but for the rate of their run."""

    store: Store
    rows: slice  # members
    columns: slice
    settings: Settings
    lr_scale: float  # the part of a run's rate at which it trains
    step: Tensor  # updates so far, on the device, (), float32

    @property
    def count(self) -> int:
        """Numbers in it."""
        rows, columns = self.rows, self.columns
        return int((rows.stop - rows.start) * (columns.stop - columns.start))

    def of(self, block: Tensor) -> Tensor:
        """This part of the values, a gradient or a moment."""
        return block[self.rows, self.columns]


class StackedAdamW:
    """Moves all runs of a pack together.

    The kernel knows one learning rate. It moves zeros at a rate of one, and what it finds is added
    to the weights at the rate of each run.

    Args:
        lr_ratios: LoRA+'s ratio of B's learning rate to A's, one per run; None: they are equal.
    """

    def __init__(
        self,
        stores: list[Store],
        trainers: list[TrainerConfig],
        lr_ratios: Sequence[float | None] = (),
    ):
        self.stores = stores
        values = stores[0].values
        device = values.device
        ratios = [1.0 if ratio is None else ratio for ratio in lr_ratios] or [1.0] * len(trainers)
        limits = [t.max_grad_norm for t in trainers]
        self._limit_R = values.new_tensor([float("inf") if x is None else x for x in limits])
        self._ratio_R = values.new_tensor(ratios)
        self._decay_R = values.new_tensor([t.weight_decay for t in trainers])
        self._any_decay = any(t.weight_decay for t in trainers)
        self._alive_R = torch.ones(len(trainers), dtype=torch.bool, device=device)
        self._settings = [Settings(t.beta1, t.beta2, t.eps) for t in trainers]
        # Runs of a store's members: a slice, or their indices.
        self._runs = {store: store.members.index(store.members.runs) for store in stores}
        self._runs_alike = {
            store: [self._settings[run] for run in store.members.runs] for store in stores
        }
        self._pieces: list[Piece] | None = None
        self._largest = 0
        self._scratch: Tensor | None = None  # what the kernel moves
        self._updates = 0  # since the pieces were made

    def stop(self, run: int) -> None:
        """Let a run keep its weights from now on."""
        self._alive_R[run].fill_(False)

    @torch.no_grad()
    def step(self, lr: list[float]) -> Tensor:
        """Clip each run by its own norm, take one step, clear the gradients.

        Frozen tensors are as torch.optim's parameters without a gradient: not in the norm, not
        moved or decayed, their moments and their count of steps kept. A run whose gradient is not
        finite does not move.

        Args:
            lr: one per run; A's with LoRA+.
        Returns:
            Norm of each run's gradient before clipping, (R,).
        """
        pieces = self._made()
        self._updates += 1
        gradients = {store: store.take_grads() for store in self.stores}
        norm_R = self._norms(gradients)
        finite_R = norm_R.isfinite() & self._alive_R
        clip_R = (self._limit_R / (norm_R + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        rate_R = on_device(lr, norm_R.device, norm_R.dtype) * finite_R
        steps = list({id(piece.step): piece.step for piece in pieces}.values())
        torch._foreach_add_(steps, 1)
        if self._scratch is None or len(self._scratch) < self._largest:
            self._scratch = norm_R.new_empty(self._largest)
        of_store: dict[Store, list[Piece]] = {}
        for piece in pieces:
            of_store.setdefault(piece.store, []).append(piece)
        for store, own in of_store.items():
            runs = self._runs[store]
            grads = gradients[store]
            if grads is None:
                continue
            # Not finite, and all of the run's gradient is none: its moments stay finite.
            grads.mul_(_of(clip_R, runs)[:, None]).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            rate_M1 = _of(rate_R * self._ratio_R if store.group_b else rate_R, runs)[:, None]
            decay_M1 = None
            if store.decays and self._any_decay:
                decay_M1 = _of(self._decay_R, runs)[:, None]
            for piece in own:
                _move(piece, grads, rate_M1, decay_M1, self._scratch)
        return norm_R

    # --- what moves alike ------------------------------------------------------------------

    def changed(self) -> None:
        """Look again at what trains: what was frozen or thawed, or given other counts of steps."""
        self._count()
        self._pieces = None

    def _count(self) -> None:
        """Note in the tensors how often they were updated."""
        for piece in self._pieces or []:
            for one in piece.store.tensors:
                columns = piece.store.columns[one]
                if piece.columns.start <= columns.start < piece.columns.stop:
                    for member in range(piece.rows.start, piece.rows.stop):
                        one.steps[member] += self._updates
        self._updates = 0

    def counted(self, one: Stacked, run: int) -> int:
        """How often a run's tensor was updated."""
        self._count()
        return one.steps[one.members.runs.index(run)]

    def _made(self) -> list[Piece]:
        if self._pieces is None:
            counts: dict[int, Tensor] = {}
            device = self._alive_R.device
            self._pieces = []
            for store in self.stores:
                for rows, columns, (scale, count, settings) in _alike(
                    store, self._runs_alike[store]
                ):
                    if count not in counts:
                        counts[count] = torch.tensor(float(count), device=device)
                    self._pieces.append(
                        Piece(store, rows, columns, settings, scale, counts[count])
                    )
            self._largest = max((piece.count for piece in self._pieces), default=0)
        return self._pieces

    def _norms(self, gradients: dict[Store, Tensor | None]) -> Tensor:
        """Norm of each run's whole gradient, (R,)."""
        squared_R = torch.zeros_like(self._limit_R, dtype=torch.float64)
        for store, grads in gradients.items():
            if grads is None:
                continue
            # In stretches first: one float32 sum over a million numbers would be off in its fifth
            # digit, and so would the clipping.
            squared_M = _squared(grads)
            runs = self._runs[store]
            if isinstance(runs, slice):
                squared_R[runs] += squared_M
            else:
                squared_R.index_add_(0, runs, squared_M)
        return squared_R.sqrt().to(self._limit_R.dtype)


def _of(value_R: Tensor, runs: slice | Tensor) -> Tensor:
    return value_R[runs] if isinstance(runs, slice) else value_R.index_select(0, runs)


def _squared(grads: Tensor) -> Tensor:
    """Sum of the squares of each member's gradient, (M,), float64."""
    whole = grads.shape[1] // SUMMED * SUMMED
    parts = [grads[:, :whole].unflatten(1, (-1, SUMMED)), grads[:, whole:].unsqueeze(1)]
    norms = [torch.linalg.vector_norm(part, dim=-1) for part in parts if part.numel()]
    return torch.cat(norms, 1).double().square().sum(1)


def _move(
    piece: Piece, grads: Tensor, rate_M1: Tensor, decay_M1: Tensor | None, scratch: Tensor
) -> None:
    """Take one step with a part of a store."""
    store, own = piece.store, piece.of(grads)
    moved = scratch[: own.numel()].view(own.shape).zero_()
    beta1, beta2, eps = piece.settings
    torch._fused_adamw_(
        [moved], [own], [piece.of(store.exp_avg)], [piece.of(store.exp_avg_sq)], [], [piece.step],
        lr=1.0, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    values, rate_M1 = piece.of(store.values), rate_M1[piece.rows] * piece.lr_scale
    if decay_M1 is not None:
        values.mul_(1 - rate_M1 * decay_M1[piece.rows])
    values.addcmul_(moved, rate_M1)


Alike = tuple[float, int, Settings]  # part of the rate, count of steps, settings


def _alike(store: Store, settings: list[Settings]) -> Iterator[tuple[slice, slice, Alike]]:
    """Dense parts of a store whose numbers are moved alike: members, columns, and how."""
    members = range(len(settings))

    def how(one: Stacked) -> list[Alike | None]:
        scales = [one.lr_scale[i] for i in members]
        return [
            None if scale is None else (scale, one.steps[i], settings[i])
            for i, scale in zip(members, scales, strict=True)
        ]

    for entries, group in itertools.groupby(store.tensors, how):
        tensors = list(group)
        columns = slice(
            store.columns[tensors[0]].start, store.columns[tensors[-1]].stop
        )
        # Members lie apart unless all columns are taken.
        every = len(tensors) == len(store.tensors)
        keys = [(entry, None if every else i) for i, entry in enumerate(entries)]
        for (entry, _), same in itertools.groupby(members, keys.__getitem__):
            rows = list(same)
            if entry is not None:
                for part in _pieces(slice(rows[0], rows[-1] + 1), columns):
                    yield *part, entry


def _pieces(rows: slice, columns: slice) -> Iterator[tuple[slice, slice]]:
    """Dense parts of at most PIECE numbers, whole members where they fit."""
    width = columns.stop - columns.start
    at_once = max(1, PIECE // width)
    for first in range(rows.start, rows.stop, at_once):
        some = slice(first, min(first + at_once, rows.stop))
        step = width if at_once > 1 or width <= PIECE else PIECE
        for start in range(columns.start, columns.stop, step):
            yield some, slice(start, min(start + step, columns.stop))
