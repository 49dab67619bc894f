"""What so many seeds and examples can find, and how many would find a difference."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from lorabench.compare.statistics import Array, Components, test_of

POWER = 0.8  # chance of finding what is called findable
MOST_SEEDS = 64  # that a sweep is ever advised to have
MOST_EXAMPLES = 1_000_000


def upper_factor(seeds: Any) -> Any:
    """What the spread over so few seeds is at most, in 80 of 100 cases, times its estimate.

    2.1, 1.6 and 1.35 at 3, 5 and 8 seeds: few of them tell little about their own spread.
    """
    return np.sqrt((seeds - 1) / special.chdtri(seeds - 1, 0.8))


def upper_spreads(found: Components) -> dict[str, Array]:
    """The same as `Components.spreads`, with the upper 80% limit of the spread over seeds."""
    largest = found.seeds * upper_factor(found.num_seeds) ** 2
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
        return float(self.powers(np.array([difference]))[0])

    def powers(self, differences: Array) -> Array:
        """The same of several at once."""
        # The mean is independent of the mean squares: its part is known without drawing it.
        above = special.ndtr((differences[:, None] - self.least) / self.error)
        below = special.ndtr((-differences[:, None] - self.least) / self.error)
        return np.asarray((above + below).mean(-1))

    def smallest(self, wanted: float = POWER) -> float:
        """The true difference that is found with this chance."""
        if self.error == 0:
            return 0.0
        # Between what a typical draw finds and a margin above it; a 16th of that each time.
        # (scipy.optimize takes 0.2 s to import.)
        middle = float(np.median(self.least)) + self.error * float(special.ndtri(wanted))
        low, high = 0.0, 2 * max(middle, self.error)
        while self.power(high) < wanted:
            low, high = high, 2 * high
        for _ in range(3):
            grid = np.linspace(low, high, 17)
            found = special.ndtr((grid[:, None] - self.least) / self.error).mean(-1)
            place = min(16, max(1, int(np.searchsorted(found, wanted))))
            low, high = float(grid[place - 1]), float(grid[place])
        return high


@functools.cache
def _draws(seeds: int, examples: int, count: int = 256) -> tuple[Array, Array, Array]:
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


def examples_to_find(
    difference: float, spreads: dict[str, float], seeds: int, level: float
) -> int | None:
    """The fewest test examples with which a true difference is found; None: no number is enough."""

    def enough(examples: int) -> bool:
        return Design(spreads, seeds, examples, level).power(difference) >= POWER

    if seeds < 2 or not enough(MOST_EXAMPLES):
        return None
    low, high = 1, 2
    while not enough(high):
        low, high = high, min(2 * high, MOST_EXAMPLES)
    while high - low > max(1, low // 50):  # to two digits
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
