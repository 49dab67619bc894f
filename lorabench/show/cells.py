"""Rows and columns of a table, for a terminal and for a page."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A text, and what it is sorted by."""

    text: str
    sort: float | str | None = None  # None: by nothing; always last
    kind: str = ""  # a class of its style
    more: str = ""  # a longer text, shown when it is asked for

    @classmethod
    def of(cls, value: Any, text: str | None = None, kind: str = "number") -> Cell:
        """A number with its text; nothing where there is none."""
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return cls("" if value is None else "not finite", None, kind)
        return cls(str(value) if text is None else text, value, kind)


@dataclass(frozen=True)
class Table:
    """Headers and rows; `foot` stays below, however the rows are sorted."""

    headers: list[str]
    rows: list[list[Cell]]
    foot: list[list[Cell]]
    named: int = 1  # of the first columns: they say what a row is of
    notes: list[str] = field(default_factory=list)  # what its marks and headers mean
