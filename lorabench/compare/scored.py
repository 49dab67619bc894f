"""Runs of a sweep -> the scores of every setting, by seed, on one metric."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lorabench.compare.scores import Reader, Scores
from lorabench.compare.tables import FIRST, choose_evaluations, setting, settings_of
from lorabench.config import ConfigErrors
from lorabench.config.parts import RETENTION
from lorabench.record import Evaluation, Record

JUDGE, CHOOSER = "test", "validation"  # splits: verdicts are on the one, choices on the other


@dataclass(frozen=True)
class Scored:
    """What a sweep scored on one metric.

    Args:
        settings: every setting that a finished run has.
        members: run ids of each setting.
        test: scores of each setting by seeds; runs that cannot be compared are not among them.
        validation: means of the validation split of each setting by seeds; NaN: none.
        seed_of: the config's `seed` of each key of `test`.
        left_out: runs that are not compared and what would bring them in, one text a reason.
        retention: scores on retention of the same runs as `test`, where they have any.
        retention_metric: the one of `test`, or nll; None: no run was scored on retention.
    """

    metric: str
    settings: list[dict[str, Any]]
    members: list[list[str]]
    test: list[dict[Any, Scores]]
    validation: list[dict[Any, float]]
    seed_of: dict[Any, int]
    left_out: list[str]
    retention: list[dict[Any, Scores]]
    retention_metric: str | None = None

    def of_seeds(self, seeds: Container[int]) -> Scored:
        """The same with test and retention of these seeds alone."""
        test, retention = (
            [{k: v for k, v in one.items() if self.seed_of[k] in seeds} for one in every]
            for every in (self.test, self.retention)
        )
        return replace(self, test=test, retention=retention)


def metric_of(records: Sequence[Record], wanted: str | None = None) -> str | None:
    """The metric that verdicts are on; None: no run was scored on the test split.

    Raises:
        ConfigErrors: the runs do not have the one that is wanted.
    """
    chosen = choose_evaluations(records).get(JUDGE)
    found = [one for one in chosen["of_runs"] if one is not None] if chosen else []
    there = {name for one in found for name in one.splits[JUDGE].metrics}
    if wanted is not None and wanted not in there:
        raise ConfigErrors(
            f"--metric: must be one that the runs were scored with on the {JUDGE} split "
            f"({', '.join(sorted(there)) or 'none'}); got '{wanted}'; "
            f"`lorabench evaluate DIR 'data.metric=[{wanted}]'` scores saved adapters"
        )
    ordered = [name for name in FIRST if name in there] + sorted(there - set(FIRST))
    return wanted or (ordered[0] if ordered else None)


def scored(
    finished: Sequence[tuple[Path, Record]], metric: str, diverged: Sequence[Record] = ()
) -> Scored:
    """Read the predictions of all finished runs.

    Args:
        diverged: runs that were stopped: their validation is NaN.
    """
    records = [one for _, one in finished]
    evaluations = choose_evaluations(records)
    judges: list[Evaluation | None] = evaluations[JUDGE]["of_runs"]
    choosers = evaluations.get(CHOOSER, {}).get("of_runs", [None] * len(records))
    settings = settings_of(records)
    groups: dict[str, list[int]] = {}
    for i, one in enumerate(settings):
        groups.setdefault(repr(sorted(one.items())), []).append(i)
    reader, left_out = Reader(JUDGE, metric), _LeftOut()
    keepers = evaluations.get(RETENTION, {}).get("of_runs", [None] * len(records))
    kept_metric = _retention_metric(keepers, metric)
    kept_reader = Reader(RETENTION, kept_metric or metric)
    retention: list[dict[Any, Scores]] = []
    seed_of: dict[Any, int] = {}
    test: list[dict[Any, Scores]] = []
    validation: list[dict[Any, float]] = []
    for members in groups.values():
        mine: dict[Any, Scores] = {}
        means: dict[Any, float] = {}
        trained: dict[Any, str] = {}  # ids of the runs in `mine`
        kept: dict[Any, Scores] = {}
        for i in sorted(members, key=lambda i: records[i].ended or ""):
            found = _scores(reader, finished[i][0], judges[i])
            if isinstance(found, str):
                left_out.add(found, records[i].run_id)
                continue
            seeds = tuple(sorted(records[i].seeds.items()))
            if seeds in mine:
                left_out.add("there is a newer run of its setting and seeds", trained[seeds])
            mine[seeds], trained[seeds] = found, records[i].run_id
            kept.pop(seeds, None)
            if keepers[i] is not None:
                again = _scores(kept_reader, finished[i][0], keepers[i])
                if isinstance(again, str):
                    left_out.add(f"on {RETENTION}: {again}", records[i].run_id)
                else:
                    kept[seeds] = again
            means[seeds] = _mean(choosers[i], metric)
            seed_of[seeds] = records[i].config["seed"]
        of_setting = _words(settings[members[0]])
        for stopped in diverged:
            if _words(setting(stopped.config)) == of_setting:
                means.setdefault(tuple(sorted(stopped.seeds.items())), np.nan)
        test.append(mine)
        retention.append(kept)
        validation.append(means)
    return Scored(
        metric,
        [settings[members[0]] for members in groups.values()],
        [[records[i].run_id for i in members] for members in groups.values()],
        test, validation, seed_of, left_out.lines(), retention, kept_metric,
    )  # fmt: skip


def _retention_metric(evaluations: Sequence[Evaluation | None], metric: str) -> str | None:
    """The metric to compare retention by: that of test where all runs have it, else nll."""
    found = [set(one.splits[RETENTION].metrics) for one in evaluations if one is not None]
    if not found:
        return None
    there = set.intersection(*found)
    return next((name for name in (metric, "nll", *sorted(there)) if name in there), None)


def _words(setting: dict[str, Any]) -> str:
    """A setting without the hashes that only finished runs have."""
    return repr(sorted((k, v) for k, v in setting.items() if not k.endswith("_hash")))


def _mean(evaluation: Evaluation | None, metric: str) -> float:
    found = evaluation and evaluation.splits[CHOOSER].metrics.get(metric)
    return np.nan if not found or found.value is None else found.value


def _scores(reader: Reader, folder: Path, evaluation: Evaluation | None) -> Scores | str:
    """A run's scores, or why there are none, and the command that helps."""
    again = f"`lorabench evaluate {folder.parent}` scores its adapter again"
    if evaluation is None:
        return f"no scores of the {JUDGE} split; {again}"
    found = reader.read(folder, evaluation)
    if isinstance(found, str):
        return f"{found}; {again}"
    if not np.isfinite(found.values).any():
        return f"no finite {reader.metric}; `lorabench runs {folder.parent}` shows its status"
    return found


class _LeftOut:
    """Runs that are not compared, by reason."""

    def __init__(self) -> None:
        self._runs: dict[str, list[str]] = {}

    def add(self, reason: str, run_id: str) -> None:
        self._runs.setdefault(reason, []).append(run_id)

    def lines(self) -> list[str]:
        return [f"{reason}: {', '.join(ids)}" for reason, ids in self._runs.items()]
