"""Folders that earlier versions wrote: read for ever, and their ids reproduced."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from conftest import records, say
from omegaconf import OmegaConf

from lorabench import plan, record
from lorabench.compare import tables
from lorabench.config import typed

FOLDERS = Path(__file__).parent / "folders"
FIRST = FOLDERS / "written_by_0.1"
# The words it was written with, from its records.
WORDS = [
    "-m", "head=exclude,lora", "seed=0,1", "lora.r=2", "target_modules=attention",
    "trainer.steps=6", "trainer.batch_size=2", "trainer.num_threads=1", "tracker=none",
    "data.num_train=32", "data.num_validation=4", "data.num_test=8",
    "data.metric=[nll,exact_match]", "sweep=written_by_0.1", "hydra.output_subdir=null",
]  # fmt: skip


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A copy of the sweep of version 0.1 in an output folder."""
    shutil.copytree(FIRST, tmp_path / "written_by_0.1")
    return tmp_path / "written_by_0.1"


def test_runs_and_compare_read_it(first: Path) -> None:
    """The values that version 0.1 recorded, by json alone."""
    written = {
        path.parent.name: json.loads(path.read_text()) for path in first.glob("*/record.json")
    }
    assert {one["schema_version"] for one in written.values()} == {1}
    shown = json.loads(say("runs", first, "--json").out)
    assert {one["run_id"]: one["status"] for one in shown} == dict.fromkeys(written, "finished")
    table = json.loads(say("compare", first, "--json").out)
    assert len(table["rows"]) == 2
    for run in table["runs"]:
        for split, metrics in written[run["run_id"]]["metrics"].items():
            assert run["metrics"][split] == {name: m["value"] for name, m in metrics.items()}
    assert all(table["evaluations"][split]["shared"] for split in ("validation", "test"))


@pytest.mark.parametrize("folder", ["written_by_0.1", "written_by_0.2"])
def test_keys_that_came_later_make_no_setting(folder: str) -> None:
    """A run with an old record, and the same run with every key of today, are one setting."""
    for _, run in record.find(FOLDERS / folder):
        today = dataclasses.asdict(typed(OmegaConf.create(run.config)))
        found, before = tables.setting(today), tables.setting(run.config)
        before.setdefault("data.group_by_length", False)  # came with another arithmetic version
        assert found == before


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_export_writes_it(kind: str, first: Path, tmp_path: Path) -> None:
    run = next(path for path, r in record.find(first) if r.config["head"]["policy"] == "lora")
    said = say("export", run, "--to", kind, tmp_path / "exported")
    assert said.code == 0, said.err
    assert (tmp_path / "exported" / "export.json").is_file()


def test_generate_writes_with_it(first: Path) -> None:
    """Its records do not say which runs pack: they write one by one."""
    said = say("generate", first, "--prompt", "abc", "--max-new-tokens", 4, "--json")
    assert said.code == 0, said
    (found,) = json.loads(said.out)["prompts"]
    shown = [one["setting"] for one in found["answers"]]
    assert shown == [None, {"head.policy": "exclude"}, {"head.policy": "lora"}]


def test_train_on_it_trains_beside_it_and_says_so(first: Path) -> None:
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    said = say("train", *WORDS, f"output_dir={first.parent}")
    assert said.code == 0, said.err
    assert said.lines[0] == (
        f"{first}: 4 runs of arithmetic version 1 stay as they are; this lorabench computes "
        f"otherwise (version {record.ARITHMETIC_VERSION}) and trains beside them"
    )
    assert all(path.read_bytes() == content for path, content in before.items())
    found = records(first.parent)
    new = [r for r in found.values() if r["schema_version"] == record.SCHEMA_VERSION]
    assert len(found) == 8 and len(new) == 4
    # Nothing that these runs do was changed: the losses are those of version 0.1.
    old = {
        (r["config"]["head"]["policy"], r["config"]["seed"]): r
        for r in found.values()
        if r["schema_version"] == 1
    }
    for one in new:
        value = one["evaluations"][0]["splits"]["test"]["metrics"]["nll"]["value"]
        expected = old[one["config"]["head"]["policy"], one["config"]["seed"]]
        # Float32 of another machine: rounding of a loss near 15, grown by six AdamW steps.
        assert value == pytest.approx(expected["metrics"]["test"]["nll"]["value"], rel=1e-4)


def test_evaluate_and_work_say_what_to_do_with_it(first: Path) -> None:
    for verb in ("evaluate", "work"):
        said = say(verb, first)
        assert said.code == 2 and "written by an earlier lorabench" in said.err


# --- the sweep of version 0.2: its ids are for ever ------------------------------------------

SECOND = FOLDERS / "written_by_0.2"


def test_ids_are_reproduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a change gives the same config another id without a new arithmetic version.

    A new config key belongs into identity.NEUTRAL, with the value that does what was done before.
    The configs are those of version 0.2's sweep; ids.json has their ids by arithmetic version.
    """
    monkeypatch.chdir(FOLDERS.parent.parent)  # its records name data by a path from there
    ids = json.loads((FOLDERS / "ids.json").read_text())
    found = list(record.find(SECOND))
    assert len(found) == 11
    planner = plan.Planner()
    for _, one in found:
        assert one.run_id == ids["2"][one.run_id] and one.arithmetic_version == 2
        made = planner.make(typed(OmegaConf.create(one.config)))
        # Where the number went up, all run ids are new; an evaluation is what it was.
        assert made.run_id == ids[str(record.ARITHMETIC_VERSION)][one.run_id], one.config
        assert made.evaluation_id == one.evaluations[0].id, one.config


def test_what_version_0_2_wrote_is_read_and_scored(tmp_path: Path) -> None:
    shutil.copytree(SECOND, tmp_path / "written_by_0.2")
    place = tmp_path / "written_by_0.2"
    shown = json.loads(say("runs", place, "--json").out)
    assert {run["status"] for run in shown} == {"finished"}
    table = json.loads(say("compare", place, "--json").out)
    assert len(table["runs"]) == 11 and not table["left_out"]
    run = next(p for p, r in record.find(place) if r.config["data"]["source"] == "skills")
    assert say("export", run, "--to", "adapter", tmp_path / "exported").code == 0
