"""What S paired seeds and N paired test examples can tell about a difference.

Both are random: the difference d[s, i] of seed s and example i is the true difference plus what the
seed, the example and chance add. Sources: the crossed two-way table without replication (Searle,
Casella and McCulloch 1992, chapter 4); Satterthwaite 1946 for the degrees of freedom; Holm 1979
for many questions. Imports neither torch nor scipy.stats, which takes a second.

Letters: S seeds, N examples, `...` any dimensions before them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]
LEVEL = 0.05  # false verdicts of a whole command, at most


@dataclass(frozen=True)
class Components:
    """Mean squares of a table of differences, (...) each.

    Args:
        seeds: N times the spread of the seeds' means; for one seed NaN.
        examples: S times the spread of the examples' means.
        rest: what neither explains.
    """

    mean: Array
    seeds: Array
    examples: Array
    rest: Array
    num_seeds: Any  # whole numbers, or an array of them
    num_examples: Any

    @classmethod
    def stacked(cls, tables: Sequence[Components]) -> Components:
        """Tables of several questions as one, (Q,) each."""
        names = [one.name for one in fields(cls)]
        return cls(*(np.array([getattr(one, name) for one in tables]) for name in names))

    @property
    def spreads(self) -> dict[str, Array]:
        """Standard deviations over seeds, over examples and of the rest, never below zero."""
        over_seeds = (self.seeds - self.rest) / self.num_examples
        over_examples = (self.examples - self.rest) / self.num_seeds
        return {
            "seeds": np.sqrt(np.maximum(over_seeds, 0)),
            "examples": np.sqrt(np.maximum(over_examples, 0)),
            "rest": np.sqrt(self.rest),
        }


def components(differences: Array) -> Components:
    """Split a table of differences, (..., S, N), into its mean squares.

    Raises:
        ValueError: fewer than two examples.
    """
    seeds, examples = differences.shape[-2:]
    if examples < 2:
        raise ValueError(f"a comparison needs at least 2 examples; got {examples}")
    mean = differences.mean((-2, -1))
    centred = differences - mean[..., None, None]
    of_seeds, of_examples = centred.mean(-1), centred.mean(-2)
    total = np.einsum("...sn,...sn->...", centred, centred)
    between_seeds = examples * np.square(of_seeds).sum(-1)
    between_examples = seeds * np.square(of_examples).sum(-1)
    # What is left of a difference of equal sums is rounding.
    left = total - between_seeds - between_examples
    left = np.where(left > 1e-12 * total, left, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Components(
            mean,
            between_seeds / np.float64(seeds - 1),
            between_examples / (examples - 1),
            left / np.float64((seeds - 1) * (examples - 1)),
            seeds,
            examples,
        )


def components_of_pairs(scores: Array) -> Components:
    """Mean squares of the differences of all tables two by two, from (K, S, N).

    The same as `components` of scores[a] - scores[b] for a < b, in the order of
    `np.triu_indices(K, 1)`, without a table of each pair.
    """
    tables, seeds, examples = scores.shape
    first, second = np.triu_indices(tables, 1)
    mean = scores.mean((1, 2))
    of_seeds = scores.mean(2) - mean[:, None]
    of_examples = scores.mean(1) - mean[:, None]
    rest = scores - mean[:, None, None] - of_seeds[:, :, None] - of_examples[:, None, :]
    rest = rest.reshape(tables, -1)

    def apart(rows: Array) -> Array:
        """Squared distances of all rows two by two, where rounding leaves any."""
        products = rows @ rows.T
        own = np.diag(products)
        sums = own[first] + own[second]
        found = sums - 2 * products[first, second]
        return np.where(found > 1e-12 * sums, found, 0.0)

    return Components(
        mean[first] - mean[second],
        examples * apart(of_seeds) / (seeds - 1),
        seeds * apart(of_examples) / (examples - 1),
        apart(rest) / ((seeds - 1) * (examples - 1)),
        seeds,
        examples,
    )


@dataclass(frozen=True)
class Test:
    """What a table of differences says against a true difference of zero.

    Two answers, of which the more careful counts: the two-way t, and the t over the seeds' means.
    With few seeds the first alone errs in the far tail that many questions read.
    """

    mean: Array
    errors: tuple[Array, Array]  # standard errors of the mean, two-way and over seeds
    freedoms: tuple[Array, Array]

    @property
    def p(self) -> Array:
        """The larger of the two two-sided p-values."""
        found = [
            2 * special.stdtr(freedom, -np.abs(_ratio(self.mean, error)))
            for error, freedom in zip(self.errors, self.freedoms, strict=True)
        ]
        return np.maximum(*found)

    def half_width(self, level: Array | float) -> Array:
        """Half of the interval at this level of false verdicts: without zero where p < level."""
        found = [
            error * -special.stdtrit(freedom, np.asarray(level) / 2)
            for error, freedom in zip(self.errors, self.freedoms, strict=True)
        ]
        return np.maximum(*found)


def _ratio(mean: Array, error: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(mean == 0, 0.0, mean / error)


def test_of(found: Components) -> Test:
    """The test of a table's mean squares; S must be at least two."""
    cells = found.num_seeds * found.num_examples
    sum_of = found.seeds + found.examples - found.rest
    largest = np.maximum(found.seeds, found.examples)
    squares = np.maximum(sum_of, largest)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Satterthwaite's degrees of freedom of whichever of the two it is.
        weights = (
            found.seeds**2 / (found.num_seeds - 1)
            + found.examples**2 / (found.num_examples - 1)
            + found.rest**2 / ((found.num_seeds - 1) * (found.num_examples - 1))
        )
        freedom = np.where(weights > 0, sum_of**2 / weights, 1.0)
    by_seeds = np.asarray(found.num_seeds - 1, dtype=np.float64)
    return Test(
        found.mean,
        (np.sqrt(squares / cells), np.sqrt(found.seeds / cells)),
        (np.maximum(freedom, 1.0), by_seeds),
    )


# --- many questions --------------------------------------------------------------------------


def holm(p: Array, level: float = LEVEL) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Holm's procedure over the last dimension, (..., Q).

    Returns:
        The level each question is tested at: its own step's where it is found, else that of the
        step at which the procedure stopped, so that p <= level exactly where it is found; the
        adjusted p-values; and which are found.
    """
    count = p.shape[-1]
    order = np.argsort(p, -1, kind="stable")
    ordered = np.take_along_axis(p, order, -1)
    steps = count - np.arange(count)
    levels = np.broadcast_to(level / steps, p.shape)
    going_on = np.logical_and.accumulate(ordered <= levels, -1)
    stopped = going_on.sum(-1, keepdims=True).clip(max=count - 1)
    levels = np.where(going_on, levels, np.take_along_axis(levels, stopped, -1))
    adjusted = np.minimum(np.maximum.accumulate(ordered * steps, -1), 1.0)
    back = np.argsort(order, -1, kind="stable")
    tests, fixed, found = (
        np.take_along_axis(one, back, -1) for one in (levels, adjusted, going_on)
    )
    return tests, fixed, found


@dataclass(frozen=True)
class Decisions:
    """What a command says of its questions, (..., Q) each.

    The interval from `low` to `high` is at the level of the question's own step, so that it is
    without zero exactly where the difference is found; `alone` is the 95% interval of a question
    that is asked alone.
    """

    mean: Array
    p: Array
    adjusted: Array
    level: Array
    low: Array
    high: Array
    alone: tuple[Array, Array]
    found: NDArray[np.bool_]

    def no_worse(self, margin: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Where the first level is no worse than the second by more than this, and the reverse.

        Holds for decisions that were made `with_margin`.
        """
        return self.low > -margin, self.high < margin


def decide(
    tables: Components,
    level: float = LEVEL,
    flattery: Array | float = 0.0,
    is_share: NDArray[np.bool_] | bool = False,
    with_margin: bool = False,
) -> Decisions:
    """Answer all questions of a command, (..., Q).

    Args:
        level: share of commands that may err in any of their questions.
        flattery: by how much the mean may be too high (negative: too low), because a level was
            chosen on the same seeds. Both the mean and what is left of it must be found.
        is_share: scores are in [0, 1]: where N examples do not differ, their means may by what N
            examples miss with this chance, -log(level) / N (the rule of three).
        with_margin: it is also asked what is no worse by more than a margin. Holm's steps are about
            zero alone: then every question has the same share of the level.
    """
    ends = tables.mean, tables.mean - flattery
    same_sign = np.sign(ends[0]) == np.sign(ends[1])
    nearer = np.where(same_sign, np.where(np.abs(ends[0]) < np.abs(ends[1]), *ends), 0.0)
    test = dataclasses.replace(test_of(tables), mean=nearer)
    p = test.p
    if with_margin:
        levels = np.full(p.shape, level / p.shape[-1])
        adjusted, found = np.minimum(p * p.shape[-1], 1.0), p <= levels
    else:
        levels, adjusted, found = holm(p, level)
    return Decisions(
        tables.mean, p, adjusted, levels,
        *_interval(test, tables, ends, levels, is_share),
        _interval(test, tables, ends, np.full(p.shape, LEVEL), is_share), found,
    )  # fmt: skip


def _interval(
    test: Test, tables: Components, ends: tuple[Array, Array], levels: Array, is_share: Any
) -> tuple[Array, Array]:
    """Ends at these levels: zero is outside exactly where p is at most the level."""
    half = test.half_width(levels)
    missed = -np.log(levels) / tables.num_examples
    wide = np.where(is_share, np.maximum(half, missed), half)
    low, high = np.minimum(*ends), np.maximum(*ends)
    # What examples miss is told on the far side of what was found, and on both of what was not.
    return (
        np.where(low - half > 0, low - half, low - wide),
        np.where(high + half < 0, high + half, high + wide),
    )


def t_quantile(freedom: float, level: float) -> float:
    """What |t| exceeds with this chance."""
    return float(-special.stdtrit(freedom, level / 2))
