"""Lints of learning rates: whether each setting was shown at its best one."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorabench.compare.lints.design import Design, Lint, listed
from lorabench.compare.scored import CHOOSER, metric_of
from lorabench.compare.selection import select
from lorabench.compare.tables import choose_evaluations, setting
from lorabench.config import HIGHER_IS_BETTER

LR = "trainer.lr"
# The best learning rate depends on all keys that begin so, apart from those that only change
# rounding or are a label.
MOVES_LR = ("task", "model.", "target_modules.", "head.", "lora.", "stages", "trainer.")
MOVES_NOTHING = (
    "model.name",
    "model.attn_implementation",
    "trainer.micro_batch_size",
    "trainer.gradient_checkpointing",
    "trainer.deterministic",
    "trainer.allow_tf32",
)


def lr_edge(design: Design) -> list[Lint]:
    """Find settings whose best learning rate on validation is the smallest or largest tried.

    A rate whose run diverged was tried: it bounds the grid from above.
    """
    tried: dict[str, set[float]] = {}
    for one in design.diverged:
        values = setting(one.config)
        if values.get(LR) is not None:
            tried.setdefault(_but_rate(values), set()).add(float(values[LR]))
    edges: dict[tuple[bool, float, float], list[int]] = {}  # is above, best, next -> settings
    chosen = _chosen_rates(design)
    for rates in _by_rate(design):
        best = next((rate for rate, i in rates.items() if i in chosen), None)
        grid = sorted({*rates, *tried.get(_but_rate(design.settings[min(rates.values())]), ())})
        if best is None or len(grid) < 2 or best not in (grid[0], grid[-1]):
            continue
        above = best == grid[-1]
        factor = grid[-1] / grid[-2] if above else grid[0] / grid[1]
        edges.setdefault((above, best, best * factor), []).append(rates[best])
    metric = _metric(design)
    found = []
    for (above, best, beyond), settings in sorted(edges.items()):
        end, better = ("largest", "larger") if above else ("smallest", "smaller")
        text = (
            f"the best learning rate on {CHOOSER} {metric} is the {end} that was tried, {best:g}, "
            f"for {design.named(settings, [LR])}: a {better} one may be better"
        )
        remedy = f"extend the grid: add trainer.lr={beyond:.2g}"
        found.append(Lint("lr-edge", text, remedy, design.ids(settings)))
    return found


def one_rate(design: Design) -> list[Lint]:
    """Find settings trained at one learning rate though something varies that moves the best."""
    moving = [
        factor
        for factor in design.factors
        if any(key.startswith(MOVES_LR) and key not in (LR, *MOVES_NOTHING) for key in factor.keys)
    ]
    single = [one for one in _by_rate(design) if len(one) == 1]
    if not moving or not single:
        return []
    settings = [i for one in single for i in one.values()]
    rates = sorted({rate for one in single for rate in one})
    names = listed(one.name for one in moving)
    where = design.named(settings, [LR])
    if len(rates) == 1:
        told = f"learning rate {rates[0]:g} alone was tried for {where}"
    else:
        told = f"one learning rate each ({rates[0]:g} to {rates[-1]:g}) was tried for {where}"
    text = (
        f"{told}, and {names} may change which is best: a difference may be that the rate suits "
        f"one setting better"
    )
    middle = rates[len(rates) // 2]
    grid = f"{middle / 3:.1g},{middle:g},{middle * 3:.1g}"
    remedy = f"sweep the rate too, such as trainer.lr={grid}, and compare with `--select {LR}`"
    return [Lint("one-lr", text, remedy, design.ids(settings))]


def _by_rate(design: Design) -> list[dict[float, int]]:
    """Settings by learning rate, at each combination of everything else."""
    found: dict[str, dict[float, int]] = {}
    for i, values in enumerate(design.settings):
        if (rate := values.get(LR)) is not None:
            found.setdefault(_but_rate(values), {})[float(rate)] = i
    return list(found.values())


def _but_rate(values: dict[str, Any]) -> str:
    left_out = (LR, "data.data_hash", "model.base_hash")  # a diverged run's setting has no hashes
    return repr(sorted((key, value) for key, value in values.items() if key not in left_out))


def _metric(design: Design) -> str | None:
    return design.answers.metric if design.answers else metric_of(design.records)


def _chosen_rates(design: Design) -> set[int]:
    """Settings with the best learning rate of their combination, by the mean over seeds."""
    metric = _metric(design)
    factor = next((one for one in design.factors if one.keys == (LR,)), None)
    evaluations = choose_evaluations(design.records).get(CHOOSER)
    if metric is None or factor is None or evaluations is None:
        return set()
    values: list[dict[Any, Any]] = []
    for members in design.members:
        mine: dict[Any, Any] = {}
        for i in sorted(members, key=lambda i: design.runs[i][1].ended or ""):
            evaluation = evaluations["of_runs"][i]
            score = evaluation and evaluation.splits[CHOOSER].metrics.get(metric)
            seeds = tuple(sorted(design.runs[i][1].seeds.items()))
            mine[seeds] = np.nan if not score or score.value is None else score.value
        values.append(mine)
    selection = select(
        factor, design.factors, design.settings, values, values, metric in HIGHER_IS_BETTER
    )
    return {
        i
        for members, chosen in zip(selection.members, selection.chosen, strict=True)
        for i in members
        if chosen is not None and factor.levels[factor.of_settings[i]] == chosen.value
    }
