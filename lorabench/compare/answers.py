"""Runs of a sweep -> the questions they answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorabench.compare.judging import Verdict, judge
from lorabench.compare.questions import Factor, factors_of, questions_of
from lorabench.compare.scores import Reader, Scores
from lorabench.compare.sentences import sentence
from lorabench.compare.tables import HIGHER_IS_BETTER, choose_evaluations, settings_of
from lorabench.config import ConfigErrors
from lorabench.record import Evaluation, Record

if TYPE_CHECKING:
    import pandas

SPLIT = "test"  # that judges
FIRST = ("nll", "exact_match", "accuracy", "answer")  # metrics, in the order they are asked for


@dataclass(frozen=True)
class Answers:
    """What a sweep says on one metric.

    Args:
        metric: that the verdicts are on; None: no run was scored on the test split.
        verdicts: of every question, in order.
        factors: what varies, seeds aside.
        num_runs: that were compared.
        left_out: runs that were not, and what would bring them in, one text a reason.
    """

    metric: str | None
    verdicts: list[Verdict]
    factors: list[Factor]
    num_runs: int
    left_out: list[str]

    def sentences(self) -> list[str]:
        """One sentence a question."""
        return [sentence(one) for one in self.verdicts]

    def rows(self) -> list[dict[str, Any]]:
        """Every number of every verdict, one row a question."""
        found = []
        for one in self.verdicts:
            row = asdict(one)
            question = row.pop("question")
            row |= {
                "factor": question["factor"], "at": question["at"],
                "averaged": list(question["averaged"]), "sentence": sentence(one),
            }  # fmt: skip
            found.append(row)
        return found

    def frame(self) -> pandas.DataFrame:
        """The same as a pandas frame."""
        import pandas

        return pandas.DataFrame(self.rows())


def verdicts(
    runs: Iterable[tuple[Path, Record]],
    metric: str | None = None,
    vary: Sequence[str] = (),
    baseline: dict[str, str] | None = None,
    margin: float | None = None,
) -> Answers:
    """Compare the settings of a sweep on the test split, by seed and by example.

    Args:
        runs: folders and records, such as from `lorabench.record.find`.
        metric: None: the first of nll, exact_match, accuracy and answer that the runs have.
        vary: factors to ask about; none: all.
        baseline: of a factor, the level that all others are compared with.
        margin: a difference that does not matter, in the metric's unit.
    Raises:
        ConfigErrors: no such metric, factor or level.
    """
    finished = [(path, one) for path, one in runs if one.status == "finished"]
    records = [one for _, one in finished]
    chosen = choose_evaluations(records).get(SPLIT)
    evaluations: list[Evaluation | None] = chosen["of_runs"] if chosen else [None] * len(records)
    there = {name for one in evaluations if one is not None for name in one.splits[SPLIT].metrics}
    if metric is not None and metric not in there:
        raise ConfigErrors(
            f"--metric: must be one that the runs were scored with on the {SPLIT} split "
            f"({', '.join(sorted(there)) or 'none'}); got '{metric}'; "
            f"`lorabench evaluate DIR 'data.metric=[{metric}]'` scores saved adapters"
        )
    if metric is None:
        ordered = [name for name in FIRST if name in there] + sorted(there - set(FIRST))
        metric = ordered[0] if ordered else None
    settings = settings_of(records)
    groups: dict[str, list[int]] = {}
    for i, one in enumerate(settings):
        groups.setdefault(repr(sorted(one.items())), []).append(i)
    factors = factors_of([settings[members[0]] for members in groups.values()])
    questions = questions_of(factors, vary, baseline)
    if metric is None:
        return Answers(None, [], factors, 0, [])
    reader, left_out = Reader(SPLIT, metric), _LeftOut()
    by_seed: list[dict[Any, Scores]] = []
    for members in groups.values():
        mine: dict[Any, Scores] = {}
        trained: dict[Any, str] = {}  # ids of the runs in `mine`
        for i in sorted(members, key=lambda i: records[i].ended or ""):
            found = _scores(reader, finished[i][0], evaluations[i])
            if isinstance(found, str):
                left_out.add(found, records[i].run_id)
                continue
            seeds = tuple(sorted(records[i].seeds.items()))
            if seeds in mine:
                left_out.add("there is a newer run of its setting and seeds", trained[seeds])
            mine[seeds], trained[seeds] = found, records[i].run_id
        by_seed.append(mine)
    judged = judge(questions, by_seed, metric, metric in HIGHER_IS_BETTER, margin)
    return Answers(metric, judged, factors, sum(map(len, by_seed)), left_out.lines())


def _scores(reader: Reader, folder: Path, evaluation: Evaluation | None) -> Scores | str:
    """A run's scores, or why there are none, and the command that helps."""
    again = f"`lorabench evaluate {folder.parent}` scores its adapter again"
    if evaluation is None:
        return f"no scores of the {SPLIT} split; {again}"
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
