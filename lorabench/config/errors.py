"""What a user is told of a mistake in a config."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigErrors(ValueError):
    """Everything wrong with one config or a whole sweep, collected before anything is loaded."""

    def __init__(self, errors: Iterable[str] | str):
        self.errors = list(dict.fromkeys([errors] if isinstance(errors, str) else errors))
        super().__init__("\n".join(self.errors))


def first_line(error: BaseException, most: int | None = 160) -> str:
    """What an exception says first, or its kind where it says nothing.

    Args:
        most: characters; None: the whole line.
    """
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known names that `name` was probably meant to be, best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`'x' (did you mean 'y'?)`, or `'x'` alone."""
    close = nearest(name, known)
    return f"'{name}' (did you mean '{close[0]}'?)" if close else f"'{name}'"


def and_more(names: Iterable[str], shown: int = 1) -> str:
    """`a, b and 3 more`: the first names, and how many there are besides."""
    found = list(names)
    more = f" and {len(found) - shown} more" if len(found) > shown else ""
    return ", ".join(found[:shown]) + more
