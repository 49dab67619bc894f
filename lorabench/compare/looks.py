"""Looking at a sweep more than once while seeds are added, without more false verdicts.

The looks are fixed before a seed is added. Each has a level of its own, and the levels add up to
the 5% of a command: whatever happens at one look, a later one adds no more than its level. Looking
again and again at 5% errs in up to 19% of sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lorabench.compare import statistics
from lorabench.compare.judging import Verdict

FEWEST = 3  # seeds of a look
# Shares of the command's level, by number of looks: most is left for the last one, which has most
# seeds. 1% and 4% kept 96% of the power of a single look at eight seeds.
SHARES = {1: (1.0,), 2: (0.2, 0.8), 3: (0.1, 0.2, 0.7)}
FAR = 5  # seeds between the first look and the last that are worth a look between


@dataclass(frozen=True)
class Look:
    """A look at the runs of some seeds.

    Args:
        seeds: values of the config key `seed`.
        level: share of sweeps that may have a false verdict at this look.
    """

    seeds: tuple[int, ...]
    level: float


def plan_looks(have: Sequence[int], most: int) -> list[Look]:
    """Return the looks at a sweep that has some seeds already.

    Args:
        have: seeds of the sweep.
        most: seeds that it may have in the end, more than it has.
    """
    first = len(have) if len(have) >= FEWEST else min(FEWEST + 1, most)
    counts = [first, most] if most > first else [most]
    if most - first >= FAR:
        counts.insert(1, (first + most + 1) // 2)
    seeds = sorted(have)
    fresh = max(seeds) + 1
    seeds += range(fresh, fresh + most - len(seeds))
    levels = [statistics.LEVEL * share for share in SHARES[len(counts)]]
    return [Look(tuple(seeds[:n]), level) for n, level in zip(counts, levels, strict=True)]


def at_looks(
    looks: Sequence[Look],
    planned: int,
    questions: Sequence[int],
    judged: Callable[[Look, list[int]], list[Verdict]],
) -> list[Verdict]:
    """Return each question's verdict at the first look that settles it, else at the last one taken.

    Args:
        looks: those that were taken.
        planned: how many there are in all.
        judged: answers some of the questions at one look.
    """
    verdicts: dict[int, Verdict] = {}
    for number, look in enumerate(looks, 1):
        left = [i for i in questions if not _is_settled(verdicts.get(i))]
        for i, one in zip(left, judged(look, left), strict=True):
            verdicts[i] = replace(one, look=number, looks=planned)
    return [verdicts[i] for i in questions]


def _is_settled(one: Verdict | None) -> bool:
    return one is not None and one.outcome in ("found", "no worse")
