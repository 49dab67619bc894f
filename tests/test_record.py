"""The record: written whole, read back the same, and honest about processes that are gone."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path

import pytest

from lorabench import record
from lorabench.record import Cost, Metric, Record


def entry(**changes) -> Record:
    content = {
        "run_id": "0123456789ab",
        "sweep": "s",
        "status": "finished",
        "config": {"seed": 0, "lora": {"r": 8, "lora_alpha": None}, "data": {"skills": ["greek"]}},
        "seeds": {"init": 0, "data": 1, "dropout": 2},
        "plan": {"trainable_parameters": 7},
        "provenance": {"python": "3"},
    }
    return Record(**(content | changes))


@pytest.fixture
def sleeper():
    """A live process that is not this one."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield child
    child.kill()
    child.wait()


def process_of(pid: int) -> dict:
    return {"pid": pid, "host": socket.gethostname(), "start": record.process_start(pid)}


def test_a_record_reads_back_as_it_was(tmp_path):
    whole = entry(
        metrics={"test": {"nll": Metric(value=1 / 3, num_examples=8, definition="nll/1")}},
        cost=Cost(train_seconds=0.1, peak_memory_bytes=2**40),
        hashes={"adapter": "ab"},
        notes=["né", "a\nb"],
        steps_done=4,
        started=record.now(),
        ended=record.now(),
        error=None,
    )
    whole.write(tmp_path)
    assert record.read(tmp_path) == whole
    content = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert content["schema_version"] == record.SCHEMA_VERSION
    assert content["metrics"]["test"]["nll"]["value"] == 1 / 3  # float64 survives JSON exactly
    assert content["config"]["lora"] == {"r": 8, "lora_alpha": None}


def test_a_metric_that_is_not_finite_does_not_lose_the_record(tmp_path):
    entry(metrics={"test": {"nll": Metric(value=None, num_examples=0, definition="nll/1")}}).write(
        tmp_path
    )
    assert record.read(tmp_path).metrics["test"]["nll"].value is None


def test_a_reader_never_sees_half_a_record(tmp_path):
    """One thread rewrites two records of very different length; every read must be one of them."""
    short, long = entry(), entry(notes=["x" * 200_000])
    short.write(tmp_path)
    done = threading.Event()

    def rewrite() -> None:
        while not done.is_set():
            long.write(tmp_path)
            short.write(tmp_path)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        seen = [record.read(tmp_path) for _ in range(300)]
    finally:
        done.set()
        writer.join()
    assert all(one in (short, long) for one in seen)
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]  # nothing left behind


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    record.write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        record.write_atomic(path, "new")
    assert path.read_text() == "old"


def test_running_with_a_live_process_stays_running(tmp_path, sleeper):
    entry(status="running", process=process_of(sleeper.pid)).write(tmp_path / "other")
    entry(status="running", process=record.this_process()).write(tmp_path / "own")
    assert record.read(tmp_path / "other").status == "running"
    assert record.read(tmp_path / "own").status == "running"


def test_running_with_a_killed_process_is_interrupted(tmp_path, sleeper):
    entry(status="running", process=process_of(sleeper.pid)).write(tmp_path)
    sleeper.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # dead, its parent has not looked yet
    assert record.read(tmp_path).status == "interrupted"
    sleeper.wait()
    assert record.read(tmp_path).status == "interrupted"
    assert json.loads((tmp_path / "record.json").read_text())["status"] == "running"  # only read


@pytest.mark.parametrize("who", ["another", "this"])
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="start times come from /proc")
def test_a_reused_process_number_is_not_taken_for_the_run(tmp_path, sleeper, who):
    """A restarted container gives the same numbers again, this process's own among them."""
    pid = sleeper.pid if who == "another" else os.getpid()
    entry(status="running", process=process_of(pid) | {"start": "1"}).write(tmp_path)
    assert record.read(tmp_path).status == "interrupted"


def test_another_hosts_run_is_taken_to_be_alive(tmp_path):
    entry(status="running", process={"pid": 1, "host": "elsewhere", "start": "1"}).write(tmp_path)
    assert record.read(tmp_path).status == "running"


@pytest.mark.parametrize("status", ["finished", "stopped", "interrupted", "failed"])
def test_other_statuses_are_left_alone(tmp_path, status):
    entry(
        status=status, process={"pid": 2**22 + 1, "host": socket.gethostname(), "start": "1"}
    ).write(tmp_path)
    assert record.read(tmp_path).status == status


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"run_id": "a"}',
        b"\xff\xfe\x00",
        b'{"status": "nonsense"}',
    ],
)
def test_an_unreadable_record_is_ignored_and_its_neighbours_found(tmp_path, content):
    entry(run_id="aaaaaaaaaaaa").write(tmp_path / "aaaaaaaaaaaa")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "record.json").write_bytes(content)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "multirun.yaml").write_text("a: 1\n")
    assert record.read(tmp_path / "broken") is None
    assert [(path.name, one.run_id) for path, one in record.find(tmp_path)] == [
        ("aaaaaaaaaaaa",) * 2
    ]


def test_find_takes_a_sweep_or_one_run_in_the_order_of_ids(tmp_path):
    for name in ("b", "c", "a"):
        entry(run_id=name).write(tmp_path / name)
    assert [one.run_id for _, one in record.find(tmp_path)] == ["a", "b", "c"]
    assert [one.run_id for _, one in record.find(tmp_path / "b")] == ["b"]
    assert list(record.find(tmp_path / "nowhere")) == []


def test_metrics_lines_are_on_disk_before_the_file_is_closed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        record.append_line(file, {"step": 1, "train/loss": 0.1})
        assert json.loads(path.read_text()) == {"step": 1, "train/loss": 0.1}


def test_provenance_says_code_versions_machine_and_switches(monkeypatch):
    import torch

    monkeypatch.setattr(sys, "argv", ["/somewhere/lorabench", "train", "seed=1"])
    found = record.provenance("cpu")
    assert {
        "git",
        "python",
        "packages",
        "os",
        "cpu",
        "gpu",
        "driver",
        "threads",
        "determinism",
    } <= set(found)
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == metadata.version("torch")
    assert set(found["packages"]) == set(record.PACKAGES)
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] == "cpu" and found["gpu"] is None and found["driver"] is None
    assert found["command"] == ["lorabench", "train", "seed=1"]
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for switch in (True, False):
            torch.use_deterministic_algorithms(switch)
            assert record.provenance("cpu")["determinism"]["deterministic_algorithms"] is switch
    finally:
        torch.use_deterministic_algorithms(before)
    assert json.loads(json.dumps(found)) == found


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_git_state_follows_the_repository_of_the_code(tmp_path, monkeypatch):
    file = tmp_path / "record.py"
    file.write_text("a = 1\n")
    monkeypatch.setattr(record, "__file__", str(file))
    state = record.git_state.__wrapped__  # read once a process otherwise
    assert state() == {"commit": None, "dirty": None}  # no repository
    git(tmp_path, "init", "-q")
    assert state() == {"commit": None, "dirty": None}  # a branch without a commit
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "another project's repository")
    assert state() == {"commit": None, "dirty": None}  # does not track the code
    git(tmp_path, "add", "record.py")
    git(tmp_path, "commit", "-q", "-m", "code")
    clean = state()
    assert clean == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": None}
    file.write_text("a = 2\n")
    first = state()
    file.write_text("a = 3\n")
    second = state()
    assert first["commit"] == second["commit"] == clean["commit"]
    assert first["dirty"] and second["dirty"] and first["dirty"] != second["dirty"]
    assert re.fullmatch(r"[0-9a-f]{16}", first["dirty"])


def test_the_room_imports_without_torch():
    code = (
        "import sys; from lorabench import record, compare, config; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
