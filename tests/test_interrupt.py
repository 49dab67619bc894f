"""Signals at any moment: what a repeat of the command ends with is what it would have been."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import scores

from lorabench import cli
from lorabench.pack import StackedPack
from lorabench.progress import Display

FAST = [
    "train", "-m", "tracker=none", "data.num_train=32", "data.num_validation=4", "data.num_test=8",
    "trainer.steps=12", "trainer.batch_size=2", "trainer.num_threads=1", "lora.r=4",
    "target_modules=attention",
]  # fmt: skip


def outcome(folder: Path) -> dict[str, Any]:
    """What counts of every run, by its id."""
    found = {}
    for path in folder.glob("*/*/record.json"):
        entry = json.loads(path.read_text())
        rows = [json.loads(row) for row in (path.parent / "metrics.jsonl").read_text().splitlines()]
        found[entry["run_id"]] = (
            entry["status"], entry["error"], entry["steps_done"], scores(entry),
            entry["hashes"]["adapter"], [row["step"] for row in rows],
        )  # fmt: skip
    return found


@pytest.mark.parametrize("rates", ["1e30,1e-3", "1e-3,1e30"])
@pytest.mark.parametrize("every", [0, 5])
def test_a_mate_that_diverged_stays_stopped_and_the_others_go_on(
    rates: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*FAST, f"trainer.lr={rates}"]
    assert cli.main([*command, f"output_dir={tmp_path / 'whole'}"]) == 0
    expected = outcome(tmp_path / "whole")
    assert sorted(one[0] for one in expected.values()) == ["finished", "stopped"]

    def kill(self: Any, step: int, *rest: Any) -> None:
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    command += [f"output_dir={tmp_path / 'killed'}", f"trainer.checkpoint_every={every}"]
    with monkeypatch.context() as patch:
        patch.setattr(Display, "step", kill)
        assert cli.main(command) == 130
    resumed: list[int] = []
    monkeypatch.setattr(Display, "resumed", lambda self, steps: resumed.append(steps))
    assert cli.main(command) == 0
    assert resumed == [2 * 8]
    assert outcome(tmp_path / "killed") == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])  # a second signal does not wait: nothing is kept
def test_a_signal_inside_a_step_waits_until_the_step_is_whole(
    number: int, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*FAST, "seed=0,1"]
    assert cli.main([*command, f"output_dir={tmp_path / 'whole'}"]) == 0
    update, calls = StackedPack.update, []

    def signalled(self: StackedPack, lr: list[float]) -> Any:
        norm = update(self, lr)  # the weights are one step on, and nobody has noted it
        calls.append(lr)
        for _ in range(times if len(calls) == 6 else 0):
            os.kill(os.getpid(), number)
        return norm

    command.append(f"output_dir={tmp_path / 'killed'}")
    with monkeypatch.context() as patch:
        patch.setattr(StackedPack, "update", signalled)
        assert cli.main(command) == 130
    kept = [*(tmp_path / "killed").glob("*/*/checkpoint/checkpoint.json")]
    assert [json.loads(path.read_text())["steps_done"] for path in kept] == (
        [6, 6] if times == 1 else []
    )
    assert cli.main(command) == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
