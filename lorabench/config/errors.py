"""What a user is told of a mistake in a config."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# A refusal is `key: law; what came; remedy`. What came usually begins with `got`; where nothing
# came, the law is followed by a remedy at once, which begins with one of these.
REMEDY = re.compile(r"(use|set|give|put|accept|check|write|leave|`lorabench|a sweep is)\b")
# Parts end with "; " outside of quotes; the apostrophe of "torch's" is no quote.
PART = re.compile(r"""((?:(?<!\w)'[^']*'(?!\w)|"[^"]*"|[^;]|;(?! ))+)(?:; |$)""")


class ConfigErrors(ValueError):
    """Everything wrong with one config or a whole sweep, collected before anything is loaded.

    Args:
        errors: one line each, in the form `key: law; what came; remedy`.
        runs: an error -> labels of the runs it is about.
        num_runs: of the command.
    """

    def __init__(
        self,
        errors: Iterable[str] | str,
        runs: Mapping[str, Sequence[str]] | None = None,
        num_runs: int = 0,
    ):
        self.errors = list(dict.fromkeys([errors] if isinstance(errors, str) else errors))
        self.runs = dict(runs or {})
        self.num_runs = num_runs
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """The errors for people: each says which runs it is about, unless it is all of them."""
        return [error + self._which(self.runs.get(error, [])) for error in self.errors]

    def _which(self, labels: Sequence[str]) -> str:
        if len(labels) in (0, self.num_runs):
            return ""
        more = f" and {len(labels) - 2} more" if len(labels) > 2 else ""
        return f"  [{' | '.join(labels[:2])}{more}]"

    def content(self) -> dict[str, Any]:
        """The errors for programs: key, law, got, remedy and runs of each."""
        return {
            "errors": [
                split_refusal(error) | {"runs": list(self.runs.get(error, []))}
                for error in self.errors
            ]
        }


def split_refusal(error: str) -> dict[str, Any]:
    """Return key, law, got and remedy of a refusal; the last two None where it does not say."""
    key, _, rest = error.partition(": ")
    law, *parts = PART.findall(rest) or [error]
    at = next((i for i, part in enumerate(parts) if part.startswith("got ")), 0)
    if parts[:at]:  # a law of several sentences
        law, parts = "; ".join([law, *parts[:at]]), parts[at:]
    got = None
    if parts and not REMEDY.match(parts[0]):
        got = parts.pop(0).removeprefix("got ")
    return {"key": key, "law": law, "got": got, "remedy": "; ".join(parts) or None}


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
