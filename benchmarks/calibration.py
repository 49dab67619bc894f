"""How often a verdict is false: whole `compare` commands on simulated scores.

    python benchmarks/calibration.py                 every cell, 2,000 commands each: two minutes
    python benchmarks/calibration.py --commands 200  a first look

A command compares two heads at three ranks: 13 questions. A cell says how scores come about: how
much seeds, examples and chance change a difference, how many seeds and examples there are, whether
scores are normal or 0 and 1, and whether no setting differs or one does. False is "found" where the
true difference is zero or of the other sign, and "no worse than X" where it is worse than X.

Results: benchmarks/results/calibration.json. Exit code 1 if a cell has more than 6% of commands
with a false verdict: 5% and two standard errors of 2,000 commands.
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

from lorabench.compare import statistics
from lorabench.compare.questions import Question, factors_of, questions_of

# Standard deviations of the difference of two runs over seeds, over examples, and of the rest.
SPREADS = [(0.0, 0.3, 0.3), (0.02, 0.3, 0.3), (0.05, 0.1, 0.3), (0.1, 0.1, 0.1), (0.1, 0.0, 0.1)]
SEEDS, EXAMPLES = (2, 3, 5, 8), (256, 50)
BASE_RATES = (None, 0.5, 0.02)  # None: normal scores
HEADS, RANKS = ("exclude", "lora"), (16, 32, 64)
SETTINGS = [{"head.policy": head, "lora.r": r} for head in HEADS for r in RANKS]
CHANGED = 4  # the setting with a true difference
MOST = 0.06  # of commands with a false verdict: 5% and two standard errors of 2,000


class Cell(NamedTuple):
    """How scores come about."""

    spreads: tuple[float, float, float]
    seeds: int
    examples: int
    base_rate: float | None
    effect: float  # of one setting, in the unit of normal scores
    margin: float  # in that of the scores


def cells() -> Iterator[Cell]:
    """Every cell of the grid."""
    for examples, seeds, spreads, rate, effect in itertools.product(
        EXAMPLES, SEEDS, SPREADS, BASE_RATES, (0.0, 0.1)
    ):
        yield Cell(spreads, seeds, examples, rate, effect, 0.05)


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


def scores(cell: Cell, commands: int, rng: np.random.Generator) -> np.ndarray:
    """Scores of every run, (commands, settings, S, N): of one sweep each.

    Scores of 0 and 1 are whether a normal one is above a threshold, with examples that are hard or
    easy for all settings.
    """
    over_seeds, over_examples, rest = (sd / np.sqrt(2) for sd in cell.spreads)  # of one run
    shape = (commands, len(SETTINGS), cell.seeds, cell.examples)

    def normal(*parts: int) -> np.ndarray:
        return rng.standard_normal(parts, dtype=np.float32)

    found = rest * normal(*shape)
    found += over_seeds * normal(*shape[:3], 1)
    found += over_examples * normal(*shape[:2], 1, shape[3])
    found[:, CHANGED] += cell.effect
    if cell.base_rate is None:
        return found
    spread = np.sqrt(over_seeds**2 + over_examples**2 + rest**2)
    found += spread * normal(commands, 1, 1, cell.examples)
    return found > threshold(cell)


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
    """Shares of commands with a false verdict, and of questions found and left open."""
    rng = np.random.default_rng([seed, *map(ord, repr(cell))])
    w = weights(questions())
    true = true_gains(cell, w)
    false_found = false_margin = found_questions = open_questions = 0.0
    wrong_commands = 0
    step = max(1, 20_000_000 // (len(w) * cell.seeds * cell.examples * 8))
    for first in range(0, commands, step):
        count = min(step, commands - first)
        y = scores(cell, count, rng)
        gains = np.einsum("qk,cksn->cqsn", w.astype(np.float32), y.astype(np.float32))
        decided = statistics.decide(statistics.components(gains.astype(np.float64)))
        wrong = decided.found & (np.sign(decided.mean) != np.sign(np.round(true, 12)))
        no_worse, reverse = decided.no_worse(cell.margin)
        bad = (no_worse & (true < -cell.margin)) | (reverse & (true > cell.margin))
        false_found += wrong.any(-1).sum()
        false_margin += bad.any(-1).sum()
        wrong_commands += (wrong | bad).any(-1).sum()
        found_questions += decided.found.sum()
        open_questions += (~(decided.found | no_worse | reverse)).sum()
    total = commands * len(w)
    return {
        "false": float(wrong_commands / commands),
        "false_found": float(false_found / commands),
        "false_no_worse": float(false_margin / commands),
        "found": float(found_questions / total),
        "not_settled": float(open_questions / total),
    }


def main(arguments: list[str]) -> int:
    """Simulate every cell; return 1 where one errs too often."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--commands", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=Path(__file__).parent / "results", type=Path)
    options = parser.parse_args(arguments)
    begun, rows = time.perf_counter(), []
    for cell in cells():
        row = cell._asdict() | simulate(cell, options.commands, options.seed)
        rows.append(row)
        print(json.dumps(row), flush=True)
    worst = max(rows, key=lambda row: row["false"])
    result: dict[str, Any] = {
        "commands": options.commands, "seed": options.seed,
        "minutes": round((time.perf_counter() - begun) / 60, 1),
        "worst": worst["false"], "cells": rows,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "calibration.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(rows)} cells; the worst has {worst['false']:.1%} commands with a false verdict")
    return 0 if worst["false"] <= MOST else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
