"""Everything a page shows, from the runs of one or more sweep folders."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench import masking
from lorabench.provenance import stack
from lorabench.report import changes, plots, scores, style, tables, texts
from lorabench.sweep import SweepFolder

if TYPE_CHECKING:
    from lorabench.compare import Answers
    from lorabench.intact import Checked

MOST_COMMANDS = 20
MOST_SHOWN = 12  # values of one fact


@dataclass(frozen=True)
class Content:
    """What a page is made of.

    Args:
        name: of the sweeps.
        statuses: how many runs have each.
        answers: verdicts on the runs.
        table: `compare.table` of the runs, with lints and bases.
        settings, runs: tables.
        groups: figures.
        examples: what the view of examples is made from; empty: there is none.
        facts: what the runs have in common and where they differ, (what, values).
        commands: (what it does, command).
        left_out: what the page does not show, one text each.
        made: when, UTC.
        remarks: what was told when the runs were read.
    """

    name: str
    statuses: dict[str, int]
    answers: Answers
    table: dict[str, Any]
    settings: tables.Table
    runs: tables.Table
    groups: list[style.Group]
    examples: dict[str, Any]
    facts: list[tuple[str, list[str]]]
    commands: list[tuple[str, str]]
    made: str
    remarks: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def content_of(
    folders: Sequence[Path],
    sweeps: Sequence[Path],
    found: Sequence[Checked],
    table: dict[str, Any],
    answers: Answers,
    words: Sequence[str],
    remarks: Sequence[str] = (),
) -> Content:
    """Gather what the page of these sweeps shows.

    Args:
        sweeps: folders that hold runs.
        table: `compare.table` of the runs, with lints and bases.
        words: the command that asks for the page.
        remarks: what was told when they were read.
    """
    from lorabench.record import now

    runs = [(one.folder, one.entry) for one in found]
    left_out: list[str] = []
    return Content(
        ", ".join(dict.fromkeys(folder.resolve().name for folder in folders)),
        dict(Counter(one.entry.status for one in found)),
        answers,
        table,
        tables.settings_of(table, answers),
        tables.runs_table(found, table, answers),
        plots.groups_of(runs, table, answers),
        _examples(runs, table, answers, left_out),
        _facts(found),
        masking.mask(_commands(sweeps, found, words)),
        now(),
        masking.mask(list(dict.fromkeys(remarks))),
        left_out,
    )


def _examples(
    runs: Sequence[tuple[Path, Any]], table: dict[str, Any], answers: Answers, left_out: list[str]
) -> dict[str, Any]:
    """The view of examples, as the page's script reads it."""
    rows = table["rows"]
    found = changes.changes_of(runs, [row["runs"] for row in rows], answers.metric)
    if found is None:
        return {}
    finished = [one for _, one in runs if one.status == "finished"]
    known, why = texts.texts_of(finished, set(found.examples))
    if why:
        left_out.append(why)
    if found.left_out:
        left_out.append(
            f"{found.left_out} of {found.num_examples} test examples are not in the view of "
            f"examples, which holds those that settings differ on most"
        )
    labels = [style.label_of(row["setting"], table) for row in rows]
    first, second = _pair(rows, answers)
    return {
        "metric": found.metric,
        "isRight": found.is_right,
        "higher": found.higher_is_better,
        "settings": labels,
        "seeds": found.seeds,
        "scores": [[changes.number(value) for value in own] for own in found.scores],
        "own": [[changes.number(value) for value in one] for one in found.own],
        "gained": found.gained.tolist(),
        "both": found.both.tolist(),
        "seed": found.seed,
        "written": found.written.tolist(),
        "texts": found.texts,
        "by": found.written_by,
        "examples": [[id, *known.get(id, ("", ""))] for id in found.examples],
        "first": first,
        "second": second,
    }


def _pair(rows: Sequence[dict[str, Any]], answers: Answers) -> tuple[int, int]:
    """Settings that are shown first: those of the first question that was found."""
    places = {run: i for i, row in enumerate(rows) for run in row["runs"]}
    asked = scores.asked_about(rows, answers)
    for one in answers.verdicts:
        if one.outcome == "found" and not one.question.averaged:
            # Of the settings that one was chosen from, the one that was.
            sides = [
                [i for run in answers.runs[setting] if (i := places.get(run)) in asked]
                for setting in one.question.pairs[0]
            ]
            if all(sides):
                first, second = (side[0] for side in sides)
                worse_first = one.better == one.question.levels[1]
                return (first, second) if worse_first else (second, first)  # type: ignore[return-value]
    return 0, min(1, len(rows) - 1)


def _facts(found: Sequence[Checked]) -> list[tuple[str, list[str]]]:
    """What the runs were made with, each value once."""
    collected: dict[str, Counter[str]] = {}

    def add(what: str, value: Any) -> None:
        if value not in (None, "", {}, []):
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            collected.setdefault(what, Counter())[changes.shortened(text)] += 1

    for one in found:
        entry = one.entry
        made = entry.provenance
        if entry.status == "planned" or not made:
            continue
        add("base", f"{entry.plan.get('model', '')} {made.get('hub') or ''}".strip())
        add("revision of the base", made.get("revision"))
        for name in ("base", "train", "train_tokens"):
            add(f"hash of {'the base' if name == 'base' else name}", entry.hashes.get(name))
        git = made.get("git") or {}
        dirty = " with changes that are not committed" if git.get("dirty") else ""
        add("commit of lorabench", f"{git['commit']}{dirty}" if git.get("commit") else None)
        add("arithmetic version", str(entry.arithmetic_version))
        add("python", made.get("python"))
        for name, version in (made.get("packages") or {}).items():
            add(name, version)
        for name in ("os", "cpu", "cpu_count", "device", "gpu", "cuda", "driver", "threads"):
            add(name, made.get(name))
        add("determinism", made.get("determinism"))
    total = sum(1 for one in found if one.entry.provenance)
    return [
        (
            what,
            [
                value if count == total else f"{value} ({count} of {total} runs)"
                for value, count in values.most_common(MOST_SHOWN)
            ]
            + ([f"and {len(values) - MOST_SHOWN} more"] if len(values) > MOST_SHOWN else []),
        )
        for what, values in collected.items()
    ]


def without(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """A command's words without these options and their values."""
    return [
        word
        for before, word in zip(["", *words], words, strict=False)
        if word.partition("=")[0] not in options and before not in options
    ]


def _commands(
    folders: Sequence[Path], found: Sequence[Checked], words: Sequence[str]
) -> list[tuple[str, str]]:
    """What made the sweep, and what repeats or continues it."""
    lines = []
    for folder in folders:
        commands = SweepFolder(folder).read().commands
        lines += [
            (
                f"asked for {len(one.runs)} runs on {one.started}",
                shlex.join(["lorabench", *one.words]),
            )
            for one in commands[-MOST_COMMANDS:]
        ]
    first = next((one for one in found if one.entry.status == "finished"), None)
    if first is not None:
        lines.append(
            (
                "trains a run again from its record and says whether it is the same",
                shlex.join(["lorabench", "replay", str(first.folder), "--verify"]),
            )
        )
    asked = without(words[1:], ("--out", "--png"))
    if len({json.dumps(stack(one.entry.provenance), default=str) for one in found}) > 1 and first:
        lines.append(("says what differs between two runs", "lorabench diff RUN RUN"))
    lines += [
        ("the sentences and the table", shlex.join(["lorabench", "compare", *asked])),
        ("this page", shlex.join(["lorabench", *words])),
    ]
    return lines
