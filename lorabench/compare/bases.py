"""Scores of untrained bases as rows beside those of the settings trained on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorabench.base_scores import base_evaluations
from lorabench.compare.tables import spread
from lorabench.config import HIGHER_IS_BETTER
from lorabench.config.parts import RETENTION
from lorabench.record import Record

CHANGES = ("gain", "forgetting")  # of a row, where retention was scored


def bases(
    sweeps: Iterable[Path], records: Sequence[Record], evaluations: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the untrained bases of finished runs, scored as the runs were.

    Args:
        evaluations: by split, those that the table shows: `evaluations` of `compare.table`.
    Returns:
        Per base: name, metrics {split: {name: value}}, runs (ids).
    """
    shown = {id for one in evaluations.values() for id in one["ids"]}
    finished = [one for one in records if one.status == "finished"]
    found: dict[str, dict[str, Any]] = {}
    for sweep in sweeps:
        for entry in base_evaluations(sweep):
            runs = [one.run_id for one in finished if entry.is_of(one)]
            if entry.evaluation.id not in shown or not runs:
                continue
            splits = entry.evaluation.splits
            found.setdefault(
                entry.id,
                {
                    "name": entry.model,
                    "metrics": {
                        split: {name: metric.value for name, metric in scores.metrics.items()}
                        for split, scores in splits.items()
                    },
                    "runs": runs,
                },
            )
    return list(found.values())


def add_changes(
    table: dict[str, Any], bases: Sequence[dict[str, Any]], metric: str, retention_metric: str
) -> None:
    """Add to each row of a table what its runs changed of their untrained base.

    Both are spreads with their metric: `gain`, how much better than the base on test, and
    `forgetting`, how much worse on retention. A row whose base or retention was not scored has
    none.

    Args:
        table: `compare.table`.
        bases: `bases` of the same runs.
    """
    metrics = {one["run_id"]: one["metrics"] for one in table["runs"]}
    for row in table["rows"]:
        found: dict[str, Any] = {}
        for name, (split, asked, sign) in {
            "gain": ("test", metric, 1),
            "forgetting": (RETENTION, retention_metric, -1),
        }.items():
            better = sign if asked in HIGHER_IS_BETTER else -sign
            changed = [
                better * (after - before)
                for run in row["runs"]
                if (after := metrics[run].get(split, {}).get(asked)) is not None
                and (before := _of_base(bases, run, split, asked)) is not None
            ]
            if changed:
                found[name] = spread(changed) | {"metric": asked}
        if "forgetting" in found:
            row |= found


def _of_base(bases: Sequence[dict[str, Any]], run: str, split: str, metric: str) -> float | None:
    """The score of a run's untrained base."""
    for base in bases:
        if run in base["runs"]:
            value: float | None = base["metrics"].get(split, {}).get(metric)
            if value is not None:
                return value
    return None
