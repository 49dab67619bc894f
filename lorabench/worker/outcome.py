"""How a run has ended: for the command, for sweepers and the screen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lorabench import record
from lorabench.progress import clock
from lorabench.sweep import Job


@dataclass
class Outcome:
    """How one run ended, for the command that asked for it."""

    run_id: str
    label: str
    status: str
    folder: str
    error: str | None = None
    objective: float = math.nan
    has_failed: bool = False  # in what this command asked for, whatever it has from before

    @property
    def is_bad(self) -> bool:
        """Whether the run is not what the command asked for; one that diverged is not."""
        return self.has_failed or self.status != "finished"


def objective(job: Job, found: record.Record | None) -> float:
    """The value that a sweeper of Hydra minimises or maximises; NaN for a failed or stopped run."""
    if found is None or found.status != "finished":
        return math.nan
    scored = found.evaluation(job.plan.evaluation_id)
    split, _, name = job.config.objective.partition("/")
    metric = scored.splits[split].metrics.get(name) if scored else None
    return math.nan if metric is None or metric.value is None else metric.value


def test_scores(metrics: Mapping[str, Mapping[str, record.Metric]]) -> str:
    """Return the scores on test as text.

    Args:
        metrics: split -> name -> value.
    """
    return "".join(
        f"  {name} {'not finite' if metric.value is None else format(metric.value, '.4f')}"
        for name, metric in metrics.get("test", {}).items()
    )


def last_line(entry: record.Record, error: str | None = None) -> str:
    """Say how a run ended."""
    if error is not None or entry.status == "failed":
        kept = "; its adapter is saved" if entry.has_trained() else ""
        return f"failed: {error or entry.error}{kept}"
    size = entry.plan["pack"]["size"]
    packed = f" in a pack of {size}" if size > 1 else ""
    early = f" after {entry.steps_done} steps" if entry.stopped_early else ""
    seconds = clock(entry.cost.total_seconds)
    return f"{entry.status}{early}{test_scores(entry.metrics)}  {seconds}{packed}"
