"""Signals at any moment: what a repeat of the command ends with is what it would have been."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import scores
from processes import running, slowly, wait_for

from lorabench import cli, interrupt
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[int, dict[str, Any]]]:
    """The exit code and the outcome of a command that nothing happens to, made once."""

    @cache
    def of(*command: str) -> tuple[int, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("whole")
        return cli.main([*command, f"output_dir={folder}"]), outcome(folder)

    return of


@pytest.mark.parametrize("rates", ["1e30,1e-3", "1e-3,1e30"])
@pytest.mark.parametrize("every", [0, 5])
def test_a_mate_that_diverged_stays_stopped_and_the_others_go_on(
    rates: str,
    every: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Callable[..., tuple[int, dict[str, Any]]],
) -> None:
    command = [*FAST, f"trainer.lr={rates}"]
    code, expected = whole(*command)
    assert code == 1
    assert sorted(one[0] for one in expected.values()) == ["finished", "stopped"]

    def kill(self: Any, step: int, *rest: Any) -> None:
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    command += [f"output_dir={tmp_path / 'killed'}", f"trainer.checkpoint_every={every}"]
    with monkeypatch.context() as patch:
        patch.setattr(Display, "step", kill)
        assert cli.main(command) == 143
    resumed: list[int] = []
    monkeypatch.setattr(Display, "resumed", lambda self, steps: resumed.append(steps))
    assert cli.main(command) == 1
    assert resumed == [2 * 8]
    assert outcome(tmp_path / "killed") == expected


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_a_step_waits_until_the_step_is_whole(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Callable[..., tuple[int, dict[str, Any]]],
) -> None:
    command = [*FAST, "seed=0,1"]
    code, expected = whole(*command)
    assert code == 0
    update, calls = StackedPack.update, []

    def signalled(self: StackedPack, lr: list[float]) -> Any:
        norm = update(self, lr)  # the weights are one step on, and nobody has noted it
        calls.append(lr)
        if len(calls) == 6:
            os.kill(os.getpid(), number)
        return norm

    command.append(f"output_dir={tmp_path / 'killed'}")
    with monkeypatch.context() as patch:
        patch.setattr(StackedPack, "update", signalled)
        assert cli.main(command) == 128 + number
    kept = [*(tmp_path / "killed").glob("*/*/checkpoint/checkpoint.json")]
    assert [json.loads(path.read_text())["steps_done"] for path in kept] == [6, 6]
    assert cli.main(command) == 0
    assert outcome(tmp_path / "killed") == expected


def begun(folder: Path) -> bool:
    return any(path.stat().st_size for path in folder.glob("*/*/metrics.jsonl"))


@pytest.mark.parametrize(
    "number",
    [signal.SIGUSR1, *(pytest.param(n, marks=pytest.mark.faults) for n in interrupt.HEARD)],
    ids=lambda number: signal.Signals(number).name,
)
def test_what_schedulers_and_terminals_send_is_heard(number: int, tmp_path: Path) -> None:
    command = [*FAST, f"output_dir={tmp_path}"]
    with running(tmp_path / "said.txt", *command, before=slowly) as process:
        wait_for(lambda: begun(tmp_path))
        process.send(number)
        assert process.wait() == 128 + number
    name = signal.Signals(number).name
    assert f"interrupted by {name}; the same command continues" in process.said
    assert "Traceback" not in process.said
    (place,) = tmp_path.glob("*/*/checkpoint/checkpoint.json")
    entry = json.loads((place.parent.parent / "record.json").read_text())
    assert (entry["status"], entry["error"]) == ("interrupted", f"interrupted by {name}")
    assert json.loads(place.read_text())["steps_done"] == entry["steps_done"] > 0


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    command = [*FAST, f"output_dir={tmp_path}"]

    def endless() -> None:
        inner = StackedPack.update

        def update(self: StackedPack, lr: list[float]) -> Any:
            if begun(tmp_path):
                (tmp_path / "inside").touch()
                time.sleep(1000)
            return inner(self, lr)

        StackedPack.update = update  # type: ignore[method-assign]

    with running(tmp_path / "said.txt", *command, before=endless) as process:
        wait_for((tmp_path / "inside").exists)
        process.send(signal.SIGTERM)
        process.send(signal.SIGTERM)  # as one request: a closed terminal sends SIGHUP twice
        time.sleep(interrupt.ONE_REQUEST_SECONDS + 0.2)
        assert process.poll() is None
        process.send(signal.SIGINT)
        assert process.wait(5) == 128 + signal.SIGINT
    assert process.said.splitlines()[-1] == "ended at once, without another checkpoint"
    assert not [*tmp_path.glob("*/.locks/*.memory.json")], "it did not die without a message"
    assert "Traceback" not in process.said


@pytest.mark.faults
def test_under_nohup_a_closed_terminal_ends_nothing(tmp_path: Path) -> None:
    command = [*FAST, f"output_dir={tmp_path}"]

    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        slowly(0.02)

    with running(tmp_path / "said.txt", *command, before=nohup) as process:
        wait_for(lambda: begun(tmp_path))
        process.send(signal.SIGHUP)
        assert process.wait() == 0
