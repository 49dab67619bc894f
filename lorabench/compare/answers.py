"""Runs of a sweep -> the questions they answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorabench.compare import statistics
from lorabench.compare.judging import Verdict, judge
from lorabench.compare.looks import Look, at_looks
from lorabench.compare.questions import Factor, factors_of, find, questions_of
from lorabench.compare.ranks import rank_intervals
from lorabench.compare.scored import CHOOSER, Scored, metric_of, scored
from lorabench.compare.selection import Chosen, Selection
from lorabench.compare.selection import select as choose
from lorabench.compare.sentences import sentence
from lorabench.compare.tables import settings_of
from lorabench.config import HIGHER_IS_BETTER, ConfigErrors
from lorabench.record import Record

if TYPE_CHECKING:
    import pandas


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
    select: str | None = None,
    looks: Sequence[Look] = (),
    planned_looks: int = 0,
) -> Answers:
    """Compare the settings of a sweep on the test split, by seed and by example.

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

    def judged(look: Look | None, places: list[int]) -> list[Verdict]:
        test = found.test if look is None else found.of_seeds(look.seeds)
        flatteries = None
        if selecting is not None:
            selection = selecting.choose(found, test, higher)
            test, flatteries = selection.runs, np.array(selection.flatteries)
            chosen[:] = [one for one in selection.chosen if one is not None]
        level = statistics.LEVEL if look is None else look.level
        asked = [questions[i] for i in places]
        return judge(asked, test, found.metric, higher, margin, level, flatteries)

    every = list(range(len(questions)))
    judgements = at_looks(looks, planned_looks, every, judged) if looks else judged(None, every)
    ranked = rank_intervals(found.test, higher, looks[-1].level if looks else statistics.LEVEL)
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
        found.left_out,
    )  # fmt: skip


class _Selecting:
    """A factor that is chosen on validation."""

    def __init__(self, factor: Factor, factors: list[Factor], settings: list[dict[str, Any]]):
        self.factor, self.factors = factor, factors
        self.left = choose(factor, factors, settings)  # the settings when it is chosen

    @property
    def members(self) -> list[list[int]]:
        return self.left.members

    def choose(self, found: Scored, test: list[Any], higher_is_better: bool) -> Selection:
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
            self.factor, self.factors, found.settings, test, found.validation, higher_is_better
        )
