"""questions and scores -> verdicts: what was found, what is not settled, what is no worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lorabench.compare import power, statistics
from lorabench.compare.questions import Question
from lorabench.compare.scores import Scores, aligned

WORTHWHILE = 0.9  # of the smallest difference now: what twice the seeds must find to be worth it
Outcome = Literal["found", "no worse", "not settled", "no verdict", "trade-off"]


@dataclass(frozen=True)
class Side:
    """What one split scored.

    Args:
        split: test, or retention.
        runs: scores of every setting, by seed.
        margin: a difference that does not matter, in the metric's unit.
        flatteries: of every setting, what it may owe to a choice on the same seeds.
    """

    split: str
    metric: str
    runs: Sequence[Mapping[Any, Scores]]
    higher_is_better: bool
    margin: float | None = None
    flatteries: NDArray[np.float64] | None = None


@dataclass
class Verdict:
    """The answer to one question on one metric.

    Differences are gains of `better` over `worse` in the metric's unit: positive where `better` has
    the better mean.
    """

    question: Question
    metric: str
    better: str  # level of the factor with the better mean
    worse: str
    outcome: Outcome
    seeds: list[Any] = field(default_factory=list)  # that both have
    examples: int = 0
    gain: float = float("nan")
    low: float = float("nan")  # interval at `level`: without zero exactly where `found`
    high: float = float("nan")
    plain_low: float = float("nan")  # the 95% interval of this question alone
    plain_high: float = float("nan")
    p: float = float("nan")
    p_adjusted: float = float("nan")
    level: float = float("nan")  # of false verdicts, of this question's step
    spreads: dict[str, float] = field(default_factory=dict)  # sd over seeds, examples, the rest
    smallest: float = float("inf")  # difference that this many seeds and examples find, 80% power
    more_seeds: int | None = None  # that would settle `settles`; None: no number up to 64 would
    settles: float | None = None
    hopeless: bool = False  # even 64 seeds would not find the largest difference in the interval
    more_examples: int | None = None  # in all, that would find the difference seen, if seeds do not
    no_worse: list[str] = field(default_factory=list)  # levels no worse than the other by `margin`
    margin: float | None = None
    flattery: float = 0.0  # what `better` may owe to a choice on the same seeds; in low and high
    look: int | None = None  # of planned looks: the one that the verdict is of
    looks: int | None = None  # how many are planned
    why: str = ""  # of `no verdict`
    split: str = "test"
    retention: Verdict | None = None  # the same question about retention; None: it was not asked

    @property
    def is_identical(self) -> bool:
        """Whether both levels scored the same in every seed and on every example."""
        return self.gain == 0 and bool(self.spreads) and not any(self.spreads.values())

    @property
    def is_settled(self) -> bool:
        """Whether it has an answer."""
        return self.outcome in ("found", "no worse", "trade-off")

    @property
    def is_open(self) -> bool:
        """Whether more seeds might still tell something, retention included."""
        kept = self.retention
        return not (self.is_settled or self.hopeless) or (
            kept is not None and kept.outcome != "no verdict" and kept.is_open
        )

    def beside(self, retention: Verdict) -> Verdict:
        """Return this verdict with that on retention.

        The outcome is a trade-off where one level is found better and the other is found to keep
        more of what the base could do.
        """
        both = self.outcome == retention.outcome == "found"
        trades = both and self.better != retention.better
        return replace(self, retention=retention, outcome="trade-off" if trades else self.outcome)


def differences(
    question: Question,
    runs: Sequence[Mapping[Any, Scores]],
    higher_is_better: bool,
    split: str = "test",
) -> tuple[list[Any], NDArray[np.float64]] | str:
    """Gains of a question's first level over its second, (S, N), by the seeds all settings share.

    Args:
        runs: scores of every setting, by seed.
    Returns:
        Seeds and gains; or why there are none.
    """
    settings = [runs[i] for pair in question.pairs for i in pair]
    if split != "test" and not all(settings):
        return f"a setting has no {split} scores; `lorabench evaluate DIR` scores saved adapters"
    if not all(settings):
        return "a setting has no scores to compare; `lorabench runs DIR` shows how far its runs are"
    seeds = [seed for seed in settings[0] if all(seed in one for one in settings)]
    if not seeds:
        return "the settings share no seed; train both with the same values of seed"
    if len(seeds) == 1 and min(map(len, settings)) > 1:
        return "the settings share one seed alone; train both with the same values of seed"
    table = aligned([one[seed] for one in settings for seed in seeds])
    if table.shape[1] < 2:
        return (
            f"the settings share fewer than 2 {split} examples; `lorabench evaluate DIR "
            f"data.{split}.path=FILE` scores all on the same"
        )
    by_setting = table.reshape(len(question.pairs), 2, len(seeds), -1)
    gain = (by_setting[:, 0] - by_setting[:, 1]).mean(0)
    return seeds, gain if higher_is_better else -gain


def judge(
    questions: Sequence[Question],
    runs: Sequence[Mapping[Any, Scores]],
    metric: str,
    higher_is_better: bool,
    margin: float | None = None,
    level: float = statistics.LEVEL,
    flatteries: NDArray[np.float64] | None = None,
) -> list[Verdict]:
    """Answer all questions of a command on one metric of test: `judge_all` with one side."""
    side = Side("test", metric, runs, higher_is_better, margin, flatteries)
    return judge_all([(question, side) for question in questions], level)


def judge_all(
    asked: Sequence[tuple[Question, Side]], level: float = statistics.LEVEL
) -> list[Verdict]:
    """Answer all questions of a command, those on retention among them.

    Args:
        asked: each question and the split that answers it.
        level: share of commands that may err in any of their questions, on whichever split.
    """
    found = [differences(one, side.runs, side.higher_is_better, side.split) for one, side in asked]
    tables = {
        i: statistics.components(one[1])
        for i, one in enumerate(found)
        if not isinstance(one, str) and len(one[0]) > 1
    }
    decided: dict[int, tuple[int, statistics.Decisions]] = {}
    if tables:
        flattery = np.array([_flattery(asked[i][0], asked[i][1].flatteries) for i in tables])
        stacked = statistics.Components.stacked([*tables.values()])
        # Higher is better of scores in [0, 1] alone: exact_match, accuracy, answer, gym.
        is_share = np.array([asked[i][1].higher_is_better for i in tables])
        with_margin = any(side.margin is not None for _, side in asked)
        decisions = statistics.decide(stacked, level, flattery, is_share, with_margin)
        decided = {i: (place, decisions) for place, i in enumerate(tables)}
    first_level = level / max(1, len(tables))
    verdicts = []
    for i, ((question, side), one) in enumerate(zip(asked, found, strict=True)):
        metric = side.metric
        if isinstance(one, str):
            verdict = Verdict(question, metric, *question.levels, "no verdict", why=one)
        elif i not in decided:
            verdict = _of_one_seed(question, metric, *one)
        else:
            verdict = _decided(question, metric, one[0], tables[i], *decided[i], side.margin)
            verdict.flattery = _flattery(question, side.flatteries)
            if verdict.better != question.levels[0]:
                verdict.flattery = -verdict.flattery
            _reckon(verdict, tables[i], first_level)
        verdict.split = side.split
        verdicts.append(verdict)
    return verdicts


def _flattery(question: Question, flatteries: NDArray[np.float64] | None) -> float:
    """By how much the gain of a question's first level may be too high."""
    if flatteries is None:
        return 0.0
    return float(np.mean([flatteries[a] - flatteries[b] for a, b in question.pairs]))


def _of_one_seed(
    question: Question, metric: str, seeds: list[Any], gains: NDArray[np.float64]
) -> Verdict:
    """What the examples alone say, under that name."""
    gain = float(gains.mean())
    better, worse = question.levels if gain >= 0 else question.levels[::-1]
    count = gains.shape[1]
    half = float(
        statistics.t_quantile(count - 1, statistics.LEVEL) * gains.std(ddof=1) / np.sqrt(count)
    )
    size = abs(gain)
    return Verdict(
        question, metric, better, worse, "no verdict", seeds, count, size,
        plain_low=size - half, plain_high=size + half,
        why="one seed: how much seeds matter is unknown; the interval is over examples alone",
    )  # fmt: skip


def _decided(
    question: Question,
    metric: str,
    seeds: list[Any],
    table: statistics.Components,
    place: int,
    decisions: statistics.Decisions,
    margin: float | None,
) -> Verdict:
    """The answer, seen from the level with the better mean."""
    gain, p, adjusted, level = (
        float(getattr(decisions, name)[place]) for name in ("mean", "p", "adjusted", "level")
    )
    ends = np.array([(decisions.low[place], decisions.high[place]),
                     (decisions.alone[0][place], decisions.alone[1][place])])  # fmt: skip
    better, worse = question.levels if gain >= 0 else question.levels[::-1]
    (low, high), (plain_low, plain_high) = (ends if gain >= 0 else -ends[:, ::-1]).tolist()
    verdict = Verdict(
        question, metric, better, worse, "found" if decisions.found[place] else "not settled",
        seeds, int(table.num_examples), abs(gain), low, high, plain_low, plain_high,
        p, adjusted, level,
        {name: float(value) for name, value in table.spreads.items()}, margin=margin,
    )  # fmt: skip
    if margin is not None:
        pairs = zip(question.levels, decisions.no_worse(margin), strict=True)
        verdict.no_worse = [name for name, those in pairs if those[place]]
        if verdict.outcome != "found" and verdict.no_worse:
            verdict.outcome = "no worse"
    return verdict


def _reckon(verdict: Verdict, table: statistics.Components, level: float) -> None:
    """What this many seeds and examples could have found, and how many seeds would settle it.

    From few seeds their own spread is uncertain: its upper 80% limit counts.
    """
    careful = {name: float(value) for name, value in power.upper_spreads(table).items()}
    design = power.Design(careful, table.num_seeds, table.num_examples, level)
    verdict.smallest = design.smallest() + abs(verdict.flattery)
    if verdict.outcome == "not settled":
        _settle(verdict, careful, table, level)


def _settle(
    verdict: Verdict, spreads: dict[str, float], table: statistics.Components, level: float
) -> None:
    """How many more seeds would find what is left of the difference, or what twice as many find."""
    have, examples, owed = table.num_seeds, table.num_examples, abs(verdict.flattery)
    if verdict.is_identical:
        verdict.hopeless = True
        return
    gain = max(0.0, verdict.gain - max(0.0, verdict.flattery))
    most = min(power.MOST_SEEDS, 4 * have + 8)
    needed = power.seeds_to_find(gain, spreads, examples, level, most) if gain > 0 else None
    if needed is not None and needed > have:
        verdict.more_seeds, verdict.settles = needed - have, gain
        return
    twice = power.Design(spreads, 2 * have, examples, level).smallest()
    if twice < WORTHWHILE * (verdict.smallest - owed):
        verdict.more_seeds, verdict.settles = have, twice
        return
    far = power.Design(spreads, power.MOST_SEEDS, examples, level).smallest()
    room = verdict.high if verdict.margin is None else max(verdict.high, verdict.margin)
    verdict.hopeless = far > room
    if gain > 0:
        found = power.examples_to_find(gain, spreads, max(have, 8), level)
        verdict.more_examples = found if found is not None and found > examples else None
