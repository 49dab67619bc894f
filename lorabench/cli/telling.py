"""Lines on stderr, and a parser whose refusals are told as all others."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import NoReturn


def tell(lines: list[str], code: int = 2) -> int:
    """Print lines on stderr, if anybody is there to read them; return the exit code."""
    with contextlib.suppress(OSError):  # a closed terminal, a full disk: the code tells
        for line in lines:
            print(line, file=sys.stderr)
    return code


def nowhere(lines: list[str]) -> None:
    """Where lines are not to be told."""


def above_zero(text: str) -> float:
    """Return an option's number, which must be above zero."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0; got '{text}'")
    return value


def whole_number(text: str) -> int:
    """Return an option's number, which must be at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on; got '{text}'")
    return int(text)


class Parser(argparse.ArgumentParser):
    """Refuses words as lorabench refuses everything else."""

    def error(self, message: str) -> NoReturn:
        from lorabench.config import ConfigErrors

        usage = " ".join(self.format_usage().removeprefix("usage: ").split())
        raise ConfigErrors(
            f"{self.prog}: must be used as '{usage}'; got {message}; `{self.prog} --help` explains"
        )
