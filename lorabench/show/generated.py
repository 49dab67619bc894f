"""Answers side by side: one table per prompt, one row per model."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lorabench.compare.tables import short_keys
from lorabench.show.results import columns_of
from lorabench.show.text import console, dump, setting

if TYPE_CHECKING:
    from lorabench.generation import Answer, Written

LABEL_WIDTH = 26  # columns; a label that is longer is wrapped


def answers(
    prompts: Sequence[str], written: Sequence[Written], labels: Mapping[Path, Any], as_json: bool
) -> None:
    """Show what the base and every run answer to each prompt.

    Args:
        labels: by folder of a run, its `setting` and `seed`.
    """
    if as_json:
        dump({
            "prompts": [
                {"prompt": prompt, "answers": [_content(*one) for one in _rows(i, written, labels)]}
                for i, prompt in enumerate(prompts)
            ],
            "damaged": {run: why for one in written for run, why in one.damaged.items()},
        })  # fmt: skip
        return
    out = console()
    settings = [one.setting for one in labels.values()]
    keys = columns_of({"varied": list(settings[0]), "runs": [{"setting": s} for s in settings]})
    for i, prompt in enumerate(prompts):
        if i:
            out.print()
        out.print(Text(visible(prompt, out.encoding), "bold"))
        table = Table(show_header=False, show_lines=True)
        table.add_column("model", max_width=LABEL_WIDTH, overflow="fold")
        table.add_column("answer", overflow="fold")
        for group, label, answer, _ in _rows(i, written, labels):
            table.add_row(
                Text(_label(group, label, keys), "" if label else "dim"),
                _text(answer, out.encoding),
            )
        out.print(table)


def _rows(i: int, written: Sequence[Written], labels: Mapping[Path, Any]) -> list[tuple]:
    """The group, label (None: the base), answer and folder of each row of a prompt."""
    rows: list[tuple] = []
    for one in written:
        rows.append((one.group, None, one.base[i], None))
        for run, texts in zip(one.group.runs, one.runs, strict=True):
            if texts is not None:
                rows.append((one.group, labels[run.folder], texts[i], run.folder))
    return rows


def _content(group: Any, label: Any, answer: Answer, folder: Path | None) -> dict[str, Any]:
    return {
        "model": group.label,
        "run_id": None if label is None else label.run.entry.run_id,
        "folder": None if folder is None else str(folder),
        "setting": None if label is None else label.setting,
        "seed": None if label is None else label.seed,
        **dataclasses.asdict(answer),
    }


def _label(group: Any, label: Any, keys: list[str]) -> str:
    """What tells a row from the others.

    Args:
        keys: in which the runs differ.
    """
    if label is None:
        return f"{group.label}, untrained"
    names = zip(short_keys(keys), keys, strict=True)
    words = [f"{name}={setting(label.setting[key])}" for name, key in names]
    words = [*(words or [label.run.entry.run_id]), f"seed={label.seed}"]
    if label.run.entry.status == "stopped":
        words.append("(stopped)")
    return " ".join(words)


def _text(answer: Answer, encoding: str) -> Text:
    found = Text(visible(answer.text, encoding) or "")
    if not answer.text.strip():
        found = Text("(nothing)", "dim")
    if answer.ended == "length":
        found.append(f" [cut after {answer.num_tokens} tokens]", "dim")
    return found


def visible(text: str, encoding: str) -> str:
    """Escape what a terminal would obey, or cannot show: models write whatever they like."""
    safe = "".join(
        one if one in "\n\t" or unicodedata.category(one) != "Cc" else repr(one)[1:-1]
        for one in text
    )
    return safe.encode(encoding, "backslashreplace").decode(encoding)
