"""One row per setting, with its untrained bases and what others have measured beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lorabench.compare import HIGHER_IS_BETTER as OURS
from lorabench.compare.bases import CHANGES
from lorabench.compare.foreign import HIGHER_IS_BETTER as FOREIGN
from lorabench.compare.tables import FIRST, order, short_keys
from lorabench.config.parts import RETENTION
from lorabench.show.cells import Cell, Table
from lorabench.show.results import columns_of
from lorabench.show.text import count_of, quantity, setting, size, with_spread

if TYPE_CHECKING:
    from lorabench.compare import Answers

HIGHER_IS_BETTER = OURS | FOREIGN
SPLITS = ("test", "validation")
RANK = "rank"


def settings_table(
    table: dict[str, Any], answers: Answers, metrics: Sequence[str] = (), with_speed: bool = False
) -> Table:
    """Return settings, then results of PEFT's benchmark; untrained bases are the foot.

    Args:
        table: `compare.table` of the runs, with bases and foreign rows.
        metrics: to show, the judge first; none: all.
        with_speed: a column of tokens per second.
    """
    rows, foreign = table["rows"], table.get("foreign", [])
    bases = table.get("bases", [])
    columns = columns_of(table)
    columns += _columns_of_foreign(foreign, table["varied"], bool(rows))
    changes = {
        f"{name} {next(row[name]['metric'] for row in rows if name in row)}": name
        for name in CHANGES
        if any(name in row for row in rows)
    }
    scores = scores_in(table, rows, foreign, answers, metrics)
    # In a pack nobody has a time of their own: its seconds over its size is a share, called one.
    packed = any(row["pack_size"]["max"] > 1 for row in rows)
    marked = any(row["other_stack"] for row in rows)
    named = short_keys(columns) or ["setting"]
    headers = [
        *named, *changes, *[RANK] * bool(answers.ranks), *(headed(*pair) for pair in scores),
        "seeds", "trainable", *(["pack s", "share s"] if packed else ["train s"]),
        *["tokens/s"] * with_speed, "peak memory", *["stack"] * marked,
    ]  # fmt: skip
    best = _best(rows, scores)

    def setting_of(row: dict[str, Any]) -> list[Cell]:
        own = row["setting"]
        cells = [of_setting(own[key]) if key in own else Cell("", "") for key in columns]
        return cells or [Cell("trained")]

    def row_of(first: list[Cell], told: dict[str, Cell]) -> list[Cell]:
        return [*first, *(told.get(name, Cell("")) for name in headers[len(first) :])]

    found, foot = [], []
    for place, row in enumerate(rows):
        first = setting_of(row)
        if place == best:
            cell = first[0]
            first[0] = Cell(f"{cell.text} *", cell.sort, f"{cell.kind} best".strip())
        told = _costs(row) | {headed(*pair): _score(row, *pair) for pair in scores}
        told |= {one: _known(row.get(name), "mean", with_spread) for one, name in changes.items()}
        rank = answers.ranks.get(row["runs"][0])
        told[RANK] = Cell.of(None if rank is None else sum(rank) / 2, rank_text(rank))
        found.append(row_of(first, told))
    for row in foreign:
        known = {key: value for key, value in row["setting"].items() if value is not None}
        told = _costs(row) | {headed(*pair): _foreign_score(row, *pair) for pair in scores}
        found.append(row_of(setting_of({"setting": known}), told | {"seeds": Cell.of(1, "one")}))
    for base in bases:
        which = f"untrained {base['name']}" if len(bases) > 1 else "untrained"
        values = {headed(s, name): base["metrics"].get(s, {}).get(name) for s, name in scores}
        told = {
            header: Cell.of(value, f"{value:.4f}")
            for header, value in values.items()
            if value is not None
        }
        foot.append(row_of([Cell(which), *[Cell("")] * (len(named) - 1)], told))
    notes = []
    if best is not None:
        notes.append(f"* the best on validation {scores[0][1]}; test judges")
    if changes:
        notes.append(
            "gain: how much better than the untrained base on test; forgetting: how much worse on "
            "retention; mean ± standard deviation over seeds"
        )
    if foreign:
        notes.append(
            f"{count_of(len(foreign), 'result')} of PEFT's benchmark: one seed each, so no "
            f"verdict; the 95% interval is over its questions alone"
        )
    if RANK in headers and answers.retention_metric:
        headers[headers.index(RANK)] = "test rank"
    return Table(headers, found, foot, len(named), notes)


def scores_in(
    table: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    foreign: Sequence[dict[str, Any]],
    answers: Answers,
    metrics: Sequence[str] = (),
) -> list[tuple[str, str]]:
    """Splits and metrics that rows have: of the judge first, test before the others.

    Args:
        foreign: rows of PEFT's results, of which only test is shown.
        metrics: to show; none: all. What a run kept is shown whatever is asked of test.
    """
    splits = [*SPLITS, *(one for one in table.get("evaluations", {}) if one not in SPLITS)]
    there = {
        (split, name) for row in rows for split in splits for name in row["metrics"].get(split, {})
    }
    there |= {("test", name) for row in foreign for name in row["metrics"].get("test", {})}
    names = dict.fromkeys([answers.metric, *FIRST, *sorted({name for _, name in there})])
    kept = (RETENTION, answers.retention_metric)
    return [
        (split, name)
        for name in names
        for split in splits
        if name and (split, name) in there
        and (not metrics or name in metrics or (split, name) == kept)
    ]  # fmt: skip


def headed(split: str, name: str) -> str:
    """A score's name, and which way is better."""
    return f"{split} {name} {'↑' if name in HIGHER_IS_BETTER else '↓'}"


def of_setting(value: Any) -> Cell:
    """The value of a key of a setting."""
    if value is None:
        return Cell("none", "")
    group, number, name = order(value)
    return Cell(setting(value), number if group == 0 else name, "number" if group == 0 else "")


def rank_text(rank: tuple[int, int] | None) -> str:
    """The ranks that a setting may have."""
    if rank is None:
        return ""
    low, high = rank
    return str(low) if low == high else f"{low}–{high}"


def _costs(row: dict[str, Any]) -> dict[str, Cell]:
    """What a row took, and what it ran on."""
    seconds = _known(row["train_seconds"], "mean", lambda spread: f"{spread['mean']:,.1f}")
    return {
        "seeds": Cell.of(len(row["seeds"])),
        "trainable": Cell.of(
            row["trainable_parameters"],
            row["trainable_parameters"] and quantity(row["trainable_parameters"]),
        ),
        "pack s": seconds,
        "train s": seconds,
        "share s": _known(
            row["train_seconds_share"], "mean", lambda spread: f"{spread['mean']:,.1f}"
        ),
        "tokens/s": _known(
            row["tokens_per_second"], "mean", lambda spread: f"{spread['mean']:,.0f}"
        ),
        "peak memory": _known(
            row["peak_memory_bytes"], "max", lambda spread: size(spread["max"])
        ),
        "stack": _stack(row["other_stack"]),
    }


def _known(
    spread: dict[str, Any] | None, by: str, shown: Callable[[dict[str, Any]], str]
) -> Cell:
    """A spread, sorted by one of its numbers; nothing where it is not known."""
    return Cell("", None, "number") if spread is None else Cell.of(spread[by], shown(spread))


def _score(row: dict[str, Any], split: str, name: str) -> Cell:
    value = row["metrics"].get(split, {}).get(name)
    if value is None:
        return Cell("", None, "number")
    text, of = with_spread(value), row["train_seconds"]["n"]
    if value["n"] < of:
        text += f" ({value['n']} of {of} finite)"
    return Cell.of(value["mean"], text)


def _foreign_score(row: dict[str, Any], split: str, name: str) -> Cell:
    value = row["metrics"].get(split, {}).get(name)
    if value is None:
        return Cell("", None, "number")
    text = f"{value['mean']:.4f}"
    interval = row["foreign"]["intervals"].get(split) if name == "accuracy" else None
    more = f" [{interval['low']:.3f}, {interval['high']:.3f}]" if interval else ""
    return Cell.of(value["mean"], text + more)


def _stack(differences: Sequence[str]) -> Cell:
    """How a setting's versions, device or threads differ from those of most."""
    return Cell("other", "other", "", "; ".join(differences)) if differences else Cell("", "")


def _best(rows: Sequence[dict[str, Any]], scores: Sequence[tuple[str, str]]) -> int | None:
    """The row with the best mean of the judge on validation, where there are several."""
    if len(rows) < 2 or not scores or ("validation", name := scores[0][1]) not in scores:
        return None
    means = {
        place: value["mean"]
        for place, row in enumerate(rows)
        if (value := row["metrics"].get("validation", {}).get(name))
        and not math.isnan(value["mean"])
    }
    choose = max if name in HIGHER_IS_BETTER else min
    return choose(means, key=lambda place: means[place]) if means else None


def _columns_of_foreign(
    rows: Sequence[dict[str, Any]], known: Sequence[str], beside_ours: bool
) -> list[str]:
    """Keys by which people know foreign rows, and where they stand alone those that differ."""
    keys = dict.fromkeys(key for row in rows for key in row["setting"] if key not in known)
    return [
        key
        for key in keys
        if key in ("experiment", "peft_type")
        or (not beside_ours and len({repr(row["setting"].get(key)) for row in rows}) > 1)
    ]
