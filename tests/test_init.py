"""`lorabench init`: what it writes composes, and names the columns that pandas finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from conftest import say

from lorabench import cli, drafts
from lorabench.config import typed
from lorabench.sweep.jobs import distinct

PAIR = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(80)]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
GPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
LONG = "a long answer, " * 5
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "pair": (PAIR, {"prompt": "{prompt}", "completion": "{completion}",
                    "metric": ["nll", "nll_per_token", "exact_match"]}),
    "questions": ([{"id": 1, "Question": "a?", "Answer": LONG}],
                  {"prompt": "{Question}\n", "completion": "{Answer}",
                   "metric": ["nll", "nll_per_token"]}),
    "instructions": ([{"instruction": "say", "input": one, "output": LONG} for one in ("x", "")],
                     {"prompt": "{instruction}[[\n\n{input}]]\n", "completion": "{output}"}),
    "filled": ([{"instruction": "say", "input": "x", "output": "b"}],
               {"prompt": "{instruction}\n\n{input}\n", "completion": "{output}"}),
    "chats": ([{"source": "web", "target": "x", "messages": TURNS}],
              {"format": "messages", "messages": "messages", "chat_template": True}),
    "gpts": ([{"id": 1, "conversations": GPT}],
             {"format": "sharegpt", "messages": "conversations", "chat_template": True}),
    "as_text": ([{"talk": json.dumps(TURNS)}], {"format": "messages", "messages": "talk"}),
    "pages": ([{"url": "http://x", "text": LONG}], {"format": "text", "text": "{text}"}),
    "one": ([{"n": 3, "body": LONG}], {"format": "text", "text": "{body}"}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def config(kind: str, name: str) -> tuple[dict[str, Any], str]:
    text = (Path("conf") / kind / f"{name}.yaml").read_text()
    return yaml.safe_load(text), text


@pytest.mark.parametrize("name", CASES)
def test_what_a_file_is_taken_for(name: str) -> None:
    rows, expected = CASES[name]
    said = say("init", write(f"{name}.jsonl", rows))
    assert said.code == 0, said.err
    content, text = config("data", name)
    assert {key: content.get(key) for key in expected} == expected
    assert (content["name"], content["source"]) == (name, "path")
    assert content["train"] == {"path": f"{name}.jsonl"}
    assert ("format" in content) == ("format" in expected)
    assert text.startswith(f"# {name}.jsonl: jsonl, {len(rows)} row")
    table = pandas.read_json(f"{name}.jsonl", lines=True)
    lines = [line.split() for line in text.splitlines() if line.startswith("#   ")]
    assert [line[1] for line in lines] == list(table.columns)
    for column in table.select_dtypes(["object", "string"]):
        if isinstance(table[column][0], str):
            longest = int(table[column].str.len().max())
            assert f"at most {longest:,} characters" in text
    experiment, _ = config("experiment", name)
    assert experiment["defaults"] == [{"override /data": name}]
    assert said.out.splitlines()[-1] == (
        f"next     lorabench plan -m experiment={name} model=ORG/NAME"
    )


def test_the_command_that_it_names_asks_for_a_sweep_on_the_file() -> None:
    assert say("init", write("my sums.v2.jsonl", PAIR)).code == 0
    composed = cli.compose(["-m", "experiment=my_sums"])
    assert distinct(composed.labels) == [f"lora.r={r} seed={n}" for r in (8, 32) for n in (0, 1, 2)]
    for one in map(typed, composed.configs):
        assert (one.data.train.path, one.sweep) == ("my sums.v2.jsonl", "my_sums")
        assert list(one.presets) == ["conf/data/my_sums.yaml", "conf/experiment/my_sums.yaml"]


@pytest.mark.parametrize("name", CASES)
def test_every_key_that_it_writes_exists(name: str) -> None:
    rows, _ = CASES[name]
    assert say("init", write(f"{name}.jsonl", rows)).code == 0
    said = say("train", "--cfg", "job", f"data={name}")
    assert said.code == 0 and said.err == "", said
    composed = yaml.safe_load(said.out)["data"]
    written, _ = config("data", name)
    written["train"] = composed["train"] | written["train"]
    for split in ("validation", "test"):
        written[split] = composed[split] | written[split]
    assert composed == composed | written


def test_splits_are_as_large_as_they_need_be() -> None:
    say("init", write("few.jsonl", [{"text": "x"}] * 100))
    content, _ = config("data", "few")
    assert content["test_fraction"] == 0.25 and "num_test" not in content
    say("init", write("many.jsonl", [{"text": "x"}] * 30_000))
    content, _ = config("data", "many")
    assert content["test_fraction"] == content["validation_fraction"] == 0.05
    assert (content["num_validation"], content["num_test"]) == (500, 1000)  # of 1,500


def test_nothing_is_overwritten_without_force() -> None:
    file = write("pair.jsonl", PAIR)
    assert say("init", file).code == 0
    mine = Path("conf/data/pair.yaml")
    mine.write_text("mine\n")
    said = say("init", file)
    assert said.code == 2 and said.lines == [
        "--name: must be new; conf/data/pair.yaml and conf/experiment/pair.yaml exist; give --name "
        "or --force"
    ]
    assert mine.read_text() == "mine\n"
    assert say("init", file, "--name", "other").code == 0 and mine.read_text() == "mine\n"
    assert say("init", file, "--force").code == 0 and "name: pair" in mine.read_text()


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("odd.jsonl", [{"a": "x", "b": "y", "n": 1}],
         "FILE: must hold conversations, a prompt and a completion, or texts; got the columns a "
         "(text), b (text), n (number); rename two to prompt and completion, or write templates"),
        ("empty.jsonl", [], "FILE: must have rows; 'empty.jsonl' has none"),
        ("alpaca.jsonl", PAIR, "--name: must be another than those of lorabench's own presets; got "
         "'alpaca', which data has; use --name=alpaca_mine"),
        ("lm_head.jsonl", PAIR, "--name: must be another than those of lorabench's own presets; "),
    ],
)  # fmt: skip
def test_what_it_refuses(name: str, rows: list[dict[str, Any]], message: str) -> None:
    said = say("init", write(name, rows))
    assert said.code == 2 and len(said.lines) == 1 and said.err.startswith(message)
    assert not Path("conf").exists()


def test_files_and_places_that_are_none(place: Path) -> None:
    write("pair.jsonl", PAIR)
    said = say("init", "piar.jsonl")
    assert said.code == 2 and "did you mean 'pair.jsonl'?" in said.err
    Path("bad.jsonl").write_text('{"prompt": "a"\n')
    said = say("init", "bad.jsonl")
    assert said.code == 2 and said.err.startswith("FILE: must hold readable rows; ")
    said = say("init", "pair.jsonl", "--name", "a b")
    assert said.code == 2 and said.err.startswith("--name: must be letters, digits, _ and -; got '")
    Path("conf").write_text("")
    said = say("init", "pair.jsonl")
    assert said.code == 2 and said.err.startswith("conf: must be a folder to write to; 'conf' is a")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("train.jsonl.gz", "train"),
        ("data/my data (2).csv", "my_data_2"),
        ("2024.parquet", "data_2024"),
        ("null.jsonl", "data_null"),
        ("data/*.jsonl", "data"),
        ("данные.jsonl", "data"),
        ("a.b.jsonl", "a"),
    ],
)
def test_names_are_names_to_hydra(path: str, name: str) -> None:
    assert drafts.name_of(path) == name == drafts.name_of(name)


def test_it_plans_and_no_path_is_an_interpolation(place: Path) -> None:
    """With the embedded base in place of one of the hub."""
    odd = place / "${seed} \"x\" 'y' #"
    odd.mkdir()
    file = write(str(odd / "pair.jsonl"), PAIR)
    assert say("init", file).code == 0
    said = say("plan", "data=pair", "tracker=none", "data.max_length=24", "--json")
    assert said.code == 0, said
