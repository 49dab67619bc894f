"""Checkpoints: kept by steps and by time, and what is damaged is noticed and not used."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recorded_runs, say, scores
from processes import running, slowly, wait_for

from lorabench import checkpoint, provenance
from lorabench.config import TrainerConfig
from lorabench.progress import Display
from lorabench.worker.training import is_due

FAST = [
    "train", "-m", "tracker=none", "data.num_train=32", "data.num_validation=4", "data.num_test=4",
    "trainer.steps=8", "trainer.batch_size=2", "trainer.num_threads=1", "lora.r=2",
    "target_modules=attention", "seed=0,1",
]  # fmt: skip


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def next_digit(file: Path) -> None:
    """One more step done, in JSON that is as good as before."""
    content = json.loads(file.read_text())
    content["steps_done"] += 1
    file.write_text(json.dumps(content))


def put(content: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(content)


def a_file_in_its_place(file: Path) -> None:
    for one in file.parent.iterdir():
        one.unlink()
    file.parent.rmdir()
    file.parent.write_text("not a folder")


STATE, TOLD = "state.safetensors", "checkpoint.json"
DAMAGE = {
    "a flipped bit": (STATE, flip),
    "cut short": (STATE, lambda file: os.truncate(file, file.stat().st_size // 2)),
    "empty tensors": (STATE, put(b"")),
    "no tensors": (STATE, Path.unlink),
    "another step": (TOLD, next_digit),
    "torn": (TOLD, lambda file: os.truncate(file, file.stat().st_size // 2)),
    "empty": (TOLD, put(b"")),
    "no text": (TOLD, put(b"\xff\xfe\x00")),
    "an empty object": (TOLD, put(b"{}")),
    "a list": (TOLD, put(b"[]")),
    "null": (TOLD, put(b"null")),
    "no checkpoint.json": (TOLD, Path.unlink),
    "a file in its place": (TOLD, a_file_in_its_place),
    "a folder in its place": (TOLD, lambda file: (file.unlink(), file.mkdir())),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("which", ["the last", "the one before", "both"])
def test_a_damaged_checkpoint_is_set_aside_and_the_other_one_is_used(
    kind: str, which: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    for step in (3, 5):
        checkpoint.write(folder, {"w": torch.full((64,), float(step))}, step, {"pack": "p"})
        checkpoint.commit(folder)
    assert checkpoint.set_damaged_aside(folder) == []
    name, damage = DAMAGE[kind]
    places = {"the last": folder, "the one before": tmp_path / ".checkpoint.old"}
    for place in places.values() if which == "both" else [places[which]]:
        damage(place / name)
    told = checkpoint.set_damaged_aside(folder)
    left = {"the last": [3], "the one before": [5], "both": []}[which]
    assert len(told) == 2 - len(left)
    assert all("is damaged (" in text for text in told)
    for text in told:
        assert os.path.lexists(tmp_path / text.rpartition(" ")[2]), "each lies where it says"
    assert list(checkpoint.steps(folder, "p")) == left
    for step in left:
        assert checkpoint.load(folder, step, {"pack": "p"})["w"].unique().tolist() == [step]
    assert checkpoint.set_damaged_aside(folder) == []
    checkpoint.remove(folder)
    assert not list(tmp_path.iterdir())


def outcome(folder: Path) -> dict[str, Any]:
    return {
        entry["run_id"]: (
            entry["status"], entry["hashes"], scores(entry),
            [json.loads(row)["step"] for row in (place / "metrics.jsonl").read_text().splitlines()],
        )
        for place, entry in recorded_runs(folder)
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the sweep ends with if nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    assert say(*FAST, f"output_dir={folder}").code == 0
    return outcome(folder)


def interrupted(folder: Path) -> list[Path]:
    """The checkpoints of a pack that was stopped after five steps, with those of step 4 beside."""

    def stop(self: Display, step: int, *rest: Any) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Display, "step", stop)
        words = [*FAST, "trainer.checkpoint_every=2", f"output_dir={folder}"]
        assert say(*words).code == 128 + signal.SIGTERM
    return sorted(folder.glob("*/*/checkpoint"))


@pytest.mark.parametrize(
    "kind", ["another step", pytest.param("a flipped bit", marks=pytest.mark.faults)]
)
def test_a_pack_continues_from_the_step_that_is_whole_for_all(
    kind: str, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = interrupted(tmp_path)
    name, damage = DAMAGE[kind]
    damage(first / name)
    resumed: list[int] = []
    monkeypatch.setattr(Display, "resumed", lambda self, steps: resumed.append(steps))
    said = say(*FAST, f"output_dir={tmp_path}")
    assert said.code == 0
    (line,) = [line for line in said.lines if "damaged" in line]
    assert line.startswith(f"checkpoint {first} is damaged (")
    assert line.endswith("was set aside as .checkpoint.damaged; continuing from step 4")
    assert resumed == [2 * 4]
    assert outcome(tmp_path) == whole
    assert not [*tmp_path.glob("*/*/.checkpoint*"), *tmp_path.glob("*/*/checkpoint")]


@pytest.mark.faults
def test_where_no_checkpoint_is_whole_the_pack_starts_again(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    for place in interrupted(tmp_path):
        flip(place / STATE)
        flip(place.parent / ".checkpoint.old" / STATE)
    said = say(*FAST, f"output_dir={tmp_path}")
    assert said.code == 0
    lines = [line for line in said.lines if "damaged" in line]
    assert len(lines) == 4 and all(line.endswith("; starting again") for line in lines)
    assert outcome(tmp_path) == whole


@pytest.mark.faults
def test_another_commit_continues_and_the_record_lists_both(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = [{"commit": name * 40, "dirty": None} for name in "ab"]
    monkeypatch.setattr(provenance, "git_state", lambda: commits[0])
    interrupted(tmp_path)
    monkeypatch.setattr(provenance, "git_state", lambda: commits[1])
    resumed: list[int] = []
    monkeypatch.setattr(Display, "resumed", lambda self, steps: resumed.append(steps))
    assert say(*FAST, f"output_dir={tmp_path}").code == 0
    assert resumed == [2 * 5] and outcome(tmp_path) == whole
    for _, entry in recorded_runs(tmp_path):
        assert entry["provenance"]["commits"] == commits
        assert entry["provenance"]["git"] == commits[1]


def test_damaged_rows_of_metrics_are_left_out_and_told(tmp_path: Path) -> None:
    file = interrupted(tmp_path)[0].parent / "metrics.jsonl"
    rows = file.read_bytes().split(b"\n")
    rows[1:2] = [b"12", b"\xff\xfe", rows[1] + rows[2], b'{"train/loss": 1}']  # step 2 is lost
    file.write_bytes(b"\n".join(rows) + b'{"step": 6, "tr')
    said = say(*FAST, f"output_dir={tmp_path}")
    assert said.code == 0 and f"{file}: 4 damaged lines are left out" in said.err
    steps = [json.loads(row)["step"] for row in file.read_text().splitlines()]
    assert steps == [1, 3, 4, 5, 6, 7, 8]
    assert f"{file}: 1 of 5 rows are lost" in said.err


@pytest.mark.faults
def test_rows_of_metrics_that_are_gone_are_told(tmp_path: Path) -> None:
    file = interrupted(tmp_path)[0].parent / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    said = say(*FAST, f"output_dir={tmp_path}")
    assert said.code == 0 and f"{file}: 3 of 5 rows are lost" in said.err


def test_one_is_due_by_steps_or_by_time_at_two_percent_of_the_time() -> None:
    trainer = TrainerConfig(steps=100, checkpoint_every=10)
    assert trainer.checkpoint_minutes == 5
    assert is_due(trainer, 10, 1, 9) and not is_due(trainer, 11, 299, 1)
    assert is_due(trainer, 11, 300, 1) and is_due(trainer, 11, 300, 6)
    assert not is_due(trainer, 11, 300, 7) and is_due(trainer, 11, 350, 7)
    by_time = TrainerConfig(steps=100)
    assert is_due(by_time, 99, 350, 7) and not is_due(by_time, 100, 350, 7), "the adapter is next"
    never = TrainerConfig(steps=100, checkpoint_minutes=0)
    assert not is_due(never, 11, 1e9, 0)


@pytest.mark.faults
def test_a_killed_pack_continues_from_a_checkpoint_by_time(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    words = [*FAST, f"output_dir={tmp_path}"]
    often = "trainer.checkpoint_minutes=1e-4"
    with running(tmp_path / "said.txt", *words, often, before=slowly) as process:
        wait_for(lambda: len(list(tmp_path.glob("*/*/checkpoint/checkpoint.json"))) == 2)
        process.send(signal.SIGKILL)
        process.wait()
    assert say(*words).code == 0
    assert outcome(tmp_path) == whole
