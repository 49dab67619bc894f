"""Folders of finished runs with scores made by hand: what `compare` reads, without any training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from lorabench.record import Cost, Evaluation, Metric, Record, Scores

EVALUATION = "0123456789ab"
Setting = tuple[str, int]  # head policy, r


def write_run(
    folder: Path,
    head: str,
    r: int,
    seed: int,
    values: Mapping[str, np.ndarray],
    examples: list[str] | None = None,
    config: Mapping[str, Any] | None = None,
    name: str | None = None,
    ended: str = "2026-11-25T12:00:00Z",
    validation: Mapping[str, float | None] | None = None,
    retention: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a finished run with these scores of its test examples, by metric; return its folder.

    Args:
        validation: means of the validation split, by metric.
        retention: scores of retention, by metric; the examples are other ones.
    """
    run = folder / (name or f"{head}-{r}-{seed}")
    (run / "evaluations").mkdir(parents=True)
    count = len(next(iter(values.values())))
    examples = examples or [f"e{i}" for i in range(count)]
    columns = {"split": ["test"] * count, "example": examples, **values}
    place = run / "evaluations" / f"{EVALUATION}.parquet"
    table = pa.table(columns)
    if retention is not None:
        num = len(next(iter(retention.values())))
        kept = {"split": ["retention"] * num, "example": [f"k{i}" for i in range(num)]}
        table = pa.concat_tables(
            [table, pa.table(kept | dict(retention))], promote_options="default"
        )
    parquet.write_table(table, place)
    metrics = {
        name: Metric(value=float(np.mean(v)), num_examples=count, definition=f"{name}/1")
        for name, v in values.items()
    }
    splits = {"test": Scores(examples="the examples", tokens="", metrics=metrics)}
    if validation is not None:
        means = {
            name: Metric(value=value, num_examples=count, definition=f"{name}/1")
            for name, value in validation.items()
        }
        splits["validation"] = Scores(examples="others", tokens="", metrics=means)
    if retention is not None:
        kept_means = {
            name: Metric(value=float(np.mean(v)), num_examples=len(v), definition=f"{name}/1")
            for name, v in retention.items()
        }
        splits["retention"] = Scores(examples="kept", tokens="", metrics=kept_means)
    evaluation = Evaluation(
        id=EVALUATION,
        settings={},
        splits=splits,
        predictions=f"evaluations/{EVALUATION}.parquet",
        predictions_sha256=hashlib.sha256(place.read_bytes()).hexdigest(),
        batch_size=32,
        ended="2026-11-25T12:00:00Z",
    )
    streams = {"init": seed, "data": seed, "dropout": seed}
    Record(
        run_id=run.name,
        sweep=folder.name,
        status="finished",
        config={
            "head": {"policy": head},
            "lora": {"r": r},
            "seed": seed,
            "seeds": streams,
            "trainer": {"steps": 4, "lr": 1e-3},
            **(config or {}),
        },
        seeds=streams,
        plan={"trainable_parameters": 1000 * r, "pack": {"id": "p", "size": 1}},
        provenance={},
        evaluations=[evaluation],
        cost=Cost(train_seconds=1.0, total_seconds=2.0, tokens_per_second=3.0),
        steps_done=4,
        ended=ended,
    ).write(run)
    return run


def write_sweep(
    folder: Path,
    means: Mapping[Setting, float],
    seeds: int,
    examples: int = 60,
    spreads: tuple[float, float, float] = (0.02, 0.1, 0.1),
    draw: int = 0,
    metric: str = "nll",
) -> dict[tuple[str, int, int], np.ndarray]:
    """Write a sweep of normal scores; return those of each run, by head, r and seed.

    Args:
        spreads: standard deviations of one run's scores over seeds, over examples and of the rest.
    """
    rng = np.random.default_rng(draw)
    shared = rng.normal(size=examples)  # hard examples are hard for all
    found = {}
    for (head, r), mean in means.items():
        of_examples = spreads[1] * rng.normal(size=examples)
        for seed in range(seeds):
            noise = spreads[0] * rng.normal() + spreads[2] * rng.normal(size=examples)
            values = mean + shared + of_examples + noise
            found[head, r, seed] = values
            write_run(folder, head, r, seed, {metric: values})
    return found
