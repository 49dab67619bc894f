"""What a sweep found: sentences, then one row per setting."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorabench.compare import HIGHER_IS_BETTER as OURS
from lorabench.compare.bases import CHANGES
from lorabench.compare.foreign import HIGHER_IS_BETTER as FOREIGN
from lorabench.compare.lints import is_linted
from lorabench.compare.tables import FIRST, short_keys
from lorabench.config.parts import RETENTION
from lorabench.show.results import columns_of
from lorabench.show.text import console, dump, quantity, setting, size, whole, with_spread

if TYPE_CHECKING:
    from lorabench.compare import Answers

HIGHER_IS_BETTER = OURS | FOREIGN
OUTCOMES = {
    "found": "green", "no worse": "green", "not settled": "yellow", "no verdict": "yellow",
    "trade-off": "yellow",
}  # fmt: skip
SPLITS = ("test", "validation")


def comparison(
    table: dict[str, Any],
    answers: Answers,
    folders: Sequence[Path],
    as_json: bool,
    metrics: Sequence[str] = (),
) -> None:
    """Show verdicts in sentences, then the table; the best setting on validation is marked.

    Args:
        metrics: to show, the judge first; none: all.
    """
    if as_json:
        dump(_content(table, answers))
        return
    folder = shlex.join(map(str, folders))
    out = console()
    if not table["rows"] and not table.get("foreign"):
        commands = " and ".join(f"lorabench runs {shlex.quote(str(one))}" for one in folders)
        show = "shows" if len(folders) == 1 else "show"
        out.print(f"{folder}: no run has finished; {commands} {show} their status")
        return
    _sentences(out, answers)
    _settings(out, table, answers, folder, metrics)
    _remarks(out, table)


def _content(table: dict[str, Any], answers: Answers) -> dict[str, Any]:
    for row in table["rows"]:
        row["rank"] = answers.ranks.get(row["runs"][0])
    return table | {
        "lints": [asdict(one) for one in table.get("lints", [])],
        "metric": answers.metric,
        "verdicts": answers.rows(),
        "chosen": [asdict(one) for one in answers.chosen],
        "not_compared": answers.left_out,
        "num_compared": answers.num_runs,
        "num_read": answers.num_read,
    }


def _sentences(out: Console, answers: Answers) -> None:
    """One factor after the other."""
    factor = None
    for one, text in zip(answers.verdicts, answers.sentences(), strict=True):
        if one.question.factor != factor:
            factor = one.question.factor
            out.print(factor, style="bold")
        out.print(f"  {text}", style=OUTCOMES[one.outcome], soft_wrap=True)
    if not answers.verdicts:
        out.print(nothing_asked(answers), soft_wrap=True)
    for chosen in answers.chosen:
        where = ", ".join(f"{name}={level}" for name, level in chosen.at.items())
        means = ", ".join(f"{value} {mean:.4f}" for value, mean in chosen.means.items())
        out.print(
            f"chosen on validation{f' at {where}' if where else ''}: "
            f"{chosen.factor}={chosen.value} ({means}) over {chosen.seeds} seeds"
            + "".join(f"; {value} {why}" for value, why in chosen.no_candidates.items()),
            soft_wrap=True,
        )
    for text in answers.left_out:
        out.print(f"not compared, {text}", style="yellow", soft_wrap=True)
    if answers.verdicts:
        out.print(how_judged(answers), style="dim", soft_wrap=True)
        out.print()


def how_judged(answers: Answers) -> str:
    """What the verdicts rest on, and how often they may be false."""
    looked = any(one.look for one in answers.verdicts)
    return (
        f"{_counted(answers)}, {_number(len(answers.verdicts), 'question')} on test "
        f"{answers.metric}{_and_retention(answers)}, paired by seed and example; at most one "
        f"command in twenty has a false verdict among its sentences"
        f"{', all looks together' if looked else ''}"
    )


def _and_retention(answers: Answers) -> str:
    metric = answers.retention_metric
    return "" if metric is None else f" and as many on retention {metric}"


def nothing_asked(answers: Answers) -> str:
    """Why there is no verdict at all."""
    if answers.metric is None:
        return "no run was scored on the test split; `lorabench evaluate DIR` scores saved adapters"
    if answers.factors:
        names = [one.name for one in answers.factors]
        return (
            f"no two settings differ in one factor alone; --vary {'+'.join(names)} compares them "
            f"as they are"
        )
    return "one setting alone: there is nothing to compare it with"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _counted(answers: Answers) -> str:
    """How many runs were compared, and how many could not be."""
    left_out = answers.num_read - answers.num_runs
    return f"{answers.num_runs} runs" + (f" ({left_out} more left out)" if left_out else "")


def _settings(
    out: Console, table: dict[str, Any], answers: Answers, folder: str, metrics: Sequence[str]
) -> None:
    rows, foreign = table["rows"], table.get("foreign", [])
    every = [*rows, *foreign]
    splits = [*SPLITS, *(one for one in table.get("evaluations", {}) if one not in SPLITS)]
    there = {name for row in every for split in splits for name in row["metrics"].get(split, {})}
    ordered = [name for name in dict.fromkeys([answers.metric, *FIRST, *sorted(there)])
               if name in there and (not metrics or name in metrics)]  # fmt: skip
    scores = [
        (split, name)
        for name in ordered
        for split in splits
        if any(
            name in row["metrics"].get(split, {}) for row in (every if split == "test" else rows)
        )
    ]
    kept = (RETENTION, answers.retention_metric or "")
    if kept not in scores and any(kept[1] in row["metrics"].get(RETENTION, {}) for row in rows):
        scores.append(kept)  # whatever is asked of test
    settings = f"{len(every)} setting{'s' if len(every) > 1 else ''}"
    title = f"{folder}: {settings}, mean ± standard deviation over seeds"
    shown = Table(title=title, title_justify="left")
    columns = [*columns_of(table), *_columns_of_foreign(foreign, table["varied"], bool(rows))]
    bases = table.get("bases", [])
    for name in short_keys(columns) or [""] * bool(bases):
        shown.add_column(name)
    changes = [name for name in CHANGES if any(name in row for row in rows)]
    for name in changes:
        metric = next(row[name]["metric"] for row in rows if name in row)
        shown.add_column(f"{name} {metric}", justify="right")
    if answers.ranks:
        shown.add_column("test rank" if answers.retention_metric else "rank", justify="right")
    for split, name in scores:
        arrow = "↑" if name in HIGHER_IS_BETTER else "↓"
        shown.add_column(f"{split} {name} {arrow}", justify="right")
    # In a pack nobody has a time of their own: its seconds over its size is a share, called one.
    packed = any(row["pack_size"]["max"] > 1 for row in rows)
    timed = ["pack s", "share s"] if packed else ["train s"]
    for name in ("seeds", "trainable", *timed, "peak memory"):
        shown.add_column(name, justify="right")
    marked = any(row["other_stack"] for row in rows)
    if marked:
        shown.add_column("stack")
    judge = ("validation", ordered[0]) if ordered else None
    best = _best(rows, *judge) if judge in scores and len(rows) > 1 else None
    for place, row in enumerate(rows):
        cells: list[str | Text] = [setting(row["setting"].get(key, "")) for key in columns]
        cells = cells or ["trained"] * bool(bases)
        if place == best:
            cells[0] = Text(f"{cells[0]} *", "bold")
        cells += [with_spread(row[name]) if name in row else "" for name in changes]
        if answers.ranks:
            cells.append(rank_text(answers.ranks.get(row["runs"][0])))
        cells += [_score(row, *score) for score in scores]
        cells += [
            str(len(row["seeds"])),
            quantity(row["trainable_parameters"]),
            f"{row['train_seconds']['mean']:.1f}",
            *([f"{row['train_seconds_share']['mean']:.1f}"] if packed else []),
            size(row["peak_memory_bytes"]["max"]),
            *(["other" if row["other_stack"] else ""] if marked else []),
        ]
        shown.add_row(*cells)
    shown.add_section()
    for base in bases:
        which = f" {base['name']}" if len(bases) > 1 else ""
        cells = [f"untrained{which}", *[""] * (len(columns) - 1)]
        cells += [""] * (len(changes) + bool(answers.ranks))
        for split, name in scores:
            value = base["metrics"].get(split, {}).get(name)
            cells.append("" if value is None else f"{value:.4f}")
        shown.add_row(*cells)
    shown.add_section()
    for row in foreign:
        known = [row["setting"].get(key) for key in columns]
        shown.add_row(
            *("" if value is None else setting(value) for value in known),
            *([""] * len(changes)),
            *([""] if answers.ranks else []),
            *(_foreign_score(row, *score) for score in scores),
            "one",
            _or_nothing(row["trainable_parameters"], quantity),
            _or_nothing(row["train_seconds"], lambda spread: f"{spread['mean']:.1f}"),
            *([""] if packed else []),
            _or_nothing(row["peak_memory_bytes"], lambda spread: size(spread["max"])),
            *(["other"] if marked else []),
        )
    least = ["share s", "peak memory", *timed, "trainable"]
    least += [name for name in ("names", "path", "peft_type") if foreign]
    # Columns of scores, the judge last.
    headers = [text for one in shown.columns if (text := str(one.header)).endswith(("↑", "↓"))]
    least += sorted(headers[:0:-1], key=lambda header: header.startswith("test"))
    whole(out, shown, least)
    if best is not None and judge is not None:
        out.print(f"* the best on validation {judge[1]}; test judges", style="dim")
    if changes:
        out.print(
            "gain: how much better than the untrained base on test; forgetting: how much worse on "
            "retention; mean ± standard deviation over seeds",
            style="dim", soft_wrap=True,
        )  # fmt: skip
    if foreign:
        out.print(
            f"{_number(len(foreign), 'result')} of PEFT's benchmark: one seed each, so no verdict; "
            f"the 95% interval is over its questions alone",
            style="dim", soft_wrap=True,
        )  # fmt: skip
        for text in dict.fromkeys(text for row in foreign for text in row["foreign"]["notes"]):
            out.print(f"note: {text}", style="yellow", soft_wrap=True)


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


def _foreign_score(row: dict[str, Any], split: str, name: str) -> str:
    value = row["metrics"].get(split, {}).get(name)
    if value is None:
        return ""
    text = f"{value['mean']:.4f}"
    interval = row["foreign"]["intervals"].get(split) if name == "accuracy" else None
    return f"{text} [{interval['low']:.3f}, {interval['high']:.3f}]" if interval else text


def _or_nothing(value: Any, shown: Callable[[Any], str]) -> str:
    return "" if value is None else shown(value)


def rank_text(rank: tuple[int, int] | None) -> str:
    """The ranks that a setting may have."""
    if rank is None:
        return ""
    low, high = rank
    return str(low) if low == high else f"{low}–{high}"


def _score(row: dict[str, Any], split: str, name: str) -> str:
    value = row["metrics"].get(split, {}).get(name)
    if value is None:
        return ""
    text = with_spread(value)
    if value["n"] < row["train_seconds"]["n"]:
        text += f" ({value['n']} of {row['train_seconds']['n']} finite)"
    return text


def _best(rows: Sequence[dict[str, Any]], split: str, name: str) -> int | None:
    """The row with the best mean."""
    means = {
        place: value["mean"]
        for place, row in enumerate(rows)
        if (value := row["metrics"].get(split, {}).get(name)) and not math.isnan(value["mean"])
    }
    choose = max if name in HIGHER_IS_BETTER else min
    return choose(means, key=lambda place: means[place]) if means else None


def _remarks(out: Console, table: dict[str, Any]) -> None:
    """What else a reader should know: runs left out, what speaks against a comparison, notes."""
    for status, ids in table["left_out"].items():
        out.print(f"left out, {status}: {', '.join(ids)}", style="yellow", soft_wrap=True)
    for lint in table.get("lints", []):
        out.print(f"beware: {lint.text}; {lint.remedy}", style="yellow", soft_wrap=True)
    finished = sum(len(row["runs"]) for row in table["rows"])
    for note, count in table["notes"].items():
        if not is_linted(note):
            of = "" if count == finished else f" ({count} of {finished} runs)"
            out.print(f"note: {note}{of}", style="yellow", soft_wrap=True)
