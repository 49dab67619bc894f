"""Rows and columns of the page's tables: texts to read, and numbers to sort by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.compare.tables import short_keys
from lorabench.record import Record
from lorabench.report.changes import shortened
from lorabench.report.curves import last_step
from lorabench.show.cells import Cell, Table
from lorabench.show.results import columns_of, in_order
from lorabench.show.settings import SPLITS, headed, of_setting, scores_in, settings_table
from lorabench.show.text import size

if TYPE_CHECKING:
    from lorabench.compare import Answers
    from lorabench.intact import Checked


SHORT = 60  # characters of a text that a table shows at once


def settings_of(table: dict[str, Any], answers: Answers) -> Table:
    """One row per setting, as `lorabench compare` shows them."""
    found = settings_table(table, answers, with_speed=True)
    return replace(
        found,
        headers=[*map(_kept_whole, found.headers)],
        rows=[[_fitting(cell) for cell in row] for row in found.rows],
    )


def runs_table(found: Sequence[Checked], table: dict[str, Any], answers: Answers) -> Table:
    """One row per run, whatever became of it."""
    columns = columns_of(table)
    scored = scores_in(table, table["runs"], [], answers)
    scores = [pair for pair in scored if pair[0] in SPLITS][:4]
    several = len({one.folder.parent for one in found}) > 1
    troubled = any(_trouble(one) for one in found)
    headers = [
        "run", *["sweep"] * several, *short_keys(columns), "seed", "status", "steps",
        *["what happened"] * troubled, *(_kept_whole(headed(*pair)) for pair in scores),
        _kept_whole("train s"), "peak memory", "merged", "gguf",
    ]  # fmt: skip
    rows = []
    for one, row in in_order(found, table):
        entry, why, is_damaged = one.entry, _trouble(one), bool(one.damaged)
        done, planned = _done(one.folder, entry), entry.config.get("trainer", {}).get("steps")
        cost = entry.cost
        seconds = cost.train_seconds * cost.share
        what = (
            Cell(why, why, "text")
            if len(why) <= SHORT
            else Cell(f"{why[:SHORT]}…", why, "text", shortened(why))
        )
        rows.append([
            Cell(entry.run_id, entry.run_id, "id"),
            *([Cell(entry.sweep, entry.sweep)] if several else []),
            *(_fitting(of_setting(row["setting"].get(key))) for key in columns),
            Cell.of(entry.config.get("seed")),
            Cell(f"{entry.status}, damaged" if is_damaged else entry.status, entry.status,
                 f"status {'failed' if is_damaged else entry.status}"),
            Cell.of(done, f"{done:,} of {planned:,}" if planned else f"{done:,}"),
            *([what] if troubled else []),
            *(_score(row, split, name) for split, name in scores),
            Cell.of(seconds or None, f"{seconds:,.1f}"),
            Cell.of(cost.peak_memory_bytes or None, size(cost.peak_memory_bytes)),
            _export(entry, "merged"),
            _export(entry, "gguf"),
        ])  # fmt: skip
    return Table(headers, rows, [])


def _trouble(one: Checked) -> str:
    """What became of a run that did not go as planned."""
    damaged = ", ".join(f"{name} {how}" for name, how in one.damaged.items())
    told = (damaged, one.entry.error or "", one.entry.stopped_early or "")
    return "; ".join(text for text in told if text)


def _score(row: dict[str, Any], split: str, name: str) -> Cell:
    metrics = row["metrics"].get(split, {})
    if name not in metrics:
        return Cell("", None, "number")
    value = metrics[name]
    return Cell("not finite", None, "number") if value is None else Cell.of(value, f"{value:.4f}")


def _fitting(cell: Cell) -> Cell:
    """A cell that a table can show, with the rest of a long text left out."""
    text = shortened(cell.text)
    kind = cell.kind if len(text) <= SHORT else f"{cell.kind} text".strip()
    return replace(cell, text=text, kind=kind)


def _kept_whole(header: str) -> str:
    """A header whose arrow or unit stays beside the last word."""
    before, _, last = header.rpartition(" ")
    return f"{before}\u00a0{last}" if before and last in ("↑", "↓", "s") else header


def _done(folder: Path, entry: Record) -> int:
    """Steps done: of a run that trains now, those that it has logged."""
    if entry.status not in ("running", "interrupted"):
        return entry.steps_done
    return max(entry.steps_done, last_step(folder) or 0)


def _export(entry: Record, form: str) -> Cell:
    """Whether the adapter can be written so, or why not."""
    told = getattr(entry.exports, form, "") if entry.exports else ""
    if told in ("", "yes"):
        return Cell(told, told, "text")
    return Cell("no", told, "text", shortened(told))
