"""Folders whose config.json, weights and tokenizer do not fit together are refused by the plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import records, say

WORDS = ["tracker=none", "trainer=smoke", "trainer.steps=1", "lora.r=2", "data.max_length=64"]


@pytest.fixture
def base(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be broken."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "m"))


def edit(base: Path, name: str = "config.json", **entries: Any) -> None:
    path = base / name
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refused(base: Path, jsonl: Path, verb: str = "plan") -> str:
    said = say(verb, f"model={base}", "data=jsonl", f"data.train.path={jsonl}", *WORDS)
    assert said.code == 2 and len(said.lines) == 1, said.err
    assert said.err.startswith("model.path: ") and f"'{base}'" in said.err
    return said.err


def test_quantised_weights(base: Path, jsonl: Path) -> None:
    edit(base, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    assert "must not be quantised; " in (line := refused(base, jsonl))
    assert "has quantization_config (gptq) in config.json; use the checkpoint it was made" in line


def test_weights_of_another_shape(base: Path, jsonl: Path) -> None:
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    edit(base, vocab_size=160)
    line = refused(base, jsonl)
    assert f" [{vocabulary}, 32] instead of [160, 32] and 1 more; correct config.json" in line


def test_more_tokens_than_embeddings(base: Path, jsonl: Path) -> None:
    """Only if the data hold one: tokenizers of published models have tokens to spare."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(base)
    assert say("plan", f"model={base}", "data=jsonl", f"data.train.path={jsonl}", *WORDS).code == 0
    jsonl.write_text(jsonl.read_text().replace(' = "', '<think>="'))
    line = refused(base, jsonl)
    assert f"has {rows + 2} tokens, the base {rows} embeddings, and the data hold token" in line
    assert f"{rows} ('<think>')" in line


def test_no_tokenizer(base: Path, jsonl: Path) -> None:
    for file in base.glob("*token*"):
        file.unlink()
    assert "must hold a tokenizer (tokenizer.json, " in refused(base, jsonl, "train")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        # transformers builds an empty tokenizer of the first class, and none of the second.
        ("GemmaTokenizer", "makes everything <unk>; put the files of its tokenizer"),
        ("TokenizersBackend", "must come with its tokenizer's vocabulary; "),
    ],
)
def test_a_tokenizer_without_its_vocabulary(
    kind: str, told: str, base: Path, jsonl: Path, tmp_path: Path
) -> None:
    (base / "tokenizer.json").unlink()
    edit(base, "tokenizer_config.json", tokenizer_class=kind)
    assert told in refused(base, jsonl)


def test_a_home_in_every_path(
    base: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quoted, as a file of configs and zsh hand it over; no folder named ~ is made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.chdir(place)
    paths = ["model.path='~/m'", f"data.train.path='~/{jsonl.name}'", "output_dir='~/outs'"]
    said = say("train", "model=local", "data=jsonl", *paths, *WORDS)
    assert said.code == 0, said.err
    (record,) = records(tmp_path / "outs").values()
    assert record["config"]["model"]["path"] == str(base)
    assert record["config"]["output_dir"] == str(tmp_path / "outs")
    assert (tmp_path / "outs/default" / record["run_id"] / ".hydra/config.yaml").is_file()
    assert not any(place.iterdir())
    paths[2] = "output_dir=~/outs"
    assert say("train", "model=local", "data=jsonl", *paths, *WORDS).code == 0
