"""Records as they come from finished runs, with what a lint looks at; no training, no files."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

from lorabench import compare
from lorabench.compare.lints import Lint, lints
from lorabench.record import Cost, Evaluation, Metric, Record, Scores

Run = tuple[Path, Record]
STACK = {"packages": {"torch": "2.13.0"}, "device": "cpu", "gpu": None, "cpu": "x", "threads": 1}


def run(
    seed: int = 0,
    lr: float = 1e-3,
    head: str = "exclude",
    validation: float | None = 1.0,
    examples: int = 60,
    lora: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    tokens: int = 1000,
    parameters: int = 1000,
    definition: str = "nll/1",
    test_set: str = "test",
    **changes: Any,
) -> Run:
    """A finished run with one metric on both splits, as its record says."""
    splits = {
        split: Scores(
            examples=which,
            tokens="",
            metrics={"nll": Metric(value=value, num_examples=examples, definition=definition)},
        )
        for split, which, value in (("validation", "v", validation), ("test", test_set, 1.0))
    }
    evaluation = Evaluation(
        id="0123456789ab", settings={}, splits=splits, predictions="", predictions_sha256="",
        batch_size=32, ended="2026-11-26T12:00:00Z",
    )  # fmt: skip
    streams = {"init": seed, "data": seed, "dropout": seed}
    whole = {
        "head": {"policy": head},
        "lora": {"r": 8, "lora_alpha": None, "alpha_ratio": None, "use_rslora": False}
        | (lora or {}),
        "trainer": {"steps": 4, "batch_size": 2, "lr": lr, "eval_examples": None} | (trainer or {}),
        "data": {"num_test": examples},
        "seed": seed,
        **(config or {}),
    }
    content = {
        "run_id": f"{random.Random(repr([whole, changes])).getrandbits(48):012x}",
        "sweep": "s",
        "status": "finished",
        "config": whole,
        "seeds": streams,
        "plan": {"trainable_parameters": parameters, "lengths": {"tokens": tokens}},
        "provenance": STACK,
        "evaluations": [evaluation],
        "cost": Cost(train_tokens=tokens),
        "hashes": {"train": "aaaaaaaaaa", "base": "bbbbbbbbbb"},
    }
    found = Record(**(content | changes))
    return Path("outputs/s") / found.run_id, found


def valley(lr: float) -> float:
    """A validation loss that is lowest at 1e-3."""
    return {1e-4: 1.2, 1e-3: 1.0, 1e-2: 1.3}[lr]


def clean() -> list[Run]:
    """Two heads at three learning rates with three seeds: the best rate is in the middle."""
    return [
        run(seed, lr, head, valley(lr))
        for head, lr, seed in itertools.product(("exclude", "lora"), (1e-4, 1e-3, 1e-2), range(3))
    ]


def only(runs: list[Run], name: str, answers: compare.Answers | None = None) -> Lint:
    """The one lint of a name; its runs are runs that there are, each once."""
    (found,) = [one for one in lints(runs, answers) if one.name == name]
    ids = {entry.run_id for _, entry in runs}
    assert found.runs and len(set(found.runs)) == len(found.runs) and ids >= set(found.runs)
    assert found.text and found.remedy
    return found


def names(runs: list[Run], answers: compare.Answers | None = None) -> list[str]:
    return [one.name for one in lints(runs, answers)]


def ids(runs: list[Run]) -> set[str]:
    return {entry.run_id for _, entry in runs}
