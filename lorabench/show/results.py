"""What runs did: their status, and their settings compared."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lorabench.compare import HIGHER_IS_BETTER
from lorabench.compare.tables import short_keys
from lorabench.show.text import console, dump, quantity, setting, size, whole, with_spread

if TYPE_CHECKING:
    from lorabench.compare import Answers
    from lorabench.intact import Checked

COLOURS = {
    "finished": "green",
    "failed": "red",
    "interrupted": "yellow",
    "stopped": "yellow",
    "trained": "yellow",
    "planned": "dim",
}

OUTCOMES = {"found": "green", "no worse": "green", "not settled": "yellow", "no verdict": "yellow"}


def runs(found: Sequence[Checked], as_json: bool) -> None:
    """Status of every run."""
    from lorabench import compare

    table = compare.table([one.entry for one in found])
    if as_json:
        dump(
            [
                {
                    "run_id": r.run_id,
                    "folder": str(path),
                    "status": r.status,
                    "damaged": damaged,
                    "error": r.error,
                    "steps_done": r.steps_done,
                    "seeds": r.seeds,
                    "setting": one["setting"],
                }
                for (path, r, damaged), one in zip(found, table["runs"], strict=True)
            ]
        )
        return
    title = f"{found[0].folder.parent}: {len(found)} run{'s' if len(found) > 1 else ''}"
    out = Table(title=title, title_justify="left")
    # Streams that have a seed of their own in some run.
    entries = [one.entry for one in found]
    own = [s for s in entries[0].seeds if any(r.seeds[s] != r.config["seed"] for r in entries)]
    for name in (
        "run",
        *short_keys(_columns(table)),
        "seed",
        *(f"seeds.{stream}" for stream in own),
        "status",
        "done",
        "seconds",
        "error",
    ):
        out.add_column(name, no_wrap=name == "run")
    for (_, record, damaged), one in zip(found, table["runs"], strict=True):
        colour = "red" if damaged else COLOURS.get(record.status, "cyan")
        out.add_row(
            record.run_id,
            *(setting(one["setting"][key]) for key in _columns(table)),
            str(record.config["seed"]),
            *(str(record.seeds[stream]) for stream in own),
            Text(f"{record.status}, damaged" if damaged else record.status, colour),
            f"{record.steps_done}/{record.config['trainer']['steps']}",
            f"{record.cost.total_seconds:.1f}",
            record.error or "",
        )
    whole(console(), out, ("seconds",))


def _columns(table: dict[str, Any]) -> list[str]:
    """Varied keys worth a column: where model.name tells runs apart, model.path need not."""
    settings = [one["setting"] for one in table["runs"]]

    def is_told_by(label: str, key: str) -> bool:
        pairs = {(repr(one[label]), repr(one[key])) for one in settings}
        return len(pairs) == len({first for first, _ in pairs})

    labels = {key.partition(".")[0]: key for key in table["varied"] if key.endswith(".name")}
    return [
        key
        for key in table["varied"]
        if (label := labels.get(key.partition(".")[0])) in (None, key)
        or not is_told_by(str(label), key)
    ]


def _verdicts(answers: Answers) -> None:
    """The sentences, one factor after the other."""
    out = console()
    factor = None
    for one, text in zip(answers.verdicts, answers.sentences(), strict=True):
        if one.question.factor != factor:
            factor = one.question.factor
            out.print(factor, style="bold")
        out.print(f"  {text}", style=OUTCOMES[one.outcome], soft_wrap=True)
    if not answers.verdicts and answers.num_runs:
        out.print("one setting alone: there is nothing to compare it with")
    for text in answers.left_out:
        out.print(f"not compared, {text}", style="yellow", soft_wrap=True)
    if answers.verdicts:
        out.print(
            f"{answers.num_runs} runs, {len(answers.verdicts)} questions on test "
            f"{answers.metric}, paired by seed and example; at most one command in twenty has a "
            f"false verdict among its sentences",
            style="dim", soft_wrap=True,
        )  # fmt: skip
        out.print()


def comparison(
    table: dict[str, Any], answers: Answers, folders: Sequence[Path], as_json: bool
) -> None:
    """Sentences first, then one row per setting; the best mean of each metric is marked."""
    if as_json:
        dump(table | {
            "metric": answers.metric,
            "verdicts": answers.rows(),
            "not_compared": answers.left_out,
            "num_compared": answers.num_runs,
        })  # fmt: skip
        return
    folder = shlex.join(map(str, folders))
    rows = table["rows"]
    if rows:
        _verdicts(answers)
    out = console()
    if not rows:
        commands = " and ".join(f"lorabench runs {shlex.quote(str(one))}" for one in folders)
        show = "shows" if len(folders) == 1 else "show"
        out.print(f"{folder}: no run has finished; {commands} {show} their status")
        return
    metrics = list(
        dict.fromkeys((s, n) for row in rows for s in ("test",) for n in row["metrics"].get(s, {}))
    )
    settings = f"{len(rows)} setting{'s' if len(rows) > 1 else ''}"
    title = f"{folder}: {settings}, mean ± standard deviation over seeds"
    shown = Table(title=title, title_justify="left")
    columns = _columns(table)
    for name in short_keys(columns):
        shown.add_column(name)
    for split, name in metrics:
        arrow = "↑" if name in HIGHER_IS_BETTER else "↓"
        shown.add_column(f"{split} {name} {arrow}", justify="right")
    # In a pack nobody has a time of their own: its seconds over its size is a share, called one.
    packed = any(row["pack_size"]["max"] > 1 for row in rows)
    timed = ["pack s", "share s"] if packed else ["train s"]
    for name in ("seeds", "trainable", *timed, "peak memory"):
        shown.add_column(name, justify="right")
    best = {}
    for split, name in metrics:
        means = [row["metrics"].get(split, {}).get(name, {}).get("mean") for row in rows]
        known = [m for m in means if m is not None and not math.isnan(m)]
        if known:
            best[split, name] = max(known) if name in HIGHER_IS_BETTER else min(known)
    marked = any(row["other_stack"] for row in rows)
    if marked:
        shown.add_column("stack")
    for row in rows:
        cells: list[str | Text] = [setting(row["setting"][key]) for key in columns]
        for split, name in metrics:
            value = row["metrics"].get(split, {}).get(name)
            text = "" if value is None else with_spread(value)
            if value is not None and value["n"] < row["train_seconds"]["n"]:
                text += f" ({value['n']} of {row['train_seconds']['n']} finite)"
            is_best = value is not None and value["mean"] == best.get((split, name))
            cells.append(Text(text, "bold") if is_best and len(rows) > 1 else text)
        count = row["train_seconds"]["n"]
        cells += [
            str(count),
            quantity(row["trainable_parameters"]),
            f"{row['train_seconds']['mean']:.1f}",
            *([f"{row['train_seconds_share']['mean']:.1f}"] if packed else []),
            size(row["peak_memory_bytes"]["max"]),
            *(["other" if row["other_stack"] else ""] if marked else []),
        ]
        shown.add_row(*cells)
    whole(out, shown, ("share s", "peak memory", *timed, "trainable"))
    for status, ids in table["left_out"].items():
        out.print(f"left out, {status}: {', '.join(ids)}", style="yellow", soft_wrap=True)
    for text in dict.fromkeys(text for row in rows for text in row["other_stack"]):
        out.print(
            f"stack other: {text}; such rows differ by more than their setting", style="yellow"
        )
    evaluations = " and ".join(f"`lorabench evaluate {shlex.quote(str(f))}`" for f in folders)
    for split, found in table["evaluations"].items():
        if not found["shared"]:
            out.print(
                f"{split}: the runs were scored in different ways or on different examples, so "
                f"their values are not comparable; {evaluations} scores all alike",
                style="yellow",
                soft_wrap=True,
            )
    finished = sum(len(row["runs"]) for row in rows)
    for note, count in table["notes"].items():
        of = "" if count == finished else f" ({count} of {finished} runs)"
        out.print(f"note: {note}{of}", style="yellow", soft_wrap=True)
