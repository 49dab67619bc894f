"""Where a setting may stand among all of them: ranks with their uncertainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorabench.compare import statistics
from lorabench.compare.scores import Scores, aligned


def rank_intervals(
    runs: Sequence[Mapping[Any, Scores]],
    higher_is_better: bool,
    level: float = statistics.LEVEL,
) -> list[tuple[int, int] | None]:
    """Return the best and the worst rank that each setting may have, 1 being the best.

    All settings are compared two by two on the seeds and examples that they share; a setting stands
    behind those that are found better and before those that are found worse. With this level of
    false verdicts over all pairs, all intervals hold at once (Mogstad et al. 2024,
    doi:10.1093/restud/rdad006).

    Args:
        runs: scores of every setting, by seed; a setting without any has no rank.
    Returns:
        One pair per setting. None: fewer than two settings, seeds or examples to compare.
    """
    there = [i for i, one in enumerate(runs) if one]
    found: list[tuple[int, int] | None] = [None] * len(runs)
    if len(there) < 2:
        return found
    seeds = [s for s in runs[there[0]] if all(s in runs[i] for i in there)]
    if len(seeds) < 2:
        return found
    table = aligned([runs[i][s] for i in there for s in seeds])
    if table.shape[1] < 2:
        return found
    scores = table.reshape(len(there), len(seeds), -1) * (1 if higher_is_better else -1)
    decided = statistics.decide(statistics.components_of_pairs(scores), level)
    first, second = np.triu_indices(len(there), 1)
    better = np.where(decided.mean > 0, first, second)[decided.found]
    worse = np.where(decided.mean > 0, second, first)[decided.found]
    behind, before = (np.bincount(ids, minlength=len(there)) for ids in (worse, better))
    for place, i in enumerate(there):
        found[i] = (1 + int(behind[place]), len(there) - int(before[place]))
    return found
