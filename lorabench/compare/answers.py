"""Runs of a sweep -> the questions they answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorabench.compare import statistics
from lorabench.compare.judging import Side, Verdict, judge_all
from lorabench.compare.looks import Look, at_looks
from lorabench.compare.questions import Factor, factors_of, find, questions_of
from lorabench.compare.ranks import rank_intervals
from lorabench.compare.scored import CHOOSER, JUDGE, Scored, metric_of, scored
from lorabench.compare.selection import Chosen, Selection
from lorabench.compare.selection import select as choose
from lorabench.compare.sentences import sentence
from lorabench.compare.tables import settings_of
from lorabench.config import HIGHER_IS_BETTER, ConfigErrors
from lorabench.config.parts import RETENTION
from lorabench.record import Record

if TYPE_CHECKING:
    import pandas


# Of a verdict on retention, what the verdict on test beside it says.
SAID_ONCE = ("question", "split", "retention")


@dataclass(frozen=True)
class Answers:
    """What a sweep says on one metric.

    Args:
        metric: that the verdicts are on; None: no run was scored on the test split.
        verdicts: of every question, in order.
        factors: what varies, seeds aside, and was not chosen on validation.
        chosen: values of `select`, by the levels of the other factors.
        runs: of each setting of the questions, one run of each setting it was chosen from.
        ranks: best and worst rank that a run's setting may have, by run id.
        num_runs: that were compared.
        num_read: finished runs, those that were left out among them.
        left_out: runs that were not, and what would bring them in, one text a reason.
        retention_metric: what retention is compared by; None: no run was scored on it.
    """

    metric: str | None
    verdicts: list[Verdict] = field(default_factory=list)
    factors: list[Factor] = field(default_factory=list)
    chosen: list[Chosen] = field(default_factory=list)
    runs: list[list[str]] = field(default_factory=list)
    ranks: dict[str, tuple[int, int]] = field(default_factory=dict)
    num_runs: int = 0
    num_read: int = 0
    left_out: list[str] = field(default_factory=list)
    retention_metric: str | None = None

    def sentences(self) -> list[str]:
        """One sentence a question."""
        return [sentence(one) for one in self.verdicts]

    def rows(self) -> list[dict[str, Any]]:
        """Every number of every verdict, one row a question."""
        found = []
        for one in self.verdicts:
            row = asdict(one)
            question = row.pop("question")
            for key in ("split", "retention"):  # rows are of test
                row.pop(key)
            if one.retention is not None:
                kept = asdict(one.retention)
                row["retention"] = {k: v for k, v in kept.items() if k not in SAID_ONCE}
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
    select: str | None = None,
    looks: Sequence[Look] = (),
    planned_looks: int = 0,
) -> Answers:
    """Compare the settings of a sweep on the test split, by seed and by example.

    Where runs were scored on retention too, each question is asked of it as well; the level of the
    command covers both.

    Args:
        runs: folders and records, such as from `lorabench.record.find`.
        metric: None: the first of nll, exact_match, accuracy, answer and gym that the runs have.
        vary: factors to ask about; none: all.
        baseline: of a factor, the level that all others are compared with.
        margin: a difference that does not matter, in the metric's unit.
        select: a factor whose value is chosen on validation instead of compared, such as
            trainer.lr.
        looks: those that were taken of a sweep that was given seeds until it was settled.
        planned_looks: how many there are in all.
    Raises:
        ConfigErrors: no such metric, factor or level; nothing to select by.
    """
    runs = list(runs)
    finished = [(path, one) for path, one in runs if one.status == "finished"]
    records = [one for _, one in finished]
    metric = metric_of(records, metric)
    found = (
        None
        if metric is None
        else scored(finished, metric, [one for _, one in runs if one.status == "stopped"])
    )
    settings = found.settings if found else settings_of(records)
    factors = factors_of(settings)
    selecting = None
    if select is not None:
        selecting = _Selecting(find(select, factors, "--select"), factors, settings)
        settings = selecting.left.settings
        factors = factors_of(settings)
    questions = questions_of(factors, vary, baseline)
    if found is None:
        return Answers(None, factors=factors)
    higher = found.metric in HIGHER_IS_BETTER
    chosen: list[Chosen] = []

    kept_metric = found.retention_metric

    def judged(look: Look | None, places: list[int]) -> list[Verdict]:
        """Answer questions: those below len(questions) on test, the same again on retention."""
        scores = found if look is None else found.of_seeds(look.seeds)
        sides = [Side(JUDGE, found.metric, scores.test, higher, margin)]
        if kept_metric is not None:
            more = kept_metric in HIGHER_IS_BETTER
            same_unit = margin if kept_metric == found.metric else None
            sides.append(Side(RETENTION, kept_metric, scores.retention, more, same_unit))
        if selecting is not None:
            selection = selecting.choose(scores, higher)
            chosen[:] = [one for one in selection.chosen if one is not None]
            sides = [
                replace(side, runs=runs, flatteries=np.array(owed))
                for side, runs, owed in zip(
                    sides,
                    (selection.runs, selection.retention),
                    (selection.flatteries, selection.retention_flatteries),
                    strict=False,
                )
            ]
        level = statistics.LEVEL if look is None else look.level
        asked = [(question, side) for side in sides for question in questions]
        return judge_all([asked[i] for i in places], level)

    count = len(questions)
    every = list(range(count if kept_metric is None else 2 * count))
    answered = at_looks(looks, planned_looks, every, judged) if looks else judged(None, every)
    judgements = answered[:count]
    if kept_metric is not None:
        pairs = zip(judgements, answered[count:], strict=True)
        judgements = [test.beside(kept) for test, kept in pairs]
    # Retention has half of a command's level; without it ranks say more than the verdicts do.
    level = (looks[-1].level if looks else statistics.LEVEL) / (1 if kept_metric is None else 2)
    ranked = rank_intervals(found.test, higher, level)
    ranks = {
        run: rank
        for ids, rank in zip(found.members, ranked, strict=True)
        if rank is not None
        for run in ids
    }
    members = [[i] for i in range(len(settings))] if selecting is None else selecting.members
    runs_of = [[found.members[i][0] for i in mine] for mine in members]
    num_runs = sum(map(len, found.test))
    return Answers(
        found.metric, judgements, factors, chosen, runs_of, ranks, num_runs, len(finished),
        found.left_out, kept_metric,
    )  # fmt: skip


class _Selecting:
    """A factor that is chosen on validation."""

    def __init__(self, factor: Factor, factors: list[Factor], settings: list[dict[str, Any]]):
        self.factor, self.factors = factor, factors
        self.left = choose(factor, factors, settings)  # the settings when it is chosen

    @property
    def members(self) -> list[list[int]]:
        return self.left.members

    def choose(self, found: Scored, higher_is_better: bool) -> Selection:
        """Choose it by the validation scores of these runs.

        Raises:
            ConfigErrors: there are none.
        """
        values = [one for by_seed in found.validation for one in by_seed.values()]
        if not np.isfinite(values).any():
            raise ConfigErrors(
                f"--select: must have {found.metric} of the {CHOOSER} split to choose by; the runs "
                f"have none; `lorabench evaluate DIR` scores it, or choose another --metric"
            )
        return choose(
            self.factor, self.factors, found.settings, found.test, found.validation,
            higher_is_better, found.retention, found.retention_metric in HIGHER_IS_BETTER,
        )  # fmt: skip
