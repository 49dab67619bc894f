"""`model=ORG/NAME` and `model=FOLDER`: what `model=local model.path=...` means, in fewer words."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import composed, records, say

import hydra_plugins.lorabench_launcher.model_source as source
from lorabench import cli
from lorabench.cli.words import refuse_values
from lorabench.config import ConfigErrors


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with folders of models, one named as a preset is; `~` is above it."""
    place = tmp_path / "here"
    for name in ("m", "gpt2", "a b"):
        (place / name).mkdir(parents=True)
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(tmp_path))
    return place


def test_a_model_without_a_preset_is_local_with_a_path(folder: Path) -> None:
    same = composed("model=local", "model.path=org/name", "model.revision=abc")
    assert composed("model=org/name", "model.revision=abc") == same


WORDS = {
    "m": "m",
    "~/here/m": "{home}/here/m",
    "'~/here/m'": "{home}/here/m",
    "'a b'": "a b",
    # Hydra would find conf/model/./gpt2.yaml and conf/model/../train.yaml
    "./gpt2": "{home}/here/gpt2",
    "../train": "{home}/train",
    "{home}/here/m": "{home}/here/m",
    "gpt2": "openai-community/gpt2",  # a preset comes before a folder of its name
}


def test_ways_to_write_a_folder(folder: Path) -> None:
    home = str(folder.parent)
    words = ",".join(word.replace("{home}", home) for word in WORDS)
    found = cli.compose(["-m", f"model={words}"]).configs
    assert [one.model.path for one in found] == [p.replace("{home}", home) for p in WORDS.values()]


def test_models_of_a_sweep_in_the_same_words_as_labels(folder: Path) -> None:
    found = cli.compose(["-m", "model=gemma-2b,org/name,~/here/m", "seed=0"])
    assert [one.model.path for one in found.configs] == [
        "google/gemma-2b", "org/name", f"{folder}/m"
    ]  # fmt: skip
    assert found.labels == [
        f"model={name} seed=0" for name in ("gemma-2b", "org/name", f"{folder}/m")
    ]


def test_an_experiment_can_name_a_model(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: org/name\n"
    )
    words = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]
    assert composed(*words).model.path == "org/name"


MISTAKES = {
    "gemma-2c": "'gemma-2c' (did you mean 'gemma-2b'?)",
    "./nowhere": "a hub id ORG/NAME or a folder; got '{here}/nowhere', which is none",
    "/no/such/folder": "got '/no/such/folder', which is none",
    "a/b/c": "got 'a/b/c', which is none",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_what_is_neither_is_refused(word: str, folder: Path) -> None:
    said = say("train" if word.startswith("/") else "plan", f"model={word}")
    assert said.code == 2 and len(said.lines) == 1, said.err
    assert said.err.startswith("model: must be one of bert-base, ")
    assert MISTAKES[word].replace("{here}", str(folder)) in said.err


def test_a_sweep_over_many_models_is_no_long_file_name() -> None:
    """The whole value is longer than a file's name can be; each of its names is not."""
    names = [f"org/a-name-of-thirty-characters-{i}" for i in range(12)]
    refuse_values([f"model={','.join(names)}"])
    with pytest.raises(ConfigErrors, match="must be the name of a file; got one of 300 bytes"):
        refuse_values([f"model=gpt2,{'a' * 300}"])


def test_a_run_is_the_same_in_both_words(
    tiny_folder: Callable[[str], Path], jsonl: Path, tmp_path: Path
) -> None:
    base = tiny_folder("gemma")
    words = [
        "data=jsonl", f"data.train.path={jsonl}", "data.max_length=64", "trainer=smoke",
        "trainer.steps=1", "tracker=none", f"output_dir={tmp_path}",
    ]  # fmt: skip
    said = say("train", f"model={base}", *words)
    assert said.code == 0, said.err
    said = say("train", "model=local", f"model.path={base}", *words)
    assert said.code == 0 and "1 of 1 runs are kept from before" in said.err
    ((run, record),) = records(tmp_path).items()
    assert record["config"]["model"]["path"] == str(base) and record["run_id"] == run


def test_other_apps_have_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra asks every plugin of the environment, in every app."""
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl

    path = ConfigSearchPathImpl()
    monkeypatch.delitem(__import__("sys").modules, "lorabench.cli")
    source.ModelSearchPath().manipulate_search_path(path)
    assert path.get_path() == []
    tree = ast.parse(Path(str(source.__file__)).read_text())
    imported = {str(n.module).partition(".")[0] for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert imported == {"hydra", "omegaconf"}
