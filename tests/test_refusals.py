"""Refusals for programs: exit codes, and with --json the key, law, value and remedy of each."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOKE, say

import lorabench
from lorabench.config import split_refusal

PARTS = ["key", "law", "got", "remedy", "runs"]


def refused(*words: Any) -> list[dict[str, Any]]:
    """The refusals of a command with --json: on stdout, and nothing else anywhere."""
    said = say(*words, "--json")
    assert said.code == 2 and said.err == ""
    (name, errors), *rest = json.loads(said.out).items()
    assert name == "errors" and errors and not rest
    for one in errors:
        assert list(one) == PARTS and one["key"] and one["law"]
    said = say(*words)
    assert len(said.lines) == len(errors) and said.out == ""
    for line, one in zip(said.lines, errors, strict=True):
        assert line.startswith(f"{one['key']}: {one['law']}")
        assert (one["got"] or "") in line and (one["remedy"] or "") in line
    return errors


def test_a_value_out_of_its_range(no_model: None) -> None:
    assert refused("plan", *SMOKE, "lora.r=0", "head=exlude") == [
        {
            "key": "head",
            "law": "must be one of exclude, full, lora",
            "got": "'exlude' (did you mean 'exclude'?)",
            "remedy": None,
            "runs": [],
        }
    ], "what Hydra refuses comes alone: nothing is composed"
    (one,) = refused("plan", *SMOKE, "lora.r=0")
    assert one == {
        "key": "lora.r", "law": "must be at least 1", "got": "0", "remedy": None,
        "runs": [f"{' '.join(SMOKE)} lora.r=0"],
    }  # fmt: skip


def test_every_run_that_an_error_is_about_is_named(no_model: None) -> None:
    grid = ["lora.r=0,8", "lora.lora_dropout=0,1", "trainer.lr=-1"]
    errors = {one["key"]: one for one in refused("plan", "-m", *SMOKE, *grid)}
    assert {key: len(one["runs"]) for key, one in errors.items()} == {
        "lora.r": 2, "lora.lora_dropout": 2, "trainer.lr": 4,
    }  # fmt: skip
    assert errors["lora.r"]["runs"] == [
        "lora.r=0 lora.lora_dropout=0",
        "lora.r=0 lora.lora_dropout=1",
    ]


def test_what_planning_finds_has_a_remedy() -> None:
    (one,) = refused("plan", *SMOKE, "data.max_length=100000")
    assert one["key"] == "data.max_length" and one["got"] == "100000"
    assert re.fullmatch(r"set data.max_length=\d+ or less", one["remedy"])


@pytest.mark.parametrize("verb", ["runs", "compare"])
def test_a_folder_that_is_none(verb: str, tmp_path: Path) -> None:
    (one,) = refused(verb, tmp_path)
    assert one["key"] == "folder" and str(tmp_path) in one["got"]
    assert one["remedy"] == "`lorabench train` makes them"
    (one,) = refused(verb, tmp_path / "nothing")
    assert one["key"] == "folder" and "does not exist" in one["got"]


def test_an_export(tmp_path: Path) -> None:
    keys = [one["key"] for one in refused("export", tmp_path, "--to", "adapter", "--dtype", "x")]
    assert keys == ["--dtype", "PATH"]
    (one,) = refused("export", tmp_path, "--to", "adapter", tmp_path / "new")
    assert one["key"] == "RUN"


@pytest.mark.parametrize(
    "words", [["runs"], ["compare", "a", "--nosuch"], ["export", "--to"], ["runs", "a", "--nosuch"]]
)
def test_words_that_argparse_refuses(words: list[str]) -> None:
    (one,) = refused(*words)
    assert one["key"] == f"lorabench {words[0]}"
    assert one["law"].startswith(f"must be used as 'lorabench {words[0]} ")
    assert one["remedy"] == f"`lorabench {words[0]} --help` explains"


def test_a_verb_that_is_none_and_a_flag() -> None:
    (one,) = refused("tarin")
    assert one["key"] == "lorabench" and one["got"] == "'tarin' (did you mean 'train'?)"
    (one,) = refused("plan", "--cfg", "job", "-m")
    assert one["got"] == "--cfg and --multirun"


def test_a_defect_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorabench import sweep

    def broken(*_: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(sweep, "plan_jobs", broken)
    (one,) = refused("plan", *SMOKE)
    assert one["got"] == "KeyError: 'surprise'" and "a defect of lorabench" in one["remedy"]


# --- the form of every refusal ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("lora.r: must be at least 1; got 0", ("lora.r", "must be at least 1", "0", None)),
        ("a: law; got 'x; y: z'; use b; or c", ("a", "law", "'x; y: z'", "use b; or c")),
        ("a: torch's law; got it's; use b", ("a", "torch's law", "it's", "use b")),
        ("a: law; 'x' is a file; give another", ("a", "law", "'x' is a file", "give another")),
        ("a: law; use b", ("a", "law", None, "use b")),
        ("a: law; and more; got x; use b", ("a", "law; and more", "x", "use b")),
        ('a: law; got "x\'; y"; use b', ("a", "law", '"x\'; y"', "use b")),
        ("a: law", ("a", "law", None, None)),
        ("no form at all", ("no form at all", "no form at all", None, None)),
        ("a: '", ("a", "'", None, None)),
    ],
)
def test_a_refusal_is_split_into_its_parts(line: str, parts: tuple[str | None, ...]) -> None:
    assert tuple(split_refusal(line).values()) == parts


def text(node: ast.expr) -> str:
    """What a string expression writes; what is computed stands in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text, node.values))
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    if isinstance(node, ast.IfExp):
        return text(node.body)
    return "{}"


# Raised and caught in one function: they become part of another sentence.
REASONS = ("{} lies on the hub", "the data has changed since")


def templates() -> dict[str, str]:
    """Every refusal that is written in the package: where it is -> its text.

    A refusal is what is given to ConfigErrors, or a text `key: ... must ...`.
    """
    found = {}
    for path in sorted(Path(lorabench.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ConfigErrors"):
                nodes = node.args[:1]
            else:
                nodes = [node] if isinstance(node, ast.JoinedStr | ast.BinOp) else []
            for one in nodes:
                if isinstance(one, ast.GeneratorExp):
                    one = one.elt
                if not isinstance(one, ast.JoinedStr | ast.BinOp | ast.Constant):
                    continue
                written = text(one)
                is_law = re.match(r"[\w.{}\[\]-]+: .*\bmust\b.*[^ ']$", written, re.DOTALL)
                if (is_law or isinstance(node, ast.Call)) and written not in REASONS:
                    found[f"{path.name}:{one.lineno}"] = written
    return found


def test_every_refusal_in_the_code_has_the_form() -> None:
    written = templates()
    assert len(written) > 80, "the walk finds them"
    wrong = {}
    for place, line in written.items():
        parts = split_refusal(line)
        later = parts["remedy"] or ""
        if not re.match(r"[\w.{}\[\]-][\w.{}\[\] -]*: .", line) or not parts["law"]:
            wrong[place] = f"no key or no law: {line}"
        elif re.match(r"(got|it|'\{\}'|\{\}) ", later):
            wrong[place] = f"a remedy that says what came: {line}"
        elif parts["got"] and re.match(r"(use|set|give|put|leave|correct|run|repeat|raise|save) ",
                                       parts["got"]):  # fmt: skip
            wrong[place] = f"what came is a remedy: {line}"
    assert not wrong


# --- exit codes ------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["plan", "--help"]])
def test_the_exit_codes_are_in_the_help(words: list[str]) -> None:
    said = say(*words)
    assert said.code == 0
    assert re.search(r"exit codes?:?\s+0:? ", said.out, re.IGNORECASE)
    assert all(f" {code}" in said.out for code in ("0", "1", "2"))
