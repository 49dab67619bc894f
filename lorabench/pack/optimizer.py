"""AdamW over stacked tensors: torch's fused kernel, each run with its own rate, decay and clipping.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101; `torch.optim.AdamW(fused=True)`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorabench.config import TrainerConfig
from lorabench.pack.storage import Members, Stacked

VECTOR = 16  # numbers a CPU moves at once, at most: float32 in AVX-512


class StackedAdamW:
    """Moves all runs of a pack; neighbours that share settings in one call of torch's kernel.

    Args:
        lr_ratios: LoRA+'s ratio of B's learning rate to A's, one per run; None: they are equal.
    """

    def __init__(
        self,
        stacked: list[Stacked],
        trainers: list[TrainerConfig],
        lr_ratios: Sequence[float | None] = (),
    ):
        self.stacked, self.trainers = stacked, trainers
        self.lr_ratios = [1.0 if ratio is None else ratio for ratio in lr_ratios]
        self.lr_ratios = self.lr_ratios or [1.0] * len(trainers)

    @torch.no_grad()
    def step(self, lr: list[float], alive: list[bool]) -> Tensor:
        """Clip each run by its own norm, take one step, clear the gradients.

        Frozen tensors are as torch.optim's parameters without a gradient: not in the norm, not
        moved or decayed, their moments and their count of steps kept.

        Args:
            lr: one per run; A's with LoRA+.
            alive: runs that may move; one whose gradient is not finite does not either.
        Returns:
            Norm of each run's gradient before clipping, (R,).
        """
        active = [one for one in self.stacked if one.active]
        for one in active:
            if one.cleared:
                one.grad.zero_()
            one.steps += 1
        norm_R = self._norms(active)
        clip_R = self._clipping(norm_R)
        # One copy off the device: which runs may move, and whether any is to be clipped.
        norms, clips = torch.stack([norm_R, clip_R]).tolist()
        if any(clip != 1 for clip in clips):
            _scale(active, clip_R)
        may_move = [run for run in range(len(lr)) if alive[run] and math.isfinite(norms[run])]
        alike: dict[tuple[float, ...], list[tuple[Stacked, slice]]] = {}
        found: dict[tuple[Any, ...], list[tuple[tuple[float, ...], slice]]] = {}
        for one in active:
            which = one.members, one.lr_scale, one.decays, one.group_b
            if which not in found:
                keys = {run: self._key(run, lr[run], one) for run in may_move}
                found[which] = _stretches([keys.get(run) for run in one.members.runs])
            for key, where in found[which]:
                for part in _whole_vectors(one, where):
                    alike.setdefault(key, []).append((one, part))
        counts = {
            steps: torch.tensor(float(steps), device=norm_R.device)
            for steps in {one.steps for one in active}
        }
        for (rate, beta1, beta2, decay, eps), rows in alike.items():
            torch._fused_adamw_(
                [one.value[where] for one, where in rows],
                [one.grad[where] for one, where in rows],
                [one.exp_avg[where] for one, where in rows],
                [one.exp_avg_sq[where] for one, where in rows],
                [],
                [counts[one.steps] for one, _ in rows],
                lr=rate, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps,
                amsgrad=False, maximize=False,
            )  # fmt: skip
        for one in self.stacked:
            one.clear()
        return norm_R

    def _key(self, run: int, lr: float, one: Stacked) -> tuple[float, ...]:
        """Return what the kernel must know of a run, for one of its tensors."""
        trainer = self.trainers[run]
        rate = lr * one.lr_scale * (self.lr_ratios[run] if one.group_b else 1.0)
        decay = trainer.weight_decay if one.decays else 0.0
        return rate, trainer.beta1, trainer.beta2, decay, trainer.eps

    def _norms(self, active: list[Stacked]) -> Tensor:
        """Norm of each run's whole gradient, (R,)."""
        found: dict[Members, list[Tensor]] = {}
        for one in active:
            # Along the last dimension first: one float32 sum over a million numbers would be off
            # in its fifth digit, and so would the clipping.
            norm = torch.linalg.vector_norm(one.grad, dim=-1)
            found.setdefault(one.members, []).append(norm.reshape(len(one.members.runs), -1))
        device, dtype = self.stacked[0].grad.device, self.stacked[0].grad.dtype
        squared_R = torch.zeros(len(self.trainers), device=device, dtype=dtype)
        for members, norms in found.items():
            norm_M = torch.linalg.vector_norm(torch.cat(norms, 1), dim=1)
            squared_R[members.where] += norm_M.square()
        return squared_R.sqrt()

    def _clipping(self, norm_R: Tensor) -> Tensor:
        """What scales each run's gradient down to its limit, as torch's clip_grad_norm_, (R,)."""
        limits = [t.max_grad_norm for t in self.trainers]
        limit_R = torch.tensor(
            [float("inf") if limit is None else limit for limit in limits],
            dtype=norm_R.dtype, device=norm_R.device,
        )  # fmt: skip
        return (limit_R / (norm_R + 1e-6)).clamp(max=1.0)


def _scale(active: list[Stacked], clip_R: Tensor) -> None:
    """Multiply each run's gradient."""
    clip_of = {who: clip_R[who.where] for who in {one.members for one in active}}
    for one in active:
        one.grad.mul_(clip_of[one.members].view(-1, *[1] * (one.grad.dim() - 1)))


def _stretches(keys: list[tuple[float, ...] | None]) -> list[tuple[tuple[float, ...], slice]]:
    """Neighbours of one key, as slices; None is in none."""
    found, first = [], 0
    for key, same in itertools.groupby(keys):
        end = first + len(list(same))
        if key is not None:
            found.append((key, slice(first, end)))
        first = end
    return found


def _whole_vectors(one: Stacked, where: slice) -> list[slice]:
    """Neighbours in one block, or each by itself where a run's part is no whole number of vectors.

    The kernel moves the last numbers of a block one by one, and rounds otherwise there: where a
    run's part ends must not depend on its neighbours' settings.
    """
    if one.value[0].numel() % VECTOR == 0:
        return [where]
    return [slice(i, i + 1) for i in range(where.start, where.stop)]
