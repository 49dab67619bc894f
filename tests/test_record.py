"""The record: written whole, read back the same, and honest about processes that are gone."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path

import pytest

from lorabench import files, lease, provenance, record
from lorabench.record import Cost, Evaluation, Metric, Record, Scores


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


def evaluation(value: float | None) -> Evaluation:
    metric = Metric(value=value, num_examples=8, definition="nll/1")
    return Evaluation(
        id="0123456789ab",
        settings={"eval_examples": None},
        splits={"test": Scores(examples="ab", tokens="cd", metrics={"nll": metric})},
        predictions="evaluations/0123456789ab.parquet",
        predictions_sha256="ef",
        batch_size=4,
    )


def test_a_record_reads_back_as_it_was(tmp_path):
    whole = entry(
        evaluations=[evaluation(1 / 3)],
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
    (one,) = content["evaluations"]
    value = one["splits"]["test"]["metrics"]["nll"]["value"]
    assert value == 1 / 3  # float64 survives JSON exactly
    assert content["config"]["lora"] == {"r": 8, "lora_alpha": None}


def test_a_metric_that_is_not_finite_does_not_lose_the_record(tmp_path):
    entry(evaluations=[evaluation(None)]).write(tmp_path)
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
    files.write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"


def test_a_running_record_is_running_while_its_pack_is_held(tmp_path):
    running = entry(status="running", plan={"pack": {"id": "pack"}})
    running.write(tmp_path / "run")
    assert record.read(tmp_path / "run").status == "interrupted"
    taken = lease.take(tmp_path / ".locks" / "pack.json", 5)
    assert record.read(tmp_path / "run").status == "running"
    taken.lease.release()
    assert record.read(tmp_path / "run").status == "interrupted"
    content = json.loads((tmp_path / "run" / "record.json").read_text())
    assert content["status"] == "running", "it was only read"


def test_a_record_of_a_newer_lorabench_is_not_read(tmp_path):
    entry(schema_version=record.SCHEMA_VERSION + 1).write(tmp_path)
    assert record.read(tmp_path) is None


@pytest.mark.parametrize("status", ["trained", "finished", "stopped", "interrupted", "failed"])
def test_other_statuses_are_left_alone(tmp_path, status):
    entry(status=status).write(tmp_path)
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


def test_provenance_says_code_versions_machine_and_switches():
    import torch

    found = provenance.of_process("cpu")
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
    assert set(found["packages"]) == set(provenance.PACKAGES)
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] == "cpu" and found["gpu"] is None and found["driver"] is None
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for switch in (True, False):
            torch.use_deterministic_algorithms(switch)
            assert provenance.of_process("cpu")["determinism"]["deterministic_algorithms"] is switch
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
    monkeypatch.setattr(provenance, "__file__", str(file))
    state = provenance.git_state.__wrapped__  # read once a process otherwise
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
        "import sys; from lorabench import base_scores, record, compare, config; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
