"""Data through the command line: what a shell hands over, and what is refused before training."""

import gzip
import json
import os
import subprocess

import pandas
import pytest
import yaml
from conftest import say
from sources import ROOT, write

from lorabench import cli, data
from lorabench.cli.words import with_line_breaks
from lorabench.config import DataConfig, typed
from lorabench.data.references import check_references

PAIRS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(40)]
PLAN = ["data.max_length=40", "trainer=smoke", "tracker=none"]


def refused(*words):
    said = say("plan", *PLAN, *words)
    assert said.code == 2, said.out
    return said.lines[-1]


@pytest.fixture
def odd_files(tmp_path, monkeypatch):
    """The same 40 sums in every form."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", PAIRS)
    (tmp_path / "b.json").write_text(json.dumps(PAIRS, indent=1))
    pandas.DataFrame(PAIRS).to_csv(tmp_path / "c.csv", index=False)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "e.csv").symlink_to("c.csv")
    return tmp_path


def test_every_form_is_read_as_the_same_examples(odd_files, monkeypatch):
    forms = ("a.jsonl", "b.json", "c.csv", "d.jsonl.gz", "e.csv", "*.json", "~/c.csv")
    monkeypatch.setenv("HOME", str(odd_files))
    for form in forms:
        cfg = typed(cli.compose(["data=path", f'data.train.path="{form}"'])[0][0]).data
        splits = data.load(cfg)
        found = [*splits.train, *splits.validation, *splits.test]
        assert sorted((e.prompt, e.completion) for e in found) == sorted(
            (row["prompt"], row["completion"]) for row in PAIRS
        ), form


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("b.json", "line 1 of b.json: Expecting value at its end (and 161 more); correct or remove "
                   "the line; use data=path, which reads .json files"),
        ("c.csv", "Expecting value at 'prompt,completion' (and 40 more); correct or remove the "
                  "line; use data=path, which reads .csv files"),
        (".", "must be an existing file; '.' is a folder; use data=hub for it, or data=path"),
    ],
)  # fmt: skip
def test_jsonl_names_the_reader_of_other_files(odd_files, path, expected):
    assert expected in refused("data=jsonl", f"data.train.path={path}")
    assert not (odd_files / "outputs").exists()


@pytest.mark.parametrize("source", ["jsonl", "path"])
def test_a_pipe_of_the_shell(odd_files, source):
    """As /dev/fd/63, which bash makes of <(zcat pc.jsonl.gz)."""
    readable, writable = os.pipe()
    with open(writable, "wb") as file:
        file.write((odd_files / "a.jsonl").read_bytes())
    try:
        line = refused(f"data={source}", f"data.train.path=/dev/fd/{readable}")
    finally:
        os.close(readable)
    assert f"'/dev/fd/{readable}' is a pipe, and data is read more than once" in line


def test_the_documented_template_makes_a_line_break(tmp_path, monkeypatch):
    """In quotes, neither the shell nor Hydra makes one of \\n. The words are those of the files."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "qa.jsonl", [{"question": f"{i}", "answer": str(i)} for i in range(40)])
    for name in ("jsonl", "path"):
        lines = (ROOT / "conf" / "data" / f"{name}.yaml").read_text().splitlines()
        (line,) = (line for line in lines if "'data.prompt=" in line)
        shell = f"printf '%s\\0' {line.lstrip('# ')}"
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
        words = with_line_breaks(done.stdout.split("\0")[:-1])
        assert len(words) == 2
        words += [f"data={name}", "data.train.path=qa.jsonl"]
        cfg = typed(cli.compose(words)[0][0])
        assert cfg.data.prompt == "Q: {question}\nA:"
        assert data.load(cfg.data).train[0].prompt.count("\n") == 1


def test_main_hands_line_breaks_on():
    said = say(
        "train", "--cfg", "job", "data=path", r'data.prompt="Q: {question}\nA:"',
        r'data.test.completion="{answer}\\n"',
    )  # fmt: skip
    found = yaml.safe_load(said.out)["data"]
    assert found["prompt"] == "Q: {question}\nA:"
    assert found["test"]["completion"] == "{answer}\\n"


def test_line_breaks_in_nothing_else():
    words = [
        r"output_dir=C:\new",
        r"data.answer_pattern=\n(\d+)",
        "-m",
        r'data.answer_stop=["\nQ:"]',
    ]
    assert with_line_breaks(words) == [*words[:3], 'data.answer_stop=["\nQ:"]']


def test_a_pattern_that_matches_no_reference_is_refused_before_training(tmp_path):
    """Every model would score 0 on it."""
    path = write(tmp_path / "a.jsonl", PAIRS)
    words = [
        "train", "trainer=smoke", "tracker=none", "data=path", f"data.train.path={path}",
        "data.max_length=40", "data.metric=[nll,answer]", "data.answer_max_new_tokens=8",
        f"output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    said = say(*words, 'data.answer_pattern="#### ?([0-9]+)"')
    assert said.code == 2
    assert "data.answer_pattern: must match references of validation or test; got" in said.lines[-1]
    assert not (tmp_path / "out").exists()


def test_references_in_part():
    cfg = DataConfig("a", "path", metric=["answer"], answer_pattern=r"#(\d+)")
    references = {"validation": ["no"], "test": ["#1", "no", "#2"]}
    assert [note[:70] for note in check_references(cfg, references)] == [
        "data.validation: data.answer_pattern finds no answer in 1 of 1 referen",
        "data.test: data.answer_pattern finds no answer in 1 of 3 references, s",
    ]
    assert check_references(cfg, {"test": ["#1"]}) == []
    cfg.metric = ["nll"]
    assert check_references(cfg, {"test": ["no"]}) == []
