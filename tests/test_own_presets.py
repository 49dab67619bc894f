"""Presets in ./conf: found as Hydra's own searchpath finds them, before ours, and recorded."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import records, say
from test_composing import TINY

from lorabench import cli
from lorabench.cli import composing

ROOT = Path(__file__).parents[1]
FILES = {
    "conf/experiment/mine.yaml": "# @package _global_\ndefaults:\n  - base\n  - _self_\n"
    "  - override /data: sums\nhydra:\n  sweeper:\n    params:\n      seed: 0,1\n",
    "conf/experiment/base.yaml": "# @package _global_\nlora:\n  lora_alpha: 3\n",
    "conf/data/sums.yaml": "name: sums\nsource: skills\nskills: [sort]\nmax_length: 32\n",
    "conf/trainer/smoke.yaml": "batch_size: 2\nlr: 0.25\n",  # in place of ours
    "conf/trainer/unused.yaml": "lr: 0.5\n",
    "conf/train.yaml": "another: app\n",  # of another Hydra project
}
USED = sorted({*FILES} - {"conf/trainer/unused.yaml", "conf/train.yaml"})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with presets of its own."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hashes(names: list[str]) -> dict[str, str]:
    return {name: hashlib.sha256(FILES[name].encode()).hexdigest() for name in names}


def planned(*words: str) -> dict[str, Any]:
    said = say("plan", "--json", *TINY, *words)
    assert said.code == 0, said
    return json.loads(said.out)


def test_they_train_and_are_recorded_and_replay_needs_no_file(place: Path) -> None:
    said = say("train", "-m", "experiment=mine", *TINY)
    assert said.code == 0, said.err
    told = ", ".join(USED).replace("smoke.yaml", "smoke.yaml (in place of the built-in one)")
    assert f"note: composed with files of your own: {told}" in said.lines
    found = records(place / "outputs")
    assert len(found) == 2
    for record in found.values():
        config = record["config"]
        assert config["presets"] == hashes(USED)
        assert (config["data"]["name"], config["lora"]["lora_alpha"]) == ("sums", 3)
        assert (config["trainer"]["lr"], config["trainer"]["batch_size"]) == (0.25, 2)
    shutil.rmtree(place / "conf")
    said = say("replay", place / "outputs" / "default" / next(iter(found)), "--verify", "--json")
    assert json.loads(said.out)["answer"] == "identical"


@pytest.mark.slow
def test_hydras_own_searchpath_composes_the_same_runs(
    place: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the file that hides one of ours, which comes behind ours there."""
    mine = planned("-m", "experiment=mine", "trainer.batch_size=2", "trainer.lr=0.25")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(place / "conf", elsewhere / "presets")
    monkeypatch.chdir(elsewhere)
    words = ["-m", "experiment=mine", "trainer.batch_size=2", "trainer.lr=0.25"]
    theirs = planned(*words, f"hydra.searchpath=[file://{elsewhere / 'presets'}]")
    # trainer/smoke.yaml of ours sets more keys: those of the test decide alone.
    ours = planned(*words, "--config-dir", "presets")
    assert [run["run_id"] for run in theirs["runs"]] == [run["run_id"] for run in ours["runs"]]
    keys = ("lora_modules", "scale", "labels", "contents")
    for run, other in zip(mine["runs"], theirs["runs"], strict=True):
        assert {key: run[key] for key in keys} == {key: other[key] for key in keys}
    used = [name.replace("conf/", "presets/", 1) for name in USED if "smoke" not in name]
    (note,) = (text for text in theirs["notes"] if "files of your own" in text)
    assert note == f"composed with files of your own: {', '.join(used)}"


def test_each_run_of_a_sweep_over_files_names_its_own(place: Path) -> None:
    words = [*TINY, "-m", "trainer=smoke,unused", "trainer.eval_batch_size=2", "trainer.steps=1"]
    composed = cli.compose(words)
    assert [one.presets for one in composed.configs] == [
        hashes(["conf/trainer/smoke.yaml"]), hashes(["conf/trainer/unused.yaml"]),
    ]  # fmt: skip


def test_where_conf_is_the_built_in_one_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    inside = [(one.provider, one.path) for one in composing._search_path(None, None).get_path()]
    monkeypatch.chdir(ROOT / "docs")
    outside = [(one.provider, one.path) for one in composing._search_path(None, None).get_path()]
    assert inside == outside and not any("own" in path for _, path in inside)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\nmax_epochs: 3\n", "trainer.max_epochs: no such key; got 'trainer.max_epochs' ("),
        ("steps: many\n", "trainer.steps: must be of type Integer; got 'many'"),
        ("lr: 1\nsteps: [3\n", "{path}: must be a YAML file; got expected ',' or ']', but got "),
    ],
)
def test_what_is_wrong_with_a_file_names_the_file(text: str, message: str, place: Path) -> None:
    path = place / "conf" / "trainer" / "smoke.yaml"
    path.write_text(text)
    said = say("plan", *TINY)
    assert said.code == 2 and len(said.lines) == 1
    assert said.err.startswith(message.format(path=path))
    assert str(path.relative_to(place)) in said.err


def test_a_misspelt_preset_names_those_of_the_folder_too(place: Path) -> None:
    said = say("plan", *TINY, "data=sumz")
    assert said.code == 2 and "skills, sums; got 'sumz' (did you mean 'sums'?)" in said.err
