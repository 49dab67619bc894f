"""trainer.warmup_ratio and trainer.min_lr_ratio against transformers' own schedules."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMOKE, composed, recorded_runs, say
from stock import TINY

from lorabench import plan
from lorabench.config import ConfigErrors, TrainerConfig
from lorabench.train import learning_rate


def rates(make: Any, trainer: TrainerConfig, **settings: float) -> list[float]:
    """The learning rates of one of transformers' schedules."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=trainer.lr)
    scheduler = make(optimizer, trainer.warmup_steps, trainer.num_steps, **settings)
    found = []
    for _ in range(trainer.num_steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5])
def test_a_schedule_that_ends_above_zero_is_transformers(warmup: int, floor: float) -> None:
    from transformers import (
        get_cosine_with_min_lr_schedule_with_warmup,
        get_polynomial_decay_schedule_with_warmup,
    )

    common = TrainerConfig(steps=40, warmup_steps=warmup, lr=3e-4, min_lr_ratio=floor)
    for schedule, make, settings in (
        ("cosine", get_cosine_with_min_lr_schedule_with_warmup, {"min_lr_rate": floor}),
        ("linear", get_polynomial_decay_schedule_with_warmup, {"lr_end": floor * common.lr}),
    ):
        trainer = dataclasses.replace(common, schedule=schedule)
        found = [learning_rate(trainer, step) for step in range(trainer.num_steps)]
        # The same formulas in float64, products in another order; 0 is the first rate of a warm-up.
        assert found == pytest.approx(rates(make, trainer, **settings), rel=1e-12, abs=0), schedule


@pytest.mark.parametrize(("steps", "ratio"), [(40, 0.03), (40, 0.1), (7, 0.5), (1, 0.9), (9, 0.0)])
def test_a_ratio_is_as_many_steps_as_in_the_hf_trainer(
    steps: int, ratio: float, tmp_path: Path
) -> None:
    from transformers import TrainingArguments

    settings = TrainingArguments(str(tmp_path), warmup_steps=ratio, use_cpu=True)
    config = composed(*TINY, f"trainer.steps={steps}", "trainer.warmup_steps=0",
                      f"trainer.warmup_ratio={ratio}")  # fmt: skip
    found = plan.Planner().resolved(config).trainer
    assert found.warmup_steps == settings.get_warmup_steps(steps)
    assert found.warmup_ratio is None


def test_a_ratio_and_the_steps_it_makes_are_one_run() -> None:
    planner = plan.Planner()

    def run_id(*words: str) -> str:
        return planner.make(composed("tracker=none", "data.num_train=50", *words)).run_id

    assert run_id("trainer.warmup_ratio=0.03") == run_id("trainer.warmup_steps=9")
    assert run_id("trainer.warmup_ratio=0") == run_id() == run_id("trainer.min_lr_ratio=0")
    assert run_id("trainer.min_lr_ratio=0.1") not in (run_id(), run_id("trainer.min_lr_ratio=0.2"))
    # Of 11 steps, the 1.5 epochs of 50 examples.
    epochs = ["trainer.steps=null", "trainer.epochs=1.5", "trainer.warmup_ratio=0.1"]
    assert run_id(*epochs, "trainer.batch_size=8") == run_id(
        "trainer.steps=11", "trainer.warmup_steps=2", "trainer.batch_size=8"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trainer.warmup_ratio=1"], "trainer.warmup_ratio: must be in [0, 1) or null; got 1.0"),
        (
            ["trainer.warmup_ratio=0.1", "trainer.warmup_steps=5"],
            "must be null with trainer.warmup_steps=5; got 0.1; set one of the two",
        ),
        (["trainer.min_lr_ratio=-0.1"], "trainer.min_lr_ratio: must be in [0, 1); got -0.1"),
        (
            ["trainer.min_lr_ratio=0.1", "trainer.schedule=constant"],
            "which never falls; got 0.1; use trainer.schedule=cosine",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(words: list[str], told: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        composed(*words)
    (error,) = caught.value.errors
    assert told in error


def test_a_sweep_logs_the_rates_of_both(tmp_path: Path) -> None:
    """One pack of two floors: 4 steps, of them 2 of warm-up."""
    words = ["trainer.warmup_ratio=0.5", "trainer.min_lr_ratio=0,0.4", "trainer.eval_every=0"]
    said = say("train", "-m", *SMOKE, *words, f"output_dir={tmp_path}")
    assert said.code == 0, said.err
    found = {}
    for path, one in recorded_runs(tmp_path):
        rows = [json.loads(row) for row in (path / "metrics.jsonl").read_text().splitlines()]
        found[one["config"]["trainer"]["min_lr_ratio"]] = [row["train/lr"] for row in rows]
        assert one["plan"]["pack"]["size"] == 2
        assert one["config"]["trainer"]["warmup_steps"] == 2
    assert found[0.0] == pytest.approx([0, 5e-5, 1e-4, 5e-5])
    assert found[0.4] == pytest.approx([0, 5e-5, 1e-4, 7e-5])
    table = json.loads(say("compare", tmp_path / "default", "--json").out)
    assert table["varied"] == ["trainer.min_lr_ratio"]
