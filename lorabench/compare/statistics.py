"""What S paired seeds and N paired test examples can tell about a difference.

Both are random: the difference d[s, i] of seed s and example i is the true difference plus what the
seed, the example and chance add. Sources: the crossed two-way table without replication (Searle,
Casella and McCulloch 1992, chapter 4); Satterthwaite 1946 for the degrees of freedom; Holm 1979
for many questions. Imports neither torch nor scipy.stats, which takes a second.

Letters: S seeds, N examples, `...` any dimensions before them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

Array = NDArray[np.float64]
LEVEL = 0.05  # false verdicts of a whole command, at most
POWER = 0.8  # chance of finding what is called findable


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
    of_seeds = differences.mean(-1) - mean[..., None]
    of_examples = differences.mean(-2) - mean[..., None]
    total = np.square(differences - mean[..., None, None]).sum((-2, -1))
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
    by_seeds = found.num_seeds - 1 + np.zeros_like(found.mean)
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

    The interval is mean - half to mean + half: at the level of the question's own step, so that it
    is without zero exactly where the difference is found.
    """

    mean: Array
    p: Array
    adjusted: Array
    level: Array
    half: Array
    half_alone: Array  # of the 95% interval of a question that is asked alone
    found: NDArray[np.bool_]

    def no_worse(self, margin: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Where the first level is no worse than the second by more than this, and the reverse."""
        return self.mean - self.half > -margin, self.mean + self.half < margin


def decide(tables: Components, level: float = LEVEL) -> Decisions:
    """Answer all questions of a command, (..., Q): at most 5% of commands err in any of them."""
    test = test_of(tables)
    p = test.p
    levels, adjusted, found = holm(p, level)
    return Decisions(
        tables.mean, p, adjusted, levels, test.half_width(levels), test.half_width(level), found
    )


# --- what could be found ---------------------------------------------------------------------


def upper_spreads(found: Components) -> dict[str, Array]:
    """The same as `Components.spreads`, with the upper 80% limit of the spread over seeds.

    Few seeds tell little about their own spread: the estimate times 2.1, 1.6 or 1.35 at 3, 5 or 8.
    """
    freedom = found.num_seeds - 1
    largest = found.seeds * freedom / special.chdtri(freedom, 0.8)
    over_seeds = np.maximum(largest - found.rest, 0) / found.num_examples
    return found.spreads | {"seeds": np.sqrt(over_seeds)}


class Design:
    """What S seeds and N examples can find at one level, given the spreads of d.

    Args:
        spreads: standard deviations of d over "seeds", over "examples" and of the "rest".
        level: of one question: for the first of Q the command's over Q.
    """

    def __init__(self, spreads: dict[str, float], seeds: int, examples: int, level: float):
        rest = spreads["rest"] ** 2
        over_seeds = rest + examples * spreads["seeds"] ** 2
        over_examples = rest + seeds * spreads["examples"] ** 2
        cells = seeds * examples
        self.error = float(np.sqrt((over_seeds + over_examples - rest) / cells))
        draws = _draws(seeds, examples)
        found = [e * d for e, d in zip((over_seeds, over_examples, rest), draws, strict=True)]
        table = Components(np.zeros_like(found[0]), found[0], found[1], found[2], seeds, examples)
        self.least = test_of(table).half_width(level)  # a mean that is found, draw by draw

    def power(self, difference: float) -> float:
        """Chance that a true difference is found."""
        if self.error == 0:
            return float(difference != 0)
        # The mean is independent of the mean squares: its part is known without drawing it.
        above = special.ndtr((difference - self.least) / self.error)
        below = special.ndtr((-difference - self.least) / self.error)
        return float(np.mean(above + below))

    def smallest(self, wanted: float = POWER) -> float:
        """The true difference that is found with this chance."""
        if self.error == 0:
            return 0.0
        high = self.error
        while self.power(high) < wanted:
            high *= 2
        found = optimize.brentq(lambda x: self.power(x) - wanted, 0, high, rtol=1e-4)
        return float(found)


@functools.cache
def _draws(seeds: int, examples: int, count: int = 1000) -> tuple[Array, Array, Array]:
    """Mean squares over their expectation, as chance spreads them: chi-squared, independent.

    Evenly spread instead of random (the Halton sequence of 2, 3 and 5): the same in every command.
    """
    freedoms = (seeds - 1, examples - 1, (seeds - 1) * (examples - 1))
    index = np.arange(1, count + 1)
    first, second, third = (
        special.chdtri(n, _radical_inverse(index, base)) / n
        for n, base in zip(freedoms, (2, 3, 5), strict=True)
    )
    return first, second, third


def _radical_inverse(index: NDArray[np.int64], base: int) -> Array:
    """The digits of whole numbers mirrored at the point: evenly spread in (0, 1)."""
    found, scale = np.zeros(len(index)), 1.0 / base
    while index.any():
        found += scale * (index % base)
        index, scale = index // base, scale / base
    return found


def seeds_to_find(
    difference: float,
    spreads: dict[str, float],
    examples: int,
    level: float,
    most: int = 64,
    wanted: float = POWER,
) -> int | None:
    """The fewest seeds with which a true difference is found; None: `most` are too few."""

    def enough(seeds: int) -> bool:
        return Design(spreads, seeds, examples, level).power(difference) >= wanted

    if not enough(most):
        return None
    low, high = 1, most  # too few, enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def t_quantile(freedom: float, level: float) -> float:
    """What |t| exceeds with this chance."""
    return float(-special.stdtrit(freedom, level / 2))
