"""Whole commands on simulated scores: how often a sentence is false (benchmarks/calibration.py)."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from benches import benchmark
from conftest import say
from sweeps import write_run

from lorabench import compare, record

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
COMMANDS = 400
# 5% of commands may err; three standard errors of so few.
MOST = 0.05 + 3 * (0.05 * 0.95 / COMMANDS) ** 0.5


@pytest.fixture(scope="module")
def calibration() -> ModuleType:
    return benchmark("calibration")


@pytest.mark.parametrize(
    ("spreads", "seeds", "rate", "effect"),
    [
        ((0.1, 0.1, 0.1), 2, None, 0.0),  # where Satterthwaite alone errs in 73% of commands
        ((0.1, 0.1, 0.1), 3, None, 0.1),
        ((0.05, 0.1, 0.3), 3, None, 0.0),
        ((0.1, 0.1, 0.1), 5, 0.5, 0.1),
        ((0.02, 0.3, 0.3), 3, 0.02, 0.0),
    ],
)
def test_few_commands_have_a_false_verdict(
    calibration: ModuleType, spreads: tuple, seeds: int, rate: float | None, effect: float
) -> None:
    cell = calibration.Cell(spreads, seeds, 50, rate, effect, 0.05)
    found = calibration.simulate(cell, COMMANDS)
    assert max(found["false"], found["false_with_margin"]) <= MOST, found


def test_the_simulation_would_show_a_test_that_errs(
    calibration: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two-way test alone, without the t over seeds."""
    whole = compare.statistics.test_of

    def alone(found):
        test = whole(found)
        return type(test)(test.mean, (test.errors[0],) * 2, (test.freedoms[0],) * 2)

    monkeypatch.setattr(calibration.statistics, "test_of", alone)
    cell = calibration.Cell((0.1, 0.1, 0.1), 2, 256, None, 0.0, 0.05)
    assert calibration.simulate(cell, 200)["false"] > 0.2


def test_the_grid_is_every_row_of_it(calibration: ModuleType) -> None:
    cells = list(calibration.cells())
    assert len(calibration.questions()) == 13
    assert {cell.seeds for cell in cells} == {2, 3, 5, 8}
    plain = [cell for cell in cells if cell.rates == 1 and not cell.looks and cell.margin == 0.05]
    assert len(plain) == 2 * 4 * 5 * 3 * 2 and len(cells) == len(set(cells))
    assert {cell.looks for cell in cells} == {(), (4, 8), (3, 6, 8)}
    assert {cell.rates for cell in cells} == {1, 4}


@pytest.mark.parametrize("kind", ["select", "settle", "beyond the margin"])
def test_few_commands_of_other_kinds_have_a_false_verdict(
    calibration: ModuleType, kind: str
) -> None:
    """Where each would err most: see the reasons in selection.py, looks.py, statistics.decide."""
    cell = calibration.Cell((0.1, 0.1, 0.1), 5, 50, None, 0.0, 0.05, rates=4)
    if kind == "settle":
        cell = cell._replace(seeds=8, rates=1, looks=calibration.looks_of(2))
    if kind == "beyond the margin":
        cell = calibration.Cell((0.0, 0.3, 0.0), 3, 50, 0.001, 0.0, 0.02)
        cell = cell._replace(effect=calibration.effect_of(cell, 0.021))
    found = calibration.simulate(cell, COMMANDS)
    assert max(found["false"], found["false_with_margin"]) <= MOST, found


def test_one_averaged_question_of_the_best_of_four_rates_seldom_errs(
    calibration: ModuleType,
) -> None:
    """Without the allowance 16% of these commands find what is not there."""
    cell = calibration.Cell((0.1, 0.1, 0.1), 5, 50, None, 0.0, 0.05, rates=4)
    w = calibration.weights(calibration.questions())[:1]
    drawn = calibration.scores(cell, COMMANDS, np.random.default_rng(0))
    gains = np.einsum("qk,cksn->cqsn", w, drawn.test)
    tables = calibration.statistics.components(gains.astype(np.float64))
    plain = calibration.statistics.decide(tables).found.mean()
    allowed = calibration.statistics.decide(tables, flattery=drawn.flattery @ w.T).found.mean()
    assert plain > 0.1 and allowed <= MOST, (plain, allowed)


def test_margins_of_many_questions_hold_at_once(calibration: ModuleType) -> None:
    """Holm's steps, which are about zero, err in one of ten such commands."""
    rng = np.random.default_rng(0)
    gains = 0.0501 + 0.05 * rng.normal(size=(COMMANDS, 12, 1, 256))
    gains = gains + 0.02 * rng.normal(size=(COMMANDS, 12, 5, 256))
    tables = calibration.statistics.components(gains)
    wrong = [
        one.no_worse(0.05)[1].any(-1).mean()  # that the second is no worse by more than 0.05
        for one in (
            calibration.statistics.decide(tables, with_margin=False),
            calibration.statistics.decide(tables, with_margin=True),
        )
    ]
    assert wrong[0] > 0.07 and wrong[1] <= MOST, wrong


def test_simulated_commands_are_what_compare_says(calibration: ModuleType, tmp_path: Path) -> None:
    """The same scores through the command line: the same questions found."""
    cell = calibration.Cell((0.02, 0.1, 0.1), 5, 50, None, 0.3, 0.05)
    y = calibration.scores(cell, 1, np.random.default_rng(0)).test[0].astype(np.float64)
    for setting, of_seeds in zip(calibration.SETTINGS, y, strict=True):
        for seed, values in enumerate(of_seeds):
            head, r = setting["head.policy"], setting["lora.r"]
            write_run(tmp_path / "s", head, r, seed, {"exact_match": values})
    answers = compare.verdicts(record.find(tmp_path / "s"))
    w = calibration.weights(calibration.questions())
    gains = np.einsum("qk,ksn->qsn", w, y)
    decided = calibration.statistics.decide(calibration.statistics.components(gains))
    assert [one.outcome == "found" for one in answers.verdicts] == decided.found.tolist()
    assert any(decided.found) and not all(decided.found)
    p = [one.p for one in answers.verdicts]
    assert p == pytest.approx(decided.p.tolist(), rel=1e-6)
    assert say("compare", tmp_path / "s").code == 0
