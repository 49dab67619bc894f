"""What `lorabench generate` prints: whole answers in eighty columns; a terminal obeys none."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import composed
from rich.console import Console

from lorabench import generation
from lorabench.cli.generating import Chosen
from lorabench.export.source import Run
from lorabench.show import generated


def test_eighty_columns_hold_labels_and_whole_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where rich cuts a long word, or a label leaves no room for the answer."""
    config = composed()
    settings = [
        {"target_modules.names": ["q_proj", "k_proj", "v_proj"], "lora.r": 16, "head.policy": p}
        for p in ("exclude", "lora")
    ]
    record = [
        SimpleNamespace(run_id=str(i), status=s) for i, s in enumerate(("finished", "stopped"))
    ]
    labels = {
        Path(one.run_id): Chosen(Run(Path(one.run_id), one, config), setting, 10)  # type: ignore[arg-type]
        for one, setting in zip(record, settings, strict=True)
    }
    texts = ["w" * 300, "several\nlines [bold]of[/bold] text " * 9, ""]
    answers = [generation.Answer(text, 7, "length" if text else "eos") for text in texts]
    group = generation.Group([one.run for one in labels.values()])
    written = generation.Written(group, [answers[0]], [[answers[1]], [answers[2]]])
    shown = io.StringIO()
    terminal = Console(
        file=shown, width=80, force_terminal=True, no_color=True, markup=False, highlight=False
    )
    monkeypatch.setattr(generated, "console", lambda: terminal)
    generated.answers(["p" * 200], [written], labels, False)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    columns = [line.split("│")[1:3] for line in lines if line.startswith("│")]
    left, right = ("".join("".join(column).split()) for column in zip(*columns, strict=True))
    assert right == "".join(
        "".join(f"{text}[cut after 7 tokens]" for text in texts[:2]).split()
    ) + ("(nothing)")
    assert left == (
        "tiny-gemma,untrained" + "names=q_proj,k_proj,v_projr=16head=excludeseed=10"
        "names=q_proj,k_proj,v_projr=16head=loraseed=10(stopped)"
    )


@pytest.mark.parametrize(
    ("text", "encoding", "shown"),
    [
        ("a\x1b[2Jb\x07\r", "utf-8", r"a\x1b[2Jb\x07\r"),
        ("tab\tand\nline", "utf-8", "tab\tand\nline"),
        ("naïve ✓ 日本", "utf-8", "naïve ✓ 日本"),
        ("naïve ✓", "ascii", r"na\xefve \u2713"),
        ("\x9b31m", "utf-8", r"\x9b31m"),
    ],
)
def test_a_terminal_obeys_no_answer(text: str, encoding: str, shown: str) -> None:
    assert generated.visible(text, encoding) == shown
