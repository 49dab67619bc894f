"""The pack's optimizer against torch.optim.AdamW, run by run."""

from __future__ import annotations

import pytest
import torch
from equality import relative
from torch import nn

from lorabench.config import TrainerConfig
from lorabench.pack.optimizer import StackedAdamW
from lorabench.pack.storage import Members, Stacked


@pytest.mark.parametrize(
    ("dtype", "bound"),
    # Rounding of 200 updates: 200 * 2^-53 and 200 * 2^-24, with room for other summing orders.
    [(torch.float64, 1e-13), (torch.float32, 2e-5)],
)
def test_the_optimizer_is_adamw_with_clipping_run_by_run(dtype: torch.dtype, bound: float) -> None:
    trainers = [
        TrainerConfig(lr=1e-3),
        TrainerConfig(lr=3e-2, weight_decay=0.1, beta1=0.8, beta2=0.95, max_grad_norm=0.1),
        TrainerConfig(lr=1e-2, weight_decay=0.3, eps=1e-4, max_grad_norm=None),
        TrainerConfig(lr=1e-3),  # as the first: moved by the same kernel
        TrainerConfig(lr=5e-3, max_grad_norm=1e3),
    ]
    ratios = [None, 16.0, 4.0, 2.0, None]  # LoRA+; run 3 shares group A's rate with run 0
    # Runs 0..4 share a module and a bias, which is not decayed; some train something more.
    groups = [
        Stacked(Members(runs, 5), shape, dtype, None, "cpu", decays, group_b)
        for runs, shape, decays, group_b in (
            ([0, 1, 2, 3, 4], (5, 7), True, False),
            ([0, 1, 2, 3, 4], (16,), False, True),
            ([1, 3], (12,), True, True),
            ([2, 3, 4], (2, 3), True, False),
            ([2], (5,), False, True),
        )
    ]
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        group.value.copy_(torch.randn(group.value.shape, generator=generator))
    mine = [
        [g.value[g.members.runs.index(run)] for g in groups if run in g.members.runs]
        for run in range(len(trainers))
    ]
    theirs = [[nn.Parameter(row.clone()) for row in rows] for rows in mine]
    decays = [[g.decays for g in groups if run in g.members.runs] for run in range(len(trainers))]
    factors = [
        [ratios[run] or 1.0 if g.group_b else 1.0 for g in groups if run in g.members.runs]
        for run in range(len(trainers))
    ]
    references = [
        torch.optim.AdamW(
            [
                {"params": [parameter], "weight_decay": t.weight_decay if decayed else 0.0}
                for parameter, decayed in zip(parameters, flags, strict=True)
            ],
            lr=t.lr, betas=(t.beta1, t.beta2), eps=t.eps,
        )
        for parameters, flags, t in zip(theirs, decays, trainers, strict=True)
    ]  # fmt: skip
    packs_optimizer = StackedAdamW(groups, trainers, ratios)
    stopped_at = 120  # run 4
    kept = None
    for step in range(200):
        scale = 10 ** float(torch.empty(()).uniform_(-3, 2, generator=generator))
        rates = [t.lr * (1 - step / 200) for t in trainers]
        for group in groups:
            group.grad.fill_(float("nan"))  # what an earlier step left must not be seen
            whole = scale * torch.randn(group.grad.shape, generator=generator)
            group.add([(slice(None), (0.25 * whole).to(dtype))])
            group.add([(slice(None), (0.75 * whole).to(dtype))])
        expected = []
        for run, (parameters, reference, t) in enumerate(
            zip(theirs, references, trainers, strict=True)
        ):
            rows = [
                g.grad[g.members.runs.index(run)].clone() for g in groups if run in g.members.runs
            ]
            for parameter, row in zip(parameters, rows, strict=True):
                parameter.grad = row
            limit = float("inf") if t.max_grad_norm is None else t.max_grad_norm
            expected.append(nn.utils.clip_grad_norm_(parameters, limit).item())
            if run == 4 and step >= stopped_at:
                continue
            for param_group, factor in zip(reference.param_groups, factors[run], strict=True):
                param_group["lr"] = rates[run] * factor
            reference.step()
        norm = packs_optimizer.step(rates, [run != 4 or step < stopped_at for run in range(5)])
        assert norm.tolist() == pytest.approx(expected, rel=1e-6)
        if step == stopped_at:
            kept = mine[4][0].clone()
        assert all(group.cleared for group in groups)
    assert kept is not None and torch.equal(kept, mine[4][0])
    worst = max(
        relative(row, parameter.detach())
        for rows, parameters in zip(mine, theirs, strict=True)
        for row, parameter in zip(rows, parameters, strict=True)
    )
    print(f"\nlargest relative difference {worst:.2e}")
    assert worst < bound


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 16)])
def test_a_neighbours_settings_do_not_change_a_bit(shape: tuple[int, ...]) -> None:
    """Neighbours of one rate are moved by one call of the kernel, others by two."""

    def moved(lr: list[float], alive: list[bool], ratio: float | None = None) -> torch.Tensor:
        one = Stacked(Members([0, 1], 2), shape, torch.float32, None, "cpu", group_b=True)
        optimizer = StackedAdamW([one], [TrainerConfig(max_grad_norm=None)] * 2, [ratio, None])
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            one.add([(slice(None), torch.randn(one.grad.shape, generator=generator))])
            optimizer.step(lr, alive)
        return one.value[1]

    expected = moved([1e-3, 1e-3], [True, True])
    assert torch.equal(moved([1e-2, 1e-3], [True, True]), expected)
    assert torch.equal(moved([1e-3, 1e-3], [False, True]), expected)
    assert torch.equal(moved([1e-3, 1e-3], [True, True], ratio=16), expected)
