"""Scores of untrained bases as rows beside those of the settings trained on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorabench.base_scores import base_evaluations
from lorabench.record import Record


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
