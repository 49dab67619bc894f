"""How far a pack is from stock PEFT: losses, weights, gradients from the same weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from stock import Stock, copy_of, gradients, packed, train_pack
from torch import Tensor

from lorabench import plan
from lorabench.config import Config
from lorabench.pack import ModulePack, StackedPack


def relative(a: Tensor, b: Tensor) -> float:
    found = float((a - b).norm() / b.norm().clamp_min(1e-30))
    assert not math.isnan(found), "a NaN is not below a bound, but max() would pass over it"
    return found


def compare_training(configs: list[Config], device: str = "cpu") -> tuple[float, tuple[float, str]]:
    """`differences` of a pack of these runs from stock PEFT's own training of each."""
    planner = plan.Planner()
    pack = packed(configs, device, planner)
    initial = [copy_of(pack.adapter_state(run)) for run in range(pack.size)]
    losses = train_pack(pack)
    stocks = (Stock(*pair, device, planner) for pair in zip(configs, initial, strict=True))
    trained = ((stock, stock.train()) for stock in stocks)
    return differences(pack, initial, losses, trained)


def compare_gradients(
    configs: list[Config], steps: list[int], device: str = "cpu"
) -> tuple[float, str]:
    """Largest relative difference of a gradient from the same weights at any of these steps."""
    planner = plan.Planner()
    pack = packed(configs, device, planner)
    stocks = [
        Stock(one, pack.adapter_state(run), device, planner) for run, one in enumerate(configs)
    ]
    worst, update, done, zeros = (0.0, ""), pack.update, iter(range(10**6)), 0

    def compare_then_update(lr: list[float]) -> Tensor:
        nonlocal worst, zeros
        step = next(done)
        if step in steps:
            for run, stock in enumerate(stocks):
                stock.load(copy_of(pack.adapter_state(run)))
                mine, theirs = gradients(pack, run), stock.gradients(step)
                assert set(mine) == set(theirs)
                for name, tensor in mine.items():
                    where = f"step {step}, run {run}: {name}"
                    if step == 0 and ".lora_A." in name:
                        # dL/dA = s B^T (...) is zero while B = 0: the first step's A
                        assert tensor.abs().max() <= 1e-12, where
                        assert theirs[name].abs().max() <= 1e-12, where
                        zeros += 1
                    else:
                        assert theirs[name].norm() > 1e-12, f"{where}: nothing to compare"
                        worst = max(worst, (relative(tensor, theirs[name]), where))
        return update(lr)

    pack.update = compare_then_update  # type: ignore[method-assign]
    train_pack(pack)
    assert zeros == sum(place.kind == "lora_A" for found in pack.places for place in found)
    print(f"\nlargest relative difference of a gradient {worst[0]:.2e} ({worst[1]})")
    return worst


def differences(
    pack: ModulePack | StackedPack,
    initial: list[dict[str, Tensor]],
    losses: list[list[float]],
    trained: Iterable[tuple[Any, list[float]]],
) -> tuple[float, tuple[float, str]]:
    """Largest difference of a loss, and of a trained tensor in relative norm with its name.

    Args:
        initial, losses: adapters before the training, and losses, one of each a run of the pack.
        trained: what stock PEFT made of each run (anything with `state()`), and its losses.
    """
    worst_loss, worst = 0.0, (0.0, "")
    for run, (stock, expected) in zip(range(pack.size), trained, strict=True):
        gaps = [abs(mine - theirs) for mine, theirs in zip(losses[run], expected, strict=True)]
        assert not any(map(math.isnan, gaps)), f"run {run}: a loss is NaN"
        worst_loss = max(worst_loss, *gaps)
        mine, theirs = pack.adapter_state(run), stock.state()
        assert set(mine) == set(theirs)
        for name, tensor in mine.items():
            assert not torch.equal(tensor, initial[run][name]), f"run {run}: {name} did not train"
            worst = max(worst, (relative(tensor, theirs[name]), f"run {run}: {name}"))
    print(f"\nlargest differences: loss {worst_loss:.2e}, weights {worst[0]:.2e} ({worst[1]})")
    return worst_loss, worst
