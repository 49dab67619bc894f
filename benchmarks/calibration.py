"""How often a verdict is false: whole commands on simulated scores.

    python benchmarks/calibration.py                 4,000 commands per cell: a quarter of an hour
    python benchmarks/calibration.py --commands 200  a first look

A command compares two heads at three ranks: 13 questions. A cell says how scores come about: how
much seeds, examples and chance change a difference, how many seeds and examples there are, whether
scores are normal or 0 and 1, and whether no setting differs or one does. False is "found" where the
true difference is zero or of the other sign, and "no worse than X" where it is worse than X.

Three kinds of commands: `compare`; `compare --select trainer.lr`, where one head has four learning
rates to choose from and the other one; and `settle`, which looks at a sweep two or three times
while seeds are added to what is not settled.

Results: benchmarks/results/calibration.json. Exit code 1 if a cell has more than 6% of commands
with a false verdict.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorabench.compare import looks, selection, statistics
from lorabench.compare.questions import Question, factors_of, questions_of

# Standard deviations of the difference of two runs over seeds, over examples, and of the rest.
SPREADS = [(0.0, 0.3, 0.3), (0.02, 0.3, 0.3), (0.05, 0.1, 0.3), (0.1, 0.1, 0.1), (0.1, 0.0, 0.1)]
SEEDS, EXAMPLES = (2, 3, 5, 8), (256, 50)
BASE_RATES = (None, 0.5, 0.02)  # None: normal scores
HEADS, RANKS = ("exclude", "lora"), (16, 32, 64)
SETTINGS = [{"head.policy": head, "lora.r": r} for head in HEADS for r in RANKS]
CHANGED = 4  # the setting with a true difference
PARTS = ("mean", "seeds", "examples", "rest")
MOST = 0.06  # of commands with a false verdict


class Cell(NamedTuple):
    """How scores come about."""

    spreads: tuple[float, float, float]
    seeds: int
    examples: int
    base_rate: float | None
    effect: float  # of one setting, in the unit of normal scores
    margin: float  # in that of the scores
    rates: int = 1  # learning rates of the second head, of which the best on validation is judged
    looks: tuple[int, ...] = ()  # seeds at each look; none: one look at all of them


def cells() -> Iterator[Cell]:
    """Every cell of the grid."""
    for examples, seeds, spreads, rate, effect in itertools.product(
        EXAMPLES, SEEDS, SPREADS, BASE_RATES, (0.0, 0.1)
    ):
        yield Cell(spreads, seeds, examples, rate, effect, 0.05)
    for seeds, spreads, rate in itertools.product(SEEDS, SPREADS, BASE_RATES[:2]):
        yield Cell(spreads, seeds, 50, rate, 0.0, 0.05, rates=4)
    for have, spreads, rate, effect in itertools.product(
        (2, 3), SPREADS, BASE_RATES[:2], (0.0, 0.1)
    ):
        yield Cell(spreads, 8, 50, rate, effect, 0.05, looks=looks_of(have))
    # Just beyond the margin, where most examples show nothing: the same ones in every seed, or not.
    for examples, seeds, spreads, rate in itertools.product(
        EXAMPLES, (3, 8), (SPREADS[0], (0.0, 0.3, 0.0)), (0.001, 0.02)
    ):
        cell = Cell(spreads, seeds, examples, rate, 0.0, 0.02)
        yield cell._replace(effect=effect_of(cell, 1.05 * cell.margin))


def effect_of(cell: Cell, gain: float) -> float:
    """The effect in the unit of normal scores that adds so much to a share."""
    from scipy import special

    spread = float(np.sqrt(sum(sd**2 for sd in cell.spreads)))
    return threshold(cell) - float(special.ndtri(1 - cell.base_rate - gain)) * spread


def looks_of(have: int) -> tuple[int, ...]:
    """Seeds at the looks of `settle`, at a sweep that has so many."""
    return tuple(len(look.seeds) for look in looks.plan_looks(range(have), 8))


def questions() -> list[Question]:
    """What the command asks."""
    return questions_of(factors_of(SETTINGS))


def weights(asked: list[Question]) -> np.ndarray:
    """What each question adds up, (questions, settings)."""
    found = np.zeros((len(asked), len(SETTINGS)))
    for i, question in enumerate(asked):
        for first, second in question.pairs:
            found[i, first] += 1 / len(question.pairs)
            found[i, second] -= 1 / len(question.pairs)
    return found


class Drawn(NamedTuple):
    """Scores of so many commands; K settings."""

    test: np.ndarray  # (commands, K, S, N)
    flattery: np.ndarray  # (commands, K): what a setting may owe to a choice on its seeds


def scores(cell: Cell, commands: int, rng: np.random.Generator) -> Drawn:
    """Draw the scores of every run, of one sweep each.

    Scores of 0 and 1 are whether a normal one is above a threshold, with examples that are hard or
    easy for all settings.
    """
    over_seeds, over_examples, rest = (sd / np.sqrt(2) for sd in cell.spreads)  # of one run
    spread = np.sqrt(over_seeds**2 + over_examples**2 + rest**2)

    def normal(*parts: int) -> np.ndarray:
        return rng.standard_normal(parts, dtype=np.float32)

    def seen(of_seeds: np.ndarray, hard: np.ndarray | float) -> np.ndarray:
        """Scores of a split, (..., S, N), of runs that their seeds made so good, (..., S)."""
        shape = (*of_seeds.shape, cell.examples)
        found = rest * normal(*shape) + of_seeds[..., None]
        found += over_examples * normal(*shape[:-2], 1, shape[-1])
        if cell.base_rate is None:
            return found
        return (found + spread * hard > threshold(cell)).astype(np.float32)

    shape = (commands, len(SETTINGS), cell.seeds)
    of_seeds = over_seeds * normal(*shape)
    of_seeds[:, CHANGED] += cell.effect
    flattery = np.zeros(shape[:2])
    if cell.rates > 1:
        hard_validation = normal(commands, 1, 1, cell.examples)
        for place, setting in enumerate(SETTINGS):
            if setting["head.policy"] != HEADS[1]:
                continue
            tried = over_seeds * normal(commands, cell.rates, cell.seeds)
            tried += cell.effect * (place == CHANGED)
            loss = -seen(tried, hard_validation).mean(-1)
            best = loss.mean(-1).argmin(-1)
            of_seeds[:, place] = np.take_along_axis(tried, best[:, None, None], 1)[:, 0]
            flattery[:, place] = selection.flattery(loss.astype(np.float64))
    return Drawn(seen(of_seeds, normal(commands, 1, 1, cell.examples)), flattery)


def threshold(cell: Cell) -> float:
    """Above which a score is 1 in a cell's share of examples."""
    from scipy import special

    spread = np.sqrt(sum(sd**2 for sd in cell.spreads))  # of a run and of its example's difficulty
    return float(special.ndtri(1 - cell.base_rate) * spread)


def true_gains(cell: Cell, w: np.ndarray) -> np.ndarray:
    """The true difference of every question."""
    changed = cell.effect
    if cell.base_rate is not None:
        from scipy import special

        spread = np.sqrt(sum(sd**2 for sd in cell.spreads))
        changed = float(special.ndtr((cell.effect - threshold(cell)) / spread)) - cell.base_rate
    return w[:, CHANGED] * changed


def simulate(cell: Cell, commands: int, seed: int = 0) -> dict[str, float]:
    """Shares of commands with a false verdict, without and with --margin; of questions found."""
    rng = np.random.default_rng([seed, *map(ord, repr(cell))])
    w = weights(questions())
    true = np.round(true_gains(cell, w), 12)
    sums = np.zeros(4)
    step = max(1, 20_000_000 // (len(w) * cell.seeds * cell.examples * 8))
    for first in range(0, commands, step):
        count = min(step, commands - first)
        drawn = scores(cell, count, rng)
        gains = np.einsum("qk,cksn->cqsn", w.astype(np.float32), drawn.test)
        answer = _answers_at_looks if cell.looks else _answers
        flattery = drawn.flattery @ w.T
        found, sign, *_ = answer(cell, gains, flattery, False)
        wrong = found & (sign != np.sign(true))
        with_margin, its_sign, no_worse, reverse = answer(cell, gains, flattery, True)
        bad = (no_worse & (true < -cell.margin)) | (reverse & (true > cell.margin))
        bad |= with_margin & (its_sign != np.sign(true))
        still_open = ~(with_margin | no_worse | reverse)
        sums += [
            wrong.any(-1).sum(), bad.any(-1).sum(), found.sum() / len(w),
            still_open.sum() / len(w),
        ]  # fmt: skip
    names = ("false", "false_with_margin", "found", "not_settled_with_margin")
    return dict(zip(names, (sums / commands).tolist(), strict=True))


def _answers(
    cell: Cell, gains: np.ndarray, flattery: np.ndarray, with_margin: bool
) -> tuple[np.ndarray, ...]:
    """What `compare` says: found, its sign, and what is no worse either way, (commands, Q)."""
    tables = statistics.components(gains.astype(np.float64))
    decided = statistics.decide(
        tables, statistics.LEVEL, flattery, cell.base_rate is not None, with_margin
    )
    return decided.found, np.sign(decided.mean), *decided.no_worse(cell.margin)


def _answers_at_looks(
    cell: Cell, gains: np.ndarray, _: np.ndarray, with_margin: bool
) -> tuple[np.ndarray, ...]:
    """What `settle` says: each question at the first look that settles it."""
    shares = looks.SHARES[len(cell.looks)]
    found, no_worse, reverse = (np.zeros(gains.shape[:2], dtype=bool) for _ in range(3))
    sign = np.zeros(gains.shape[:2])
    for seeds, share in zip(cell.looks, shares, strict=True):
        tables = statistics.components(gains[:, :, :seeds].astype(np.float64))
        for c in range(len(gains)):  # each has other questions left
            settled = found[c] | ((no_worse | reverse)[c] if with_margin else False)
            left = np.flatnonzero(~settled)
            if len(left):
                mine = statistics.Components(
                    *(getattr(tables, name)[c, left] for name in PARTS), seeds, cell.examples
                )
                decided = statistics.decide(
                    mine, statistics.LEVEL * share, 0.0, cell.base_rate is not None, with_margin
                )
                found[c, left], sign[c, left] = decided.found, np.sign(decided.mean)
                no_worse[c, left], reverse[c, left] = decided.no_worse(cell.margin)
    return found, sign, no_worse, reverse


def main(arguments: list[str]) -> int:
    """Simulate every cell; return 1 where one errs too often."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--commands", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=Path(__file__).parent / "results", type=Path)
    options = parser.parse_args(arguments)
    begun, rows = time.perf_counter(), []
    for cell in cells():
        row = cell._asdict() | simulate(cell, options.commands, options.seed)
        rows.append(row)
        print(json.dumps(row), flush=True)
    worst = max(max(row["false"], row["false_with_margin"]) for row in rows)
    result: dict[str, Any] = {
        "commands": options.commands, "seed": options.seed,
        "minutes": round((time.perf_counter() - begun) / 60, 1),
        "worst": worst, "cells": rows,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "calibration.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(rows)} cells; the worst has {worst:.1%} commands with a false verdict")
    return 0 if worst <= MOST else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
