"""Rows and columns of the page's tables: texts to read, and numbers to sort by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.compare import HIGHER_IS_BETTER
from lorabench.compare.bases import CHANGES
from lorabench.compare.tables import FIRST, order, short_keys
from lorabench.record import Record
from lorabench.report.changes import shortened
from lorabench.report.curves import last_step
from lorabench.show.compared import rank_text
from lorabench.show.results import columns_of, in_order
from lorabench.show.text import quantity, setting, size, with_spread

if TYPE_CHECKING:
    from lorabench.compare import Answers
    from lorabench.intact import Checked


SHORT = 60  # characters of a text that a table shows at once


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


def settings_table(table: dict[str, Any], answers: Answers) -> Table:
    """One row per setting, as `lorabench compare` shows them."""
    rows, bases = table["rows"], table.get("bases", [])
    columns = columns_of(table)
    scores = _scores_in(table, answers)
    changes = [name for name in CHANGES if any(name in row for row in rows)]
    headers = [*(short_keys(columns) or ["setting"]), *changes]
    headers += ["rank"] * bool(answers.ranks)
    headers += [_headed(split, name) for split, name in scores]
    headers += ["seeds", "trainable", "train s", "tokens/s", "peak memory"]
    found = []
    for row in rows:
        cells = [_of_setting(row["setting"].get(key)) for key in columns] or [Cell("trained")]
        for name in changes:
            value = row.get(name)
            cells.append(Cell.of(value and value["mean"], value and with_spread(value)))
        if answers.ranks:
            rank = answers.ranks.get(row["runs"][0])
            cells.append(Cell.of(None if rank is None else sum(rank) / 2, rank_text(rank)))
        for split, name in scores:
            value = row["metrics"].get(split, {}).get(name)
            cells.append(Cell.of(value and value["mean"], value and with_spread(value)))
        seconds = row["train_seconds_share"]["mean"]
        speed, memory = row["tokens_per_second"]["mean"], row["peak_memory_bytes"]["max"]
        cells += [
            Cell.of(len(row["seeds"])),
            Cell.of(row["trainable_parameters"], quantity(row["trainable_parameters"])),
            Cell.of(seconds, f"{seconds:,.1f}"),
            Cell.of(speed, f"{speed:,.0f}"),
            Cell.of(memory, size(memory)),
        ]
        found.append(cells)
    foot = []
    for base in bases:
        which = f"untrained {base['name']}" if len(bases) > 1 else "untrained"
        gap = len(columns or [""]) - 1 + len(changes) + bool(answers.ranks)
        values = [base["metrics"].get(split, {}).get(name) for split, name in scores]
        cells = [Cell(which), *[Cell("")] * gap]
        cells += [Cell.of(value, None if value is None else f"{value:.4f}") for value in values]
        foot.append([*cells, *[Cell("")] * (len(headers) - len(cells))])
    return Table(headers, found, foot)


def runs_table(found: Sequence[Checked], table: dict[str, Any], answers: Answers) -> Table:
    """One row per run, whatever became of it."""
    columns = columns_of(table)
    scores = [pair for pair in _scores_in(table, answers) if pair[0] in ("test", "validation")][:4]
    several = len({one.folder.parent for one in found}) > 1
    troubled = any(_trouble(one) for one in found)
    headers = [
        "run", *["sweep"] * several, *short_keys(columns), "seed", "status", "steps",
        *["what happened"] * troubled, *(_headed(split, name) for split, name in scores),
        "train s", "peak memory", "merged", "gguf",
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
            *(_of_setting(row["setting"].get(key)) for key in columns),
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


def _scores_in(table: dict[str, Any], answers: Answers) -> list[tuple[str, str]]:
    """Splits and metrics that settings have: of the judge first, test before the others."""
    splits = ["test", "validation"]
    splits += [one for one in table.get("evaluations", {}) if one not in splits]
    runs = [*table["rows"], *table["runs"]]
    there = {(s, name) for row in runs for s in splits for name in row["metrics"].get(s, {})}
    names = dict.fromkeys([answers.metric, *FIRST, *sorted({name for _, name in there})])
    return [(s, name) for name in names for s in splits if name and (s, name) in there]


def _score(row: dict[str, Any], split: str, name: str) -> Cell:
    metrics = row["metrics"].get(split, {})
    if name not in metrics:
        return Cell("", None, "number")
    value = metrics[name]
    return Cell("not finite", None, "number") if value is None else Cell.of(value, f"{value:.4f}")


def _of_setting(value: Any) -> Cell:
    if value is None:
        return Cell("none", "")
    text = shortened(setting(value))
    group, number, name = order(value)
    kind = "number" if group == 0 else "text" if len(text) > SHORT else ""
    return Cell(text, number if group == 0 else name, kind)


def _headed(split: str, name: str) -> str:
    return f"{split} {name}\u00a0{'↑' if name in HIGHER_IS_BETTER else '↓'}"


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
