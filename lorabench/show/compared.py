"""What a sweep found: sentences, then one row per setting."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorabench.compare.lints import is_linted
from lorabench.show.settings import settings_table
from lorabench.show.text import console, count_of, dump, whole

if TYPE_CHECKING:
    from lorabench.compare import Answers

OUTCOMES = {
    "found": "green", "no worse": "green", "not settled": "yellow", "no verdict": "yellow",
    "trade-off": "yellow",
}  # fmt: skip


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
        f"{_counted(answers)}, {count_of(len(answers.verdicts), 'question')} on test "
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


def _counted(answers: Answers) -> str:
    """How many runs were compared, and how many could not be."""
    left_out = answers.num_read - answers.num_runs
    return f"{answers.num_runs} runs" + (f" ({left_out} more left out)" if left_out else "")


def _settings(
    out: Console, table: dict[str, Any], answers: Answers, folder: str, metrics: Sequence[str]
) -> None:
    found = settings_table(table, answers, metrics)
    number = count_of(len(found.rows), "setting")
    title = f"{folder}: {number}, mean ± standard deviation over seeds"
    shown = Table(title=title, title_justify="left")
    for i, name in enumerate(found.headers):
        is_text = i < found.named or name == "stack"
        shown.add_column(name, justify="left" if is_text else "right")
    for rows in (found.rows, found.foot):
        for row in rows:
            shown.add_row(*(Text(one.text, "bold" if "best" in one.kind else "") for one in row))
        shown.add_section()
    scores = [name for name in found.headers if name.endswith(("↑", "↓"))]
    # The columns that go first where a terminal is narrow; of scores the judge last.
    least = ["share s", "peak memory", "pack s", "train s", "trainable"]
    least += ["names", "path", "peft_type"] if table.get("foreign") else []
    least += sorted(scores[:0:-1], key=lambda name: name.startswith("test"))
    whole(out, shown, least)
    for text in found.notes:
        out.print(text, style="dim", soft_wrap=True)
    theirs = [text for row in table.get("foreign", ()) for text in row["foreign"]["notes"]]
    for text in dict.fromkeys(theirs):
        out.print(f"note: {text}", style="yellow", soft_wrap=True)


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
