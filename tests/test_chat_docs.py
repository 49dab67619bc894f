"""The examples of docs/chat-data.md: its rows are read and rendered, its command lines run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from chats import CHATML, example, settings, tokenizer, trained_texts
from conftest import say
from tiny import tiny_config

from lorabench import data

TEXT = (Path(__file__).parent.parent / "docs" / "chat-data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```json (\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
ROWS = [(format, line) for format, block in BLOCKS for line in block.splitlines()]
SHELL = "\n".join(re.findall(r"^```sh\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)).split("\n")
SHELL = [line for line in SHELL if line]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with Qwen's special tokens and template."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "my-model"
    # Its tool calls need a template that has a place for them.
    own = tokenizer("qwen", data.chat.given_text("qwen"))
    shape = tiny_config("llama", len(own))
    shape.max_position_embeddings = 1024
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


@pytest.fixture
def files_of_a_reader(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the page's lines name, in the folder the reader works in."""
    monkeypatch.chdir(tmp_path)
    Path("my-model").symlink_to(model)
    rows = [json.loads(line) for format, line in ROWS if format == "messages"]
    for number in range(30):
        turns = [{"role": "user", "content": f"{number}?"}]
        rows.append({"messages": [*turns, {"role": "assistant", "content": str(number)}]})
    Path("chat.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    Path("mine.jinja").write_text(CHATML, encoding="utf-8")


def test_there_are_rows_and_lines_to_try() -> None:
    assert {format for format, _ in ROWS} == {"messages", "sharegpt"} and len(ROWS) >= 7
    assert len(SHELL) >= 6 and all(line.startswith("lorabench ") for line in SHELL)
    assert TEXT.count("```") == 2 * (len(re.findall(r"^```(?:json|sh|text)", TEXT, re.MULTILINE)))


@pytest.mark.parametrize(("format", "line"), ROWS)
def test_a_row_is_read_and_trained_on(format: str, line: str) -> None:
    cfg = settings(format=format, chat_template="qwen")
    row = json.loads(line)
    tokens = data.tokenise([example(row, cfg)], tokenizer("qwen"), cfg)
    texts = trained_texts(tokens, tokenizer("qwen"))
    assert texts and all(text.endswith("<|im_end|>") for text in texts)
    assert '"train": false' not in line or texts == ["No: 4.<|im_end|>"]


@pytest.mark.usefixtures("files_of_a_reader")
@pytest.mark.parametrize(
    "line",
    [pytest.param(x, marks=[pytest.mark.slow] if x.split()[1] == "train" else []) for x in SHELL],
)
def test_a_command_line_runs(line: str) -> None:
    words = [*shlex.split(line)[1:], "trainer=smoke", "trainer.num_threads=1", "tracker=none"]
    if "mine.jinja" in line:  # it has no place for tool calls, which the page says is refused
        said = say(*words)
        assert said.code == 2 and "the template does not write its tool calls" in said.lines[0]
        rows = Path("chat.jsonl").read_text(encoding="utf-8").splitlines()
        kept = [row for row in rows if "tool_calls" not in row]
        Path("chat.jsonl").write_text("\n".join(kept), encoding="utf-8")
    said = say(*words)
    assert said.code == 0, said.err


@pytest.mark.usefixtures("files_of_a_reader")
def test_the_mistake_is_told_as_shown() -> None:
    line, answer = re.findall(r"^\$ lorabench (.*)\n(.*)$", TEXT, re.MULTILINE)[0]
    said = say(*shlex.split(line))
    assert said.code == 2 and said.err.strip() == answer.replace("FOLDER", str(Path.cwd()))
