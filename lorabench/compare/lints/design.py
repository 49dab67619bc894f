"""What is compared with what: the finished runs of a sweep by setting, for the lints to look at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.compare.questions import Factor, factors_of, questions_of
from lorabench.compare.tables import settings_of
from lorabench.config import and_more
from lorabench.record import Record

if TYPE_CHECKING:
    from lorabench.compare.answers import Answers


@dataclass(frozen=True)
class Lint:
    """A reason why a comparison may mislead.

    Args:
        name: of the kind, such as "lr-edge".
        text: what is confounded, and for which settings.
        remedy: what to do about it.
        runs: ids of the runs it is about.
    """

    name: str
    text: str
    remedy: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Design:
    """Finished runs by setting, and what varies between the settings.

    Args:
        runs: folders and records, all finished.
        diverged: records of runs that stopped because their loss was not finite.
        answers: what the runs answer, if they were asked.
        settings: keys and values of each setting.
        members: runs of each setting, as indices into `runs`.
        factors: what varies.
    """

    runs: list[tuple[Path, Record]]
    diverged: list[Record]
    answers: Answers | None
    settings: list[dict[str, Any]]
    members: list[list[int]]
    factors: list[Factor]

    @classmethod
    def of(cls, runs: Sequence[tuple[Path, Record]], answers: Answers | None = None) -> Design:
        """Group the finished ones of these runs by setting."""
        finished = [(path, one) for path, one in runs if one.status == "finished"]
        diverged = [one for _, one in runs if one.status == "stopped"]
        of_runs = settings_of([one for _, one in finished])
        groups: dict[str, list[int]] = {}
        for i, setting in enumerate(of_runs):
            groups.setdefault(repr(sorted(setting.items())), []).append(i)
        settings = [of_runs[members[0]] for members in groups.values()]
        members = list(groups.values())
        return cls(finished, diverged, answers, settings, members, factors_of(settings))

    @property
    def records(self) -> list[Record]:
        return [one for _, one in self.runs]

    def of_setting(self, setting: int) -> list[Record]:
        """The records of a setting."""
        return [self.runs[i][1] for i in self.members[setting]]

    def ids(self, settings: Iterable[int]) -> tuple[str, ...]:
        """Run ids of these settings."""
        return tuple(one.run_id for i in settings for one in self.of_setting(i))

    def settings_with(self, run_ids: Iterable[str]) -> list[int]:
        """The settings that these runs belong to."""
        wanted = set(run_ids)
        return [
            i
            for i in range(len(self.settings))
            if any(one.run_id in wanted for one in self.of_setting(i))
        ]

    @cached_property
    def pairs(self) -> list[tuple[Factor, int, int]]:
        """Settings that a question compares, and the factor it asks about."""
        by_name = {one.name: one for one in self.factors}
        return [
            (by_name[question.factor], first, second)
            for question in questions_of(self.factors)
            if not question.averaged  # those average over the same pairs
            for first, second in question.pairs
        ]

    def is_chosen(self, key: str) -> bool:
        """Whether a key's value was chosen on validation, for each setting by itself."""
        chosen = self.answers.chosen if self.answers else []
        names = {name for one in chosen for name in one.factor.split("+")}
        return any(key in factor.keys and factor.name in names for factor in self.factors)

    def named(self, settings: Iterable[int], without: Sequence[str] = ()) -> str:
        """Name settings by what varies, such as "(head=lora, r=16) and (head=lora, r=64)".

        Args:
            without: keys whose factors are left out.
        """
        factors = [one for one in self.factors if not set(one.keys) & set(without)]

        def name(setting: int) -> str:
            levels = [f"{one.name}={one.levels[one.of_settings[setting]]}" for one in factors]
            return ", ".join(levels)

        names = list(dict.fromkeys(map(name, settings)))
        if set(names) == set(map(name, range(len(self.settings)))):
            return "all settings" if len(self.settings) > 1 else "the only setting"
        if len(names) > 1:
            names = [f"({one})" if ", " in one else one for one in names]
        return listed(names)


def listed(names: Iterable[str]) -> str:
    """Names in a sentence: "a, b and c", or "a, b, c and 4 more"."""
    found = list(names)
    if len(found) > 4:
        return and_more(found, 3)
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def span(values: Iterable[float]) -> str:
    """Numbers as a range, such as "1,000 to 2,000"; one number alone where all are equal."""
    found = list(values)
    low, high = min(found), max(found)
    return number(low) if low == high else f"{number(low)} to {number(high)}"


def number(value: float) -> str:
    """A count with separators, or a value as short as it can be read back."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"
