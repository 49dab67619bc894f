"""The README's command lines, as typed: each plans what it says, or is refused as it says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import Said, say

from lorabench import model as base_model
from lorabench.cli import VERBS
from lorabench.cli.words import conf_folder

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"^```sh\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))
LINES = [line for line in SHELL.splitlines() if line.startswith("lorabench ")]
COMPOSE = {"train", "plan", "fetch"}  # verbs that take KEY=VALUE; the others serve a folder
INLINE = re.findall(r"`(lorabench (?:train|plan) [^`]+)`", TEXT.replace("\n", " "))
PLANNED = [
    line
    for line in LINES + INLINE
    if line.split()[1] in ("train", "plan") and "--cfg" not in line and "--smoke" not in line
]
NEEDS_THE_HUB = ("metamathqa", "gemma-2b", "bert-base")


@pytest.fixture(autouse=True)
def files_of_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the README's lines name, in the folder the reader works in."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n} is", "completion": ("even", "odd")[n % 2]} for n in range(40)]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"question": f"{n}+1?", "answer": str(n + 1)} for n in range(40)]
    Path("qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cells = [f"{row['question']},{row['answer']}\n" for row in rows]
    Path("qa.csv").write_text("".join(["question,answer\n", *cells]))
    shutil.copytree(base_model.ZOO / "tiny-gemma", "my-model")


def typed(line: str, *more: str) -> Said:
    words = shlex.split(line, comments=True)[1:]
    words = [word.replace("/data/my-model", "my-model") for word in words]
    return say(*words, *more)


def test_there_are_lines_to_try() -> None:
    assert len(PLANNED) > 10 and len(INLINE) > 0


@pytest.mark.slow
@pytest.mark.parametrize("line", PLANNED)
def test_a_line_plans(line: str) -> None:
    line = line.replace("lorabench train", "lorabench plan")
    if "/ID" in line:
        fast = ["data.num_train=16", "data.num_validation=2", "data.num_test=2", "trainer.steps=2"]
        assert say("train", "tracker=none", *fast).code == 0
        (run,) = Path("outputs/default").glob("*/record.json")
        line = line.replace("/ID", f"/{run.parent.name}")
    said = typed(line, "--json")
    if any(name in line for name in NEEDS_THE_HUB):
        assert said.code == 2 and "cannot be had from the hub" in said.out
        return
    assert said.code == 0, said.err
    runs = json.loads(said.out)["runs"]
    grid = re.findall(r"[\w.]+=(\w+(?:,\w+)+)", line)
    for values in grid:
        assert len(runs) % len(values.split(",")) == 0
    assert len(runs) > 1 if grid else runs


def test_examples_of_real_models_have_real_data() -> None:
    """Fails for a line that would train a real model on embedded toy data, or names no model."""
    conf = Path(conf_folder())
    read = {path.stem: yaml.safe_load(path.read_text()) for path in (conf / "data").glob("*.yaml")}
    toys = {name for name, content in read.items() if content["source"] == "skills"}
    real = []
    for line in [one for one in LINES + INLINE if one.split()[1] in COMPOSE]:
        words = dict(re.findall(r"([\w.]+)=(\S+)", line))
        for name in words.get("model", "tiny-gemma").split(","):
            preset = conf / "model" / f"{name}.yaml"
            embedded = preset.is_file() and "lorabench:" in preset.read_text()
            if embedded and "model.path" not in words:
                continue
            real.append(line)
            is_place = name == "local" or "/" in name
            assert not embedded and (preset.is_file() or is_place), line
            assert words.get("data", "skills") in {*read} - toys, line
    assert len(real) > 2


def test_lines_serve_a_folder() -> None:
    """Fails where a verb that works on runs refuses the words that the README gives it."""
    fast = ["data.num_train=16", "data.num_validation=2", "data.num_test=2", "trainer.steps=2"]
    assert say("train", "tracker=none", "lora.r=2", *fast).code == 0
    (run,) = Path("outputs/default").glob("*/record.json")
    lines = [line for line in LINES if line.split()[1] not in COMPOSE]
    assert {line.split()[1] for line in lines} == {*VERBS} - COMPOSE
    for line in lines:
        said = typed(re.sub(r"/ID2?\b", f"/{run.parent.name}", line))
        assert said.code == 0, (line, said.err)


def test_the_mistake_is_told_as_shown() -> None:
    line, answer = re.findall(r"^\$ (lorabench .*)\n(.*)$", TEXT, re.MULTILINE)[0]
    said = typed(line)
    assert said.code == 2 and said.err.strip() == answer


def test_every_key_is_printed() -> None:
    (line,) = [one for one in LINES if "--cfg" in one]
    said = typed(line)
    assert said.code == 0 and "lora_dropout" in said.out


def test_a_template_without_quotes_says_how_to_quote_it() -> None:
    said = say("plan", "data=jsonl", "data.train.path=qa.jsonl", "data.prompt=Q: {question} A:")
    assert said.code == 2 and len(said.lines) == 1
    remedy = re.search(r"'(data\.prompt=.*)'$", said.lines[0])
    assert remedy
    more = ("data.completion='{answer}'", "data.max_length=64", "--json")
    planned = say("plan", "data=jsonl", "data.train.path=qa.jsonl", remedy[1], *more)
    assert planned.code == 0, planned.err


def test_positions_that_are_too_few_name_the_number() -> None:
    said = say("plan", "data=jsonl", "data.train.path=train.jsonl")
    assert said.code == 2 and said.lines[0].endswith("set data.max_length=64 or less")


@pytest.mark.parametrize(
    "page", ["README.md", "docs/design.md", "docs/record-format.md", "docs/chat-data.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    """Fails for a file or a heading that is no longer there."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        place, _, heading = link.partition("#")
        if link.startswith("http"):
            continue
        target = (ROOT / page).parent / place if place else ROOT / page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {_anchor(one) for one in headings}, link


def _anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_design_names_every_room() -> None:
    """Fails for a room without a row, and for a row or a path whose file is gone."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`lorabench/(\w+(?:\.py|/))`", text))
    there = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "lorabench").iterdir()
        if not path.name.startswith("_") and (path.is_dir() or path.suffix == ".py")
    }
    assert named == there
    for path in re.findall(r"`((?:lorabench|hydra_plugins|conf)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
