"""The pack's optimizer against torch.optim.AdamW, run by run."""

from __future__ import annotations

import pytest
import torch
from equality import relative
from torch import nn

from lorabench.config import TrainerConfig
from lorabench.pack.optimizer import StackedAdamW
from lorabench.pack.storage import Members, Stacked, Store


def alone(
    members: Members, shape: tuple[int, ...], dtype: torch.dtype, decays: bool = True,
    group_b: bool = False,
) -> tuple[Store, Stacked]:
    """A tensor in a store of its own."""
    store = Store(members, dtype, None, "cpu", decays, group_b)
    one = store.add(shape)
    store.allocate()
    return store, one


def gradient(one: Stacked) -> torch.Tensor:
    return torch.zeros(one.value.shape) if one.value.grad is None else one.value.grad


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
    made = [
        alone(Members(runs, 5), shape, dtype, decays, group_b)
        for runs, shape, decays, group_b in (
            ([0, 1, 2, 3, 4], (5, 7), True, False),
            ([0, 1, 2, 3, 4], (16,), False, True),
            ([1, 3], (12,), True, True),
            ([2, 3, 4], (2, 3), True, False),
            ([2], (5,), False, True),
        )
    ]
    stores, groups = [store for store, _ in made], [one for _, one in made]
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        group.value.detach().copy_(torch.randn(group.value.shape, generator=generator))
    mine = [
        [g.value.detach()[g.members.runs.index(run)] for g in groups if run in g.members.runs]
        for run in range(len(trainers))
    ]
    theirs = [[nn.Parameter(row.clone()) for row in rows] for rows in mine]
    decays = [[s.decays for s, g in made if run in g.members.runs] for run in range(len(trainers))]
    factors = [
        [ratios[run] or 1.0 if s.group_b else 1.0 for s, g in made if run in g.members.runs]
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
    packs_optimizer = StackedAdamW(stores, trainers, ratios)
    stopped_at = 120  # run 4
    kept = None
    for step in range(200):
        scale = 10 ** float(torch.empty(()).uniform_(-3, 2, generator=generator))
        rates = [t.lr * (1 - step / 200) for t in trainers]
        for group in groups:
            whole = scale * torch.randn(group.value.shape, generator=generator)
            group.value.backward((0.25 * whole).to(dtype))  # two micro-batches
            group.value.backward((0.75 * whole).to(dtype))
        expected = []
        for run, (parameters, reference, t) in enumerate(
            zip(theirs, references, trainers, strict=True)
        ):
            rows = [
                gradient(g)[g.members.runs.index(run)].clone()
                for g in groups
                if run in g.members.runs
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
        if step == stopped_at:
            packs_optimizer.stop(4)
        norm = packs_optimizer.step(rates)
        assert norm.tolist() == pytest.approx(expected, rel=1e-6)
        if step == stopped_at:
            kept = mine[4][0].clone()
        assert not any(bool(gradient(group).any()) for group in groups)
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
        store, one = alone(Members([0, 1], 2), shape, torch.float32, group_b=True)
        trainers = [TrainerConfig(max_grad_norm=None)] * 2
        optimizer = StackedAdamW([store], trainers, [ratio, None])
        for run in (0, 1):
            if not alive[run]:
                optimizer.stop(run)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            one.value.backward(torch.randn(one.value.shape, generator=generator))
            optimizer.step(lr)
        return one.value[1].detach()

    expected = moved([1e-3, 1e-3], [True, True])
    assert torch.equal(moved([1e-2, 1e-3], [True, True]), expected)
    assert torch.equal(moved([1e-3, 1e-3], [False, True]), expected)
    assert torch.equal(moved([1e-3, 1e-3], [True, True], ratio=16), expected)
