"""What varies between runs, and what can be asked of it: one factor's levels, two by two."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorabench import stages
from lorabench.compare.tables import order, short_keys
from lorabench.config import ConfigErrors, parts

MOST_LEVELS = 6  # of a factor that are compared two by two; more are compared with one


@dataclass(frozen=True)
class Factor:
    """Keys that vary together, named by the first.

    Args:
        of_settings: the level of each setting, an index into `levels`.
        levels: texts, in order.
    """

    name: str
    keys: tuple[str, ...]
    of_settings: tuple[int, ...]
    levels: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """Whether two levels of a factor differ: at one level of each other factor, or averaged."""

    factor: str
    levels: tuple[str, str]
    at: dict[str, str]  # levels of other factors; averaged over: absent
    averaged: tuple[str, ...]  # factors
    pairs: tuple[tuple[int, int], ...]  # settings: one pair, or all that are averaged

    @property
    def name(self) -> str:
        """Such as "head=lora against head=exclude at r=16"."""
        first, second = (told(self.factor, level) for level in self.levels)
        return f"{first} against {second}{self.where}"

    @property
    def where(self) -> str:
        """Such as " at r=16"; nothing where no other factor varies."""
        text = "".join(
            f"{' at ' if i == 0 else ', '}{name}={level}"
            for i, (name, level) in enumerate(self.at.items())
        )
        return text + (f" averaged over {', '.join(self.averaged)}" if self.averaged else "")


def told(factor: str, level: str) -> str:
    """Such as "r=16"; of factors that are one, "head=lora r=16"."""
    names, levels = factor.split("+"), level.split("+")
    if len(names) != len(levels):
        return f"{factor}={level}"
    return " ".join(f"{name}={level}" for name, level in zip(names, levels, strict=True))


def factors_of(settings: Sequence[dict[str, Any]]) -> list[Factor]:
    """What varies between settings; keys that always change together are one factor."""
    keys = list(dict.fromkeys(key for one in settings for key in one))
    groups: dict[tuple[int, ...], list[str]] = {}
    values_of: dict[tuple[int, ...], dict[str, list[Any]]] = {}
    for key in keys:
        values = {repr(one.get(key)): one.get(key) for one in settings}
        if len(values) < 2:
            continue
        ordered = sorted(values.values(), key=order)
        places = {repr(value): place for place, value in enumerate(ordered)}
        pattern = [places[repr(one.get(key))] for one in settings]
        canonical = tuple(pattern.index(place) for place in pattern)
        groups.setdefault(canonical, []).append(key)
        values_of.setdefault(canonical, {})[key] = ordered
    found = []
    names = short_keys([_telling(keys) for keys in groups.values()])
    for name, (canonical, together) in zip(names, groups.items(), strict=True):
        key = _telling(together)
        ordered = values_of[canonical][key]
        places = {repr(value): place for place, value in enumerate(ordered)}
        found.append(
            Factor(
                name,
                (key, *(other for other in together if other != key)),
                tuple(places[repr(one.get(key))] for one in settings),
                _texts(ordered),
            )
        )
    return found


def _telling(keys: list[str]) -> str:
    """The key people know a group by: a label, or the first."""
    return next((key for key in keys if key.endswith((".name", ".policy"))), keys[0])


def text_of(value: Any) -> str:
    """A level as people write it."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return parts.describe(value) if "path" in value[0] else stages.describe(value)
    if isinstance(value, list):
        return ",".join(map(text_of, value)) or "none"
    if isinstance(value, float):  # the shortest text that reads back
        return short if float(short := f"{value:g}") == value else repr(value)
    return str(value)


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    """Levels as people write them; as Python does where that leaves two alike."""
    texts = tuple(map(text_of, values))
    return texts if len(set(texts)) == len(texts) else tuple(map(repr, values))


def _level(text: str, levels: Sequence[str]) -> str | None:
    """The level that a text means: 1e-3 is 0.001."""
    if text in levels:
        return text
    with contextlib.suppress(ValueError):
        for level in levels:
            with contextlib.suppress(ValueError):
                if float(level) == float(text):
                    return level
    return None


def questions_of(
    factors: Sequence[Factor], vary: Sequence[str] = (), baseline: dict[str, str] | None = None
) -> list[Question]:
    """Every factor's effect: at each combination of the others' levels, and averaged over them.

    Args:
        vary: factors to ask about, by name or key; none: all. With a plus between them, several
            are one: head+lora.r has the levels exclude+16, lora+16 and so on.
        baseline: of a factor, the level that all others are compared with; without one a factor of
            more than MOST_LEVELS levels is compared with its first.
    Raises:
        ConfigErrors: no such factor or level.
    """
    names = dict.fromkeys([*vary, *(name for name in baseline or {} if "+" in name)])
    named = {one.name: one for one in (find(name, factors, "--vary") for name in names)}
    chosen = list(named.values()) or list(factors)
    against: dict[str, int] = {}
    for name, level in (baseline or {}).items():
        factor = find(name, factors, "--baseline")
        meant = _level(level, factor.levels)
        if meant is None:
            raise ConfigErrors(
                f"--baseline: must name a level of {factor.name} "
                f"({', '.join(factor.levels)}); got '{level}'"
            )
        if factor.name not in {one.name for one in chosen}:
            raise ConfigErrors(
                f"--baseline: must be of what is asked about ({', '.join(named)}); "
                f"got '{name}'; add it to --vary, or leave it out"
            )
        against[factor.name] = factor.levels.index(meant)
    found = []
    for factor in chosen:
        # Another factor that follows from this one, or is a part of it, is no condition to hold.
        others = [one for one in factors if one is not factor and not follows(one, factor)]
        if len(factor.levels) > MOST_LEVELS:
            against.setdefault(factor.name, 0)
        found += list(_of_factor(factor, others, against.get(factor.name)))
    return found


def that_vary(
    factors: Sequence[Factor], vary: Sequence[str], baseline: dict[str, Any] | None
) -> tuple[list[str], dict[str, str]]:
    """Return of what an experiment asks that which varies between these runs."""
    names = {name for one in factors for name in (one.name, *one.keys)}

    def varies(name: str) -> bool:
        return all(part in names for part in name.split("+"))

    levels = {key: text_of(value) for key, value in (baseline or {}).items() if varies(key)}
    return (
        [name for name in vary if varies(name)],
        {
            key: text
            for key, text in levels.items()
            if _level(text, find(key, factors, "compare.baseline").levels)
        },
    )


def find(name: str, factors: Sequence[Factor], option: str) -> Factor:
    """Return the factor of a name or a key; with a plus between several names, all as one.

    Raises:
        ConfigErrors: nothing of that name varies.
    """
    if "+" in name:
        return _together(name, factors, option)
    for factor in factors:
        if name == factor.name or name in factor.keys:
            return factor
    there = ", ".join(factor.name for factor in factors) or "nothing"
    raise ConfigErrors(f"{option}: must name what varies between the runs ({there}); got '{name}'")


def _together(name: str, factors: Sequence[Factor], option: str) -> Factor:
    parts = [find(part, factors, option) for part in name.split("+")]
    combinations = list(zip(*(part.of_settings for part in parts), strict=True))
    levels = sorted(set(combinations))
    return Factor(
        "+".join(part.name for part in parts),
        (name, *(key for part in parts for key in part.keys)),
        tuple(levels.index(one) for one in combinations),
        tuple(
            "+".join(part.levels[level] for part, level in zip(parts, one, strict=True))
            for one in levels
        ),
    )


def follows(one: Factor, other: Factor) -> bool:
    """Whether the level of `other` tells that of `one`."""
    pairs = set(zip(other.of_settings, one.of_settings, strict=True))
    return len(pairs) == len(other.levels)


def _of_factor(factor: Factor, others: Sequence[Factor], against: int | None) -> list[Question]:
    places: dict[tuple[int, ...], dict[int, int]] = {}
    for setting, level in enumerate(factor.of_settings):
        at = tuple(other.of_settings[setting] for other in others)
        places.setdefault(at, {})[level] = setting
    found = []
    for low, high in itertools.combinations(range(len(factor.levels)), 2):
        if against is not None and against not in (low, high):
            continue
        first, second = (low, high) if against in (None, low) else (high, low)
        levels = factor.levels[second], factor.levels[first]
        there = {
            at: (of[second], of[first])
            for at, of in sorted(places.items())
            if first in of and second in of
        }
        if len(there) > 1:
            varied = [
                other.name for i, other in enumerate(others) if len({at[i] for at in there}) > 1
            ]
            found.append(Question(factor.name, levels, {}, tuple(varied), tuple(there.values())))
        for at, pair in there.items():
            where = {
                other.name: other.levels[level] for other, level in zip(others, at, strict=True)
            }
            found.append(Question(factor.name, levels, where, (), (pair,)))
    return found
