"""A value chosen on validation: which one, what the choice owes to its seeds, who may be chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import say
from scipy import stats
from sweeps import write_run

from lorabench import record
from lorabench.compare.selection import flattery

RATES = (1e-3, 2e-3, 4e-3)
SEEDS, EXAMPLES = 5, 40


def said_json(*words: Any) -> dict[str, Any]:
    said = say("compare", *words, "--json")
    assert said.code == 0, said.err
    return json.loads(said.out)


def write_rates(
    folder: Path, loss: dict[tuple[str, float], float], on_test: float = 0.0
) -> dict[tuple[str, float, int], tuple[float, np.ndarray]]:
    """Write a sweep over heads and learning rates; return validation mean and test scores of each.

    A run is as good on validation as on test, but for chance: its seed decides both.

    Args:
        on_test: added to the test scores of the first rate of head=lora alone.
    """
    rng = np.random.default_rng(0)
    found = {}
    for (head, lr), mean in loss.items():
        for seed in range(SEEDS):
            luck = mean + 0.02 * rng.normal()
            values = luck + 0.05 * rng.normal(size=EXAMPLES)
            values += on_test * (lr == RATES[0] and head == "lora")
            validation = luck + 0.01 * rng.normal()
            found[head, lr, seed] = validation, values
            write_run(
                folder, head, 16, seed, {"nll": values}, validation={"nll": validation},
                config={"trainer": {"steps": 4, "lr": lr}}, name=f"{head}-{lr:g}-{seed}",
            )  # fmt: skip
    return found


def test_the_best_on_validation_is_judged_on_test(tmp_path: Path) -> None:
    """The middle rate is the best on validation; on test another one would be."""
    loss = {("lora", lr): (0.9 if lr == 2e-3 else 1.4) for lr in RATES} | {("exclude", 1e-3): 1.2}
    runs = write_rates(tmp_path / "s", loss, on_test=-1.0)
    found = said_json(tmp_path / "s", "--select", "trainer.lr")
    (one,) = found["verdicts"]
    assert (one["factor"], one["better"], one["outcome"]) == ("head", "lora", "found")
    gains = np.stack([runs["exclude", 1e-3, s][1] - runs["lora", 2e-3, s][1] for s in range(SEEDS)])
    assert one["gain"] == pytest.approx(gains.mean(), rel=1e-9)
    assert one["flattery"] == 0  # every seed chooses the same: nothing is owed to luck
    half = stats.sem(gains.mean(1)) * stats.t.isf(0.025, SEEDS - 1)
    assert one["low"] <= gains.mean() - half + 1e-9
    chosen = {one["at"]["head"]: one for one in found["chosen"]}
    assert {head: one["value"] for head, one in chosen.items()} == {
        "lora": "0.002", "exclude": "0.001",
    }  # fmt: skip
    mine = np.mean([runs["lora", 4e-3, s][0] for s in range(SEEDS)])
    assert chosen["lora"]["means"]["0.004"] == pytest.approx(mine, rel=1e-12)
    said = say("compare", tmp_path / "s", "--select", "trainer.lr").out
    assert "chosen on validation at head=lora: lr=0.002" in said


def test_what_the_choice_owes_to_luck_is_in_the_interval(tmp_path: Path) -> None:
    loss = {("lora", lr): 1.0 for lr in RATES} | {("exclude", 1e-3): 1.0}
    runs = write_rates(tmp_path / "s", loss)
    (one,) = said_json(tmp_path / "s", "--select", "lr")["verdicts"]
    table = np.array([[runs["lora", lr, s][0] for s in range(SEEDS)] for lr in RATES])
    best = table.mean(1).argmin()
    owed = (table[best] - table.min(0)).mean() / (np.sqrt(SEEDS) - 1)
    assert owed > 0
    signed = owed if one["better"] == "lora" else -owed
    assert one["flattery"] == pytest.approx(signed, rel=1e-9)
    # Wider on the side of the level that had a choice, by what it may owe.
    centre = (one["low"] + one["high"]) / 2
    assert centre == pytest.approx(one["gain"] - signed / 2, rel=1e-6)


def test_flattery_is_what_simulation_gives() -> None:
    """The best of four equal values, by its mean over seeds: how much better than its true mean."""
    loss = np.random.default_rng(0).normal(size=(20_000, 4, 5))
    true = -loss.mean(-1).min(-1).mean()  # their true mean is zero
    # 5%: the formula's expectation is exact, 20,000 draws of it are within 2%.
    assert flattery(loss).mean() == pytest.approx(true, rel=0.05)
    clear = loss + np.array([0, 9, 9, 9])[:, None]
    assert flattery(clear).mean() == pytest.approx(0, abs=1e-9)
    assert (flattery(loss[..., :1]) == 0).all()


def test_a_rate_that_diverged_is_not_chosen_and_one_that_was_not_run_is_still_a_candidate(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(1)
    for lr in (*RATES, 8e-3):
        for seed in range(3):
            if lr == 4e-3 and seed == 2:
                continue  # not run
            good = {1e-3: 1.0, 2e-3: 0.1, 4e-3: 0.2, 8e-3: 0.05}[lr]
            bad = lr == 2e-3 and seed == 1  # finished, but its validation loss is not finite
            run = write_run(
                tmp_path / "s", "lora", 16, seed, {"nll": good + rng.normal(size=20) / 50},
                config={"trainer": {"steps": 4, "lr": lr}}, name=f"{lr:g}-{seed}",
                validation={"nll": None if bad else good},
            )  # fmt: skip
            if lr == 8e-3 and seed == 0:  # it diverged and was stopped
                entry = record.read(run)
                assert entry is not None
                entry.status = "stopped"
                entry.write(run)
    found = said_json(tmp_path / "s", "--select", "trainer.lr")
    (one,) = found["chosen"]
    assert one["value"] == "0.004" and one["seeds"] == 2
    assert list(one["means"]) == ["0.001", "0.004"]
    assert {*one["no_candidates"]} == {"0.002", "0.008"}
    out = say("compare", tmp_path / "s", "--select", "trainer.lr").out
    assert "over 2 seeds; 0.002 diverged" in out


def test_selecting_needs_validation_scores_and_something_that_varies(tmp_path: Path) -> None:
    for head in ("exclude", "lora"):
        write_run(tmp_path / "s", head, 16, 0, {"nll": np.arange(20.0)})
    said = say("compare", tmp_path / "s", "--select", "head")
    assert said.code == 2 and "validation split to choose by" in said.err, said.err
    said = say("compare", tmp_path / "s", "--select", "trainer.lr")
    assert said.code == 2 and "--select: must name what varies" in said.err
