"""Pieces of the tables: numbers with their units, nothing cut, JSON on request."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lorabench import stages
from lorabench.config import parts


def console() -> Console:
    """Standard output; a pipe gets lines wide enough not to be cut.

    No markup: labels, paths and errors hold brackets of their own.
    """
    found = Console(highlight=False, markup=False)
    if not found.is_terminal:
        found = Console(highlight=False, markup=False, width=10_000)
    return found


def dump(content: Any) -> None:
    """JSON on standard output; a value that is no number is null."""
    print(json.dumps(finite(content), indent=2, default=str, allow_nan=False))


def finite(content: Any) -> Any:
    """The same for JSON, which has no NaN: null in its place."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def whole(out: Console, table: Table, least: Iterable[str]) -> None:
    """Print a table with no value cut: a narrow terminal gets fewer columns, and is told which.

    Args:
        least: names of the columns that go first.
    """
    wide = out.options.update_width(10_000)
    left_out = []
    for name in least:
        if not out.is_terminal or Measurement.get(out, wide, table).maximum <= out.width:
            break
        kept = [column for column in table.columns if column.header != name]
        left_out += [name] * (len(kept) < len(table.columns))
        table.columns = kept
    for column in table.columns:
        column.overflow = "fold"
    out.print(table)
    if left_out:
        out.print(
            f"left out at {out.width} columns: {', '.join(left_out)}; "
            "a wider terminal or a pipe shows all",
            style="dim",
        )


def count_of(count: int, what: str) -> str:
    """1 run or 2 runs."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def quantity(number: float) -> str:
    """12,345 or 1.23M or 2.61B."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:,.0f}"


def size(num_bytes: float) -> str:
    """Bytes in the largest unit that keeps a digit before the point."""
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError


def with_spread(spread: dict[str, Any], digits: int = 4) -> str:
    """mean ± sample standard deviation over seeds."""
    text = f"{spread['mean']:.{digits}f}"
    return text if spread["sd"] is None else f"{text} ± {spread['sd']:.{digits}f}"


def setting(value: Any) -> str:
    """The value of a key of a setting."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return parts.describe(value) if "path" in value[0] else stages.describe(value)
    return ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
