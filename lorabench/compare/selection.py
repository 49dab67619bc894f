"""One factor's value chosen on validation, so that test can judge the choice.

The same run has the same luck on validation and on test: a setting that was the best of four is
better than it would be with other seeds. How much better is estimated, and the verdict allows for
it; without that, a comparison of the best of four with the best of one errs in up to 16 of 100
commands where seeds matter most (benchmarks/calibration.py has a cell of it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorabench.compare.questions import Factor
from lorabench.compare.scores import Scores


@dataclass(frozen=True)
class Chosen:
    """What was chosen where the other factors have these levels.

    Args:
        at: levels of the other factors.
        value: the best on validation, by its mean over the seeds that all candidates have.
        means: of validation, by value; a value that diverged on a seed is no candidate.
        seeds: how many all candidates have.
        no_candidates: why other values are none, by value.
        flattery: how much better than with other seeds the choice makes its runs look.
    """

    factor: str
    at: dict[str, str]
    value: str
    means: dict[str, float]
    flattery: float
    seeds: int
    no_candidates: dict[str, str]


@dataclass(frozen=True)
class Selection:
    """Settings after a choice: one for each combination of the other factors.

    Args:
        settings: without the keys that were chosen.
        runs: scores by seed.
        members: indices of the settings that each was chosen from.
    """

    settings: list[dict[str, Any]]
    runs: list[dict[Any, Scores]]
    members: list[list[int]]
    chosen: list[Chosen | None]  # None: no value can be chosen there
    # Scores of what was chosen on retention, and how much better the choice makes them look.
    retention: list[dict[Any, Scores]] = field(default_factory=list)
    retention_flatteries: list[float] = field(default_factory=list)

    @property
    def flatteries(self) -> list[float]:
        """Of each setting."""
        return [0.0 if one is None else one.flattery for one in self.chosen]


def flattery(
    loss: NDArray[np.float64], scored: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Estimate how much the best of several values owes to the seeds it was chosen on.

    The best by its mean over S seeds loses to each seed's own best by b (1 - 1 / sqrt(S)) on
    average where only luck tells the values apart, and its mean flatters it by b / sqrt(S). Where
    one value is clearly the best, it is each seed's own best, and nothing is owed. After Tibshirani
    and Tibshirani 2009 (arXiv:0908.2904), for means instead of folds.

    Args:
        loss: (..., V, S) of values and seeds, less is better.
        scored: the same of other examples, on which the choice may flatter or do the opposite
            (negative); None: of those it was made on, where it can only flatter.
    """
    seeds = loss.shape[-1]
    if seeds < 2:
        return np.zeros(loss.shape[:-2])
    scored = loss if scored is None else scored
    best = loss.mean(-1).argmin(-1)[..., None, None]
    own = loss.argmin(-2)[..., None, :]
    lost = (np.take_along_axis(scored, best, -2) - np.take_along_axis(scored, own, -2))[..., 0, :]
    return np.asarray(lost.mean(-1) / (np.sqrt(seeds) - 1))


def select(
    factor: Factor,
    factors: Sequence[Factor],
    settings: Sequence[dict[str, Any]],
    runs: Sequence[Mapping[Any, Scores]] = (),
    validation: Sequence[Mapping[Any, float]] = (),
    higher_is_better: bool = False,
    retention: Sequence[Mapping[Any, Scores]] = (),
    more_is_kept: bool = False,
) -> Selection:
    """Choose one value of a factor at each combination of the others.

    Args:
        runs: test scores of every setting, by seed; none: only settings and members are of use.
        validation: means of the validation split of the same runs; a value with a run that has
            none, or diverged, is not chosen.
        retention: scores on retention of the same runs.
        more_is_kept: whether higher is better there.
    """
    others = [one for one in factors if one is not factor]
    groups: dict[tuple[int, ...], dict[int, int]] = {}
    for i, level in enumerate(factor.of_settings):
        at = tuple(one.of_settings[i] for one in others)
        groups.setdefault(at, {})[level] = i
    found = Selection([], [], [], [])
    runs, validation = runs or [{}] * len(settings), validation or [{}] * len(settings)
    for at, members in sorted(groups.items()):
        members = dict(sorted(members.items()))
        # What diverged on a seed cannot be the best; what was not run there is not known to.
        diverged = {
            level: [s for s, value in validation[i].items() if not np.isfinite(value)]
            for level, i in members.items()
        }
        able = [v for v, i in members.items() if not diverged[v] and runs[i]] or [*members]
        shared = [s for s in runs[members[able[0]]] if all(s in runs[members[v]] for v in able)]
        first = members[able[0]]
        setting = {k: v for k, v in settings[first].items() if k not in factor.keys}
        found.settings.append(setting)
        found.members.append(list(members.values()))
        if not shared or any(diverged[v] for v in able):
            found.runs.append({})
            found.chosen.append(None)
            found.retention.append({})
            found.retention_flatteries.append(0.0)
            continue
        table = np.array([[validation[members[v]][s] for s in shared] for v in able])
        loss = -table if higher_is_better else table
        best = able[int(loss.mean(-1).argmin())]
        found.runs.append({s: runs[members[best]][s] for s in shared})
        where = {one.name: one.levels[level] for one, level in zip(others, at, strict=True)}
        means = {factor.levels[v]: float(m) for v, m in zip(able, table.mean(-1), strict=True)}
        why = {
            factor.levels[v]: f"diverged or has no validation score on {len(those)} seeds"
            for v, those in diverged.items()
            if those
        } | {
            factor.levels[v]: "has no scores" for v in members if v not in able and not diverged[v]
        }
        chosen = Chosen(
            factor.name, where, factor.levels[best], means, float(flattery(loss)), len(shared), why
        )
        found.chosen.append(chosen)
        kept = [retention[members[v]] for v in able] if retention else []
        of_best = kept[able.index(best)] if kept else {}
        found.retention.append({s: of_best[s] for s in shared if s in of_best})
        owed = 0.0
        if kept and all(s in one for one in kept for s in shared):
            means_kept = np.array([[np.nanmean(one[s].values) for s in shared] for one in kept])
            owed = float(flattery(loss, -means_kept if more_is_kept else means_kept))
        found.retention_flatteries.append(owed)
    return found
