"""AdamW over stacked storage: torch's fused kernel, each run with its own rate, decay and clipping.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101; `torch.optim.AdamW(fused=True)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorabench.config import TrainerConfig

if TYPE_CHECKING:
    from lorabench.pack.stacked import Group


class StackedAdamW:
    """Moves all runs of a pack; runs that share settings in one call of torch's fused AdamW."""

    def __init__(self, groups: list[Group], trainers: list[TrainerConfig]):
        self.groups, self.trainers = groups, trainers
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: list[float], alive: list[bool]) -> Tensor:
        """Clip each run by its own norm, take one step, clear the gradients.

        Args:
            lr: one a run.
            alive: runs that may move; one whose gradient is not finite does not either.
        Returns:
            Norm of each run's gradient before clipping, (R,).
        """
        device = self.groups[0].value.device
        # In float64: a float32 sum over a million numbers is off in its fifth digit. MPS has none.
        wide = torch.float32 if device.type == "mps" else torch.float64
        squared_R = torch.zeros(len(self.trainers), dtype=wide, device=device)
        for group in self.groups:
            norm_M = torch.linalg.vector_norm(group.grad, dim=1, dtype=wide)
            squared_R[group.runs] += norm_M.square()
        norm_R = squared_R.sqrt().to(self.groups[0].value.dtype)
        limits = [t.max_grad_norm for t in self.trainers]
        limit_R = torch.tensor(
            [float("inf") if limit is None else limit for limit in limits],
            dtype=norm_R.dtype, device=device,
        )  # fmt: skip
        clip_R = (limit_R / (norm_R + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        moving = [a and n for a, n in zip(alive, norm_R.isfinite().tolist(), strict=True)]
        self.steps += 1
        alike: dict[tuple[float, ...], list[tuple[Group, int]]] = {}
        for group in self.groups:
            group.grad.mul_(clip_R[group.runs][:, None])
            for row, run in enumerate(group.runs):
                if moving[run]:
                    t = self.trainers[run]
                    key = (lr[run], t.beta1, t.beta2, t.weight_decay, t.eps)
                    alike.setdefault(key, []).append((group, row))
        for (rate, beta1, beta2, decay, eps), rows in alike.items():
            torch._fused_adamw_(
                [group.value[row] for group, row in rows],
                [group.grad[row] for group, row in rows],
                [group.exp_avg[row] for group, row in rows],
                [group.exp_avg_sq[row] for group, row in rows],
                [],
                [torch.tensor(float(self.steps), device=device) for _ in rows],
                lr=rate, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps,
                amsgrad=False, maximize=False,
            )  # fmt: skip
        for group in self.groups:
            group.grad.zero_()
        return norm_R
