"""A row of a data file."""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One row, or why it cannot be read."""

    number: int  # from 1: of the line in JSON lines and csv, else of the row
    columns: dict[str, Any]  # as the file has them; empty if there is an error
    where: str  # for messages, with the file
    error: str = ""  # empty: the row is fine
