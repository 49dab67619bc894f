"""metrics.jsonl -> one curve per setting and metric: mean and spread over its seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

POINTS = 150  # of a curve; with more steps a point is the mean of several
NOT_CURVES = ("step", "seconds", "train/tokens_per_second", "train/lr", "train/grad_norm")
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Curve:
    """One metric of one setting while it trained.

    Args:
        setting: index of its row in the table of settings.
        steps: optimizer steps done, (P,).
        mean: over seeds, (P,).
        low, high: one sample standard deviation below and above, (P,); None: one seed.
        seeds: how many runs it is of.
        steps_a_point: how many steps a point is the mean of.
    """

    setting: int
    metric: str
    steps: Array
    mean: Array
    low: Array | None
    high: Array | None
    seeds: int
    steps_a_point: int


def rows_of(folder: Path) -> Iterator[dict[str, float]]:
    """Read the rows of metrics.jsonl that are whole; a killed process leaves half of one."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in lines.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def curves_of(groups: Sequence[Sequence[Path]]) -> list[Curve]:
    """Return the curves of every setting.

    Args:
        groups: of each setting, the folders of its runs.
    """
    found = []
    for place, folders in enumerate(groups):
        runs = [_by_metric(rows_of(folder)) for folder in folders]
        for metric in sorted({name for run in runs for name in run}):
            curve = _curve(place, metric, [run[metric] for run in runs if metric in run])
            if curve is not None:
                found.append(curve)
    return found


def last_step(folder: Path) -> int | None:
    """The last step that a run has logged."""
    return max((row["step"] for row in rows_of(folder)), default=None)  # type: ignore[type-var,return-value]


def _by_metric(rows: Iterable[dict[str, float]]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name not in NOT_CURVES and is_number and math.isfinite(value):
                found.setdefault(name, {})[int(row["step"])] = float(value)
    return found


def _curve(setting: int, metric: str, runs: list[dict[int, float]]) -> Curve | None:
    steps = np.array(sorted(set().union(*runs)))
    if not len(steps):
        return None
    values = np.array([[run.get(int(step), np.nan) for step in steps] for run in runs])
    per = -(-len(steps) // POINTS)
    if per > 1:
        cuts = range(0, len(steps), per)
        values = np.stack([mean_of(values[:, i : i + per], 1) for i in cuts], 1)
        steps = np.array([steps[i : i + per].mean() for i in cuts])
    mean, low, high = mean_of(values, 0), None, None
    if len(runs) > 1:
        count = np.isfinite(values).sum(0)
        squares = np.nansum((values - mean) ** 2, 0)
        # One seed alone has no spread.
        variance = np.divide(squares, count - 1, out=np.full(len(count), np.nan), where=count > 1)
        deviation = np.sqrt(variance)
        low, high = (mean - deviation).astype(np.float32), (mean + deviation).astype(np.float32)
    x, y = steps.astype(np.float32), mean.astype(np.float32)
    return Curve(setting, metric, x, y, low, high, len(runs), per)


def mean_of(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """The mean of what is finite; NaN where nothing is."""
    count = np.isfinite(values).sum(axis)
    total = np.nansum(values, axis)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
