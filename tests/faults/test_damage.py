"""Files of finished runs and of checkpoints, with bits flipped, cut, emptied and deleted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import recorded_runs, say
from processes import running, slowly, wait_for

from faults.sweeps import PACK, leftovers, outcome


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped": flip, "cut": cut, "emptied": empty, "deleted": Path.unlink
}  # fmt: skip
ADAPTER = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two runs, as it ended."""
    folder = tmp_path_factory.mktemp("finished")
    assert say(*PACK, f"output_dir={folder}").code == 0
    return folder


@pytest.fixture
def sweep(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, times included."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def scores_of(run: Path) -> str:
    (path,) = (run / "evaluations").iterdir()
    return f"evaluations/{path.name}"


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", [*ADAPTER, "config.yaml", "metrics.jsonl", "scores"])
def test_a_damaged_file_is_told_by_runs_and_compare(name: str, how: str, sweep: Path) -> None:
    run, entry = recorded_runs(sweep)[0]
    name = scores_of(run) if name == "scores" else name
    DAMAGE[how](run / name)
    for verb in ("runs", "compare"):
        said = say(verb, run.parent)
        assert said.code == 0
        (line,) = said.lines
        assert line.startswith(f"{run}: {name} ")
        remedy = {
            "adapter": f"; remove '{run}' and repeat `lorabench train -m ",
            "evaluations": "; repeat `lorabench train -m ",
        }.get(
            name.partition("/")[0], "; its adapter and its scores are whole; restore the file from "
        )
        assert remedy in line
    said = say("runs", "--verify", "--json", run.parent)
    assert said.code == 1
    found = {one["run_id"]: one["damaged"] for one in json.loads(said.out)}
    assert list(found.pop(entry["run_id"])) == [name] and not any(found.values())
    assert said.lines[-1] == "1 of 2 runs are as they were recorded"


def test_only_verify_reads_what_has_its_size_and_time(sweep: Path) -> None:
    """As a disk that forgets: nothing but the content tells."""
    run, _ = recorded_runs(sweep)[0]
    file = run / ADAPTER[0]
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    flip(file)
    os.utime(file, ns=times)
    assert say("runs", run.parent).err == ""
    said = say("runs", "--verify", run.parent)
    assert said.code == 1 and f"{run}: {ADAPTER[0]} has other content" in said.err
    assert "finished, damaged" in " ".join(said.out.split())


def test_a_copy_whose_times_are_new_is_whole(sweep: Path, tmp_path: Path) -> None:
    for path in sweep.rglob("*"):
        os.utime(path)
    for words in (["runs"], ["compare"], ["runs", "--verify"]):
        said = say(*words, sweep / "default")
        assert said.code == 0 and "content" not in said.err


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_record_is_never_taken_for_one(how: str, sweep: Path) -> None:
    run, _ = recorded_runs(sweep)[0]
    DAMAGE[how](run / "record.json")
    said = say("runs", "--json", run.parent)
    assert [one["status"] for one in json.loads(said.out)].count("finished") == 1
    if how != "deleted":
        assert f"left out, record.json is damaged or of a newer version: {run.name}" in said.err


def test_a_changed_value_of_a_record_is_damage(sweep: Path) -> None:
    run, entry = recorded_runs(sweep)[0]
    text = (run / "record.json").read_text()
    value = json.dumps(entry["evaluations"][-1]["splits"]["test"]["metrics"]["nll"]["value"])
    assert text.count(value) == 1
    (run / "record.json").write_text(text.replace(value, "0.01"))
    assert (
        f"record.json is damaged or of a newer version: {run.name}"
        in say("compare", run.parent).err
    )


@pytest.mark.faults
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", [*ADAPTER, "scores", "record.json"])
def test_a_repeat_of_the_command_mends_or_names_it(
    name: str, how: str, finished: Path, sweep: Path, tmp_path: Path
) -> None:
    run, _ = recorded_runs(sweep)[0]
    DAMAGE[how](run / (scores_of(run) if name == "scores" else name))
    command = [*PACK, f"output_dir={sweep}"]
    said = say(*command)
    if name == "record.json" and how != "deleted":
        assert f"{run}: record.json is damaged; the run is trained again" in said.lines
        assert (run / "record.json.damaged").exists()
    if name in ADAPTER:
        assert said.code == 1 and f"{run}: {name} " in said.lines[-1]
        assert f"remove '{run}' and repeat `lorabench train -m" in said.lines[-1]
        shutil.rmtree(run)
        said = say(*command)
    assert said.code == 0, said.err
    assert outcome(sweep) == outcome(finished)
    assert say("runs", "--verify", run.parent).code == 0


@pytest.mark.faults
@pytest.mark.parametrize("where", ["checkpoint", ".checkpoint.old"])
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json"])
def test_a_damaged_checkpoint_is_told_and_the_bits_are_the_same(
    name: str, how: str, where: str, finished: Path, tmp_path: Path
) -> None:
    words = [*PACK, f"output_dir={tmp_path / 'out'}", "trainer.checkpoint_every=2"]
    with running(tmp_path / "said.txt", *words, before=slowly) as process:
        wait_for(lambda: len([*tmp_path.glob("out/*/*/.checkpoint.old")]) == 2)
        process.send(signal.SIGTERM)
        assert process.wait() == 143
    run, _ = recorded_runs(tmp_path / "out")[0]
    DAMAGE[how](run / where / name)
    said = say(*words)
    assert said.code == 0
    (line,) = (line for line in said.lines if " is damaged (" in line)
    assert line.startswith(f"checkpoint {run / where} is damaged (")
    assert outcome(tmp_path / "out") == outcome(finished)
    assert not leftovers(tmp_path / "out")
