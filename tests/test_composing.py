"""One composition for plan and train: every form of command line means the same to both."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import records, say, scores

TINY = [
    "trainer=smoke", "trainer.steps=1", "trainer.num_threads=1", "tracker=none", "lora.r=1",
    "target_modules=attention", "data.num_train=8", "data.num_validation=2", "data.num_test=2",
]  # fmt: skip


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A folder of the user's own configs, with an experiment that is a sweep."""
    place = tmp_path / "c"
    (place / "experiment").mkdir(parents=True)
    (place / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nlora:\n  lora_alpha: 3\n"
        "hydra:\n  launcher:\n    pack_size: 1\n  sweeper:\n    params:\n      seed: 0,1\n"
    )
    return place


def planned(*words: str) -> dict[str, Any]:
    said = say("plan", "--json", *words)
    assert said.code == 0, said.err
    return json.loads(said.out)


FORMS = {
    "a glob over a group": ["-m", "head=glob(*)"],
    "a glob with an exclusion": ["-m", "head=glob(*,exclude=full)"],
    "a choice and a range": ["-m", "head=choice(exclude,lora)", "seed=range(2)"],
    "the mode as an override": ["hydra.mode=MULTIRUN", "seed=0,1"],
    "a folder of configs": ["--config-dir", "{c}", "-m", "experiment=mine"],
    "the flag behind the overrides": ["experiment=mine", "--config-dir={c}", "--multirun"],
    "an experiment on a searchpath": ["-m", "hydra.searchpath=[file://{c}]", "experiment=mine"],
    "batches of a sweeper": ["-m", "seed=0,1,2", "hydra.sweeper.max_batch_size=2"],
    "a single run": ["seed=3", "head=lora"],
    "an appended key": ["-m", "+hydra.job.env_set.A=b", "seed=0,1"],
}


QUICK = ("the mode as an override", "the flag behind the overrides")


@pytest.mark.parametrize(
    "form",
    [form if form in QUICK else pytest.param(form, marks=pytest.mark.slow) for form in FORMS],
)
def test_plan_names_the_runs_that_train_trains(form: str, configs: Path, tmp_path: Path) -> None:
    words = [*TINY, f"output_dir={tmp_path / 'out'}"]
    words += [word.replace("{c}", str(configs)) for word in FORMS[form]]
    plan = planned(*words)
    assert not (tmp_path / "out").exists(), "a plan leaves nothing behind"
    assert say("train", *words).code == 0
    found = records(tmp_path / "out")
    assert [run["run_id"] for run in plan["runs"]] and len(found) == len(plan["runs"])
    assert {run["run_id"] for run in plan["runs"]} == set(found)
    if "max_batch_size" not in str(words):  # each batch is a launch of its own
        packs = {tuple(r["plan"]["pack"]["members"]) for r in found.values()}
        assert packs == {tuple(pack) for pack in plan["packs"]}


@pytest.mark.slow
def test_a_typo_beside_a_folder_of_configs_is_told_alone(configs: Path) -> None:
    for verb in ("plan", "train"):
        said = say(verb, "--config-dir", configs, "-m", "experiment=mine", *TINY, "lorar=3")
        assert said.code == 2 and len(said.lines) == 1
        assert said.err.startswith("lorar: no such key; got 'lorar' (did you mean 'lora.r'?)")


def test_a_folder_of_configs_that_is_not_there(tmp_path: Path) -> None:
    said = say("plan", "--config-dir", tmp_path / "no", *TINY)
    assert said.code == 2 and said.err.startswith("--config-dir: must be a folder")


def test_a_job_returns_its_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Hydra's sweepers optimise; not a number for a run that stopped or failed."""
    from hydra_plugins.lorabench_launcher import _core

    returned: list[Any] = []
    launch = _core.launch
    monkeypatch.setattr(_core, "launch", lambda *a: returned.extend(launch(*a)) or returned)
    words = [*TINY, "trainer.steps=3", "objective=test/exact_match", f"output_dir={tmp_path}"]
    said = say("train", "-m", *words, "trainer.lr=1e-3,1e30")
    by_lr = {r["config"]["trainer"]["lr"]: r for r in records(tmp_path).values()}
    assert by_lr[1e30]["status"] == "stopped"
    assert said.code == 1 and said.lines[-2] == "1 of 2 runs did not finish:"
    assert said.lines[-1].startswith("  trainer.lr=1e+30 (") and "is not finite" in said.lines[-1]
    good, bad = (job.return_value for job in returned)
    assert good == scores(by_lr[1e-3])["test"]["exact_match"]["value"] and math.isnan(bad)
    # The objective is scored even where data.metric does not ask for it.
    words = [*TINY, "objective=validation/nll_per_token", f"output_dir={tmp_path / 'more'}"]
    assert say("train", "-m", *words, "seed=0,1").code == 0
    values = [job.return_value for job in returned[2:]]
    found = [scores(r)["validation"]["nll_per_token"] for r in records(tmp_path / "more").values()]
    assert sorted(values) == sorted(one["value"] for one in found)


@pytest.mark.slow  # composing hundreds of jobs takes a minute
def test_a_pack_of_hundreds(tmp_path: Path) -> None:
    words = [*TINY, "seed=range(245)", "hydra.launcher.pack_size=300", f"output_dir={tmp_path}"]
    said = say("train", "-m", *words)
    assert said.code == 0, said.err[-2000:]
    found = records(tmp_path)
    assert len(found) == 245
    assert {r["plan"]["pack"]["size"] for r in found.values()} == {245}
