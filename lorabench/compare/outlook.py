"""What a sweep will be able to tell, before an hour is spent on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lorabench.compare import power, statistics
from lorabench.compare.questions import factors_of, find, questions_of, that_vary
from lorabench.compare.selection import select

if TYPE_CHECKING:
    from lorabench.compare.answers import Answers
    from lorabench.config.schema import CompareConfig

# Standard deviations of the difference of two runs in nll, where no earlier sweep tells them:
# about those of experiment=lm_head on the embedded base, at ranks of one head.
USUAL = {"seeds": 0.02, "examples": 0.2, "rest": 0.2}


@dataclass(frozen=True)
class Spreads:
    """How much the difference of two runs varies.

    Args:
        of: standard deviations over seeds, over examples and of the rest, in the metric's unit.
        source: where they come from, as a phrase.
    """

    metric: str
    of: dict[str, float]
    source: str


def usual() -> Spreads:
    """Return those of no sweep in particular."""
    return Spreads("nll", USUAL, "a guess; --pilot DIR takes them from an earlier sweep")


def of_pilot(answers: Answers, name: str) -> Spreads | None:
    """Return the spreads of an earlier sweep; None: it has no two settings with two seeds.

    The spread over seeds is taken at its upper 80% limit.
    """
    pairs = [one for one in answers.verdicts if len(one.seeds) > 1 and not one.question.averaged]
    if not pairs:
        return None
    of = {
        part: float(np.sqrt(np.mean([one.spreads[part] ** 2 for one in pairs])))
        for part in ("seeds", "examples", "rest")
    }
    seeds = min(len(one.seeds) for one in pairs)
    factor = float(power.upper_factor(seeds))
    return Spreads(
        pairs[0].metric,
        of | {"seeds": of["seeds"] * factor},
        f"{name}; the one over seeds is taken {factor:.2g} times, because {seeds} seeds tell "
        f"little about it",
    )


@dataclass(frozen=True)
class Outlook:
    """What so many seeds and examples will tell.

    Args:
        questions: how many the sweep asks, those on retention among them.
        seeds: that every setting has.
        examples: of the test split.
        smallest: difference between two settings that is found in 80 of 100 such sweeps; None: one
            seed tells none.
    """

    questions: int
    settings: int
    seeds: int
    examples: int
    spreads: Spreads
    smallest: float | None

    @property
    def level(self) -> float:
        return statistics.LEVEL / self.questions

    def needed(self, difference: float) -> tuple[int | None, int | None]:
        """Return the fewest seeds that find a difference, and None: the examples are enough.

        Where they are not, seeds and the examples they need; None, None: no numbers are enough.
        """
        seeds = power.seeds_to_find(difference, self.spreads.of, self.examples, self.level)
        if seeds is not None:
            return seeds, None
        for seeds in (8, 16, 32, power.MOST_SEEDS):
            found = power.examples_to_find(difference, self.spreads.of, seeds, self.level)
            if found is not None:
                return seeds, found
        return None, None


def outlook(
    settings: Sequence[tuple[dict[str, Any], int]],
    asked: CompareConfig,
    examples: int,
    spreads: Spreads,
    num_splits: int = 1,
) -> Outlook | None:
    """Return what a planned sweep will tell; None: it has one setting, and nothing to ask.

    Args:
        settings: setting and seed of every run.
        num_splits: that each question is asked of: test, and retention where there is one.
    """
    seeds_of: dict[str, set[int]] = {}
    distinct: dict[str, dict[str, Any]] = {}
    for setting, seed in settings:
        name = repr(sorted(setting.items()))
        seeds_of.setdefault(name, set()).add(seed)
        distinct[name] = setting
    left = list(distinct.values())
    factors = factors_of(left)
    if asked.select and that_vary(factors, [asked.select], None)[0]:
        left = select(find(asked.select, factors, "compare.select"), factors, left).settings
        factors = factors_of(left)
    questions = questions_of(factors, *that_vary(factors, asked.vary, asked.baseline))
    if not questions or examples < 2:
        return None
    seeds = min(map(len, seeds_of.values()))
    smallest = None
    if seeds > 1:
        level = statistics.LEVEL / (num_splits * len(questions))
        smallest = power.Design(spreads.of, seeds, examples, level).smallest()
    return Outlook(num_splits * len(questions), len(distinct), seeds, examples, spreads, smallest)
