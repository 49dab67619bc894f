"""Several processes on one sweep folder: each run trained once, by whoever, and nothing lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import records, say, scores
from processes import running, slowly, wait_for

from lorabench import base_scores, lease, tracking
from lorabench.progress import Display
from lorabench.record import find
from lorabench.sweep import SweepFolder
from lorabench.worker.members import Member

GRID = ["head=exclude,lora", "seed=0,1"]
FAST = [
    "tracker=none", "data.num_train=32", "data.num_validation=4", "data.num_test=8", "lora.r=2",
    "target_modules=attention", "trainer.batch_size=2", "trainer.num_threads=1",
]  # fmt: skip
STEPS = 12


def command(out: Path, *more: str) -> list[str]:
    return ["train", "-m", *FAST, *GRID, f"trainer.steps={STEPS}", f"output_dir={out}", *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """The records of an undisturbed sweep, by pack size."""
    made: dict[int, dict[str, Any]] = {}

    def of(size: int) -> dict[str, Any]:
        if size not in made:
            out = tmp_path_factory.mktemp("whole")
            assert say(*command(out, f"hydra.launcher.pack_size={size}")).code == 0
            made[size] = records(out)
        return made[size]

    return of


def check_each_was_trained_once(out: Path, expected: dict[str, Any]) -> None:
    found = records(out)
    assert set(found) == set(expected)
    for run, record in found.items():
        assert record["status"] == "finished"
        assert record["hashes"] == expected[run]["hashes"], "the bits of an undisturbed sweep"
        assert scores(record) == scores(expected[run])
        rows = (out / "default" / run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, STEPS + 1))
        assert len(record["evaluations"]) == 1
    (base,) = base_scores.base_evaluations(out / "default")
    assert all(base.is_of(entry) for _, entry in find(out / "default"))
    assert not list(out.glob("**/*.part")) and not list(out.glob("**/*.alive"))


@pytest.mark.slow
@pytest.mark.parametrize(("launches", "size"), [(2, 4), (4, 1)])
def test_launches_at_once_train_each_run_once(
    launches: int, size: int, tmp_path: Path, whole: Callable[[int], dict[str, Any]]
) -> None:
    out, words = tmp_path / "out", f"hydra.launcher.pack_size={size}"
    with ExitStack() as stack:
        started = [
            stack.enter_context(running(tmp_path / f"{i}.txt", *command(out, words)))
            for i in range(launches)
        ]
        assert [one.wait() for one in started] == [0] * launches, [one.said for one in started]
    check_each_was_trained_once(out, whole(size))
    for one in started:
        assert "4 of 4 runs done" in one.said and "Traceback" not in one.said
    # One pack: the second can only wait, and says so.
    waited = [one for one in started if "waiting for process" in one.said]
    assert len(waited) == 1 or size == 1
    commands = SweepFolder(out / "default").read().commands
    assert len(commands) == launches


@pytest.mark.slow
def test_a_launch_that_waits_takes_over_from_one_that_is_killed(
    tmp_path: Path, whole: Callable[[int], dict[str, Any]]
) -> None:
    out = tmp_path / "out"
    words = command(out, "trainer.checkpoint_every=2", "hydra.launcher.pack_size=4")
    with running(tmp_path / "first.txt", *words, before=lambda: slowly(3.0)) as first:
        wait_for(lambda: list(out.glob("*/*/checkpoint/checkpoint.json")))
        with running(tmp_path / "second.txt", *words) as second:
            wait_for(lambda: "waiting for process" in second.said)
            first.send(signal.SIGKILL)
            assert first.wait() == -signal.SIGKILL
            assert second.wait() == 0, second.said
    assert f"process {first.pid} on" in second.said and "was killed; taken over" in second.said
    check_each_was_trained_once(out, whole(4))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a sweep: when it was written, and what is in it."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".locks" not in path.parts
    }


@pytest.mark.slow
def test_a_launch_that_was_suspended_for_too_long_writes_nothing_more(
    tmp_path: Path, whole: Callable[[int], dict[str, Any]]
) -> None:
    """SIGSTOP for longer than worker.stale_seconds, another finishes, SIGCONT."""
    out = tmp_path / "out"
    words = command(out, "trainer.checkpoint_every=2", "worker.stale_seconds=2")
    words.append("hydra.launcher.pack_size=4")
    with running(tmp_path / "first.txt", *words, before=slowly) as first:
        wait_for(lambda: list(out.glob("*/*/checkpoint/checkpoint.json")))
        first.send(signal.SIGSTOP)
        with running(tmp_path / "second.txt", *words) as second:
            assert second.wait() == 0, second.said
        assert f"process {first.pid} on" in second.said
        assert "has not answered for" in second.said and "(limit 2 s); taken over" in second.said
        check_each_was_trained_once(out, whole(4))
        before = snapshot(out)
        first.send(signal.SIGCONT)
        assert first.wait() == 0, first.said
    assert snapshot(out) == before
    assert "taken over" in first.said and "nothing more is written here" in first.said
    assert "4 of 4 runs done" in first.said


@pytest.mark.slow
def test_work_trains_every_pack_that_is_left(
    tmp_path: Path, whole: Callable[[int], dict[str, Any]]
) -> None:
    """`lorabench work DIR` needs no words of the commands, whoever asked for what."""
    out = tmp_path / "out"
    words = command(out, "hydra.launcher.pack_size=2", "trainer.checkpoint_every=2")
    with running(tmp_path / "first.txt", *words, before=slowly) as first:
        wait_for(lambda: list(out.glob("*/*/checkpoint/checkpoint.json")))
        first.send(signal.SIGTERM)
        assert first.wait() == 143
    assert len(records(out)) == 2, "of the first pack; the second has only a plan"
    assert {one["status"] for one in records(out).values()} == {"interrupted"}
    said = say("work", out / "default")
    assert said.code == 0 and "4 of 4 runs done" in said.err
    check_each_was_trained_once(out, whole(2))
    again = say("work", out / "default")
    assert again.code == 0
    assert again.lines[0] == "4 of 4 runs have what was asked for, 0 to do"


@pytest.mark.slow
def test_a_command_for_some_runs_of_a_pack_that_has_begun_keeps_its_shape(
    tmp_path: Path, whole: Callable[[int], dict[str, Any]]
) -> None:
    """The slots of the others are idle; later they are trained in the same shape."""
    out = tmp_path / "out"
    words = command(out, "hydra.launcher.pack_size=4", "trainer.checkpoint_every=2")
    with running(tmp_path / "first.txt", *words, before=slowly) as first:
        wait_for(lambda: list(out.glob("*/*/checkpoint/checkpoint.json")))
        first.send(signal.SIGTERM)
        assert first.wait() == 143
    one = [word if word != GRID[1] else "seed=1" for word in words]
    assert say(*one).code == 0
    found = records(out)
    by_seed = {seed: [r for r in found.values() if r["config"]["seed"] == seed] for seed in (0, 1)}
    assert [r["status"] for r in by_seed[1]] == ["finished"] * 2
    assert [r["status"] for r in by_seed[0]] == ["interrupted"] * 2
    assert say(*words).code == 0
    check_each_was_trained_once(out, whole(4))


def test_a_command_for_some_runs_of_a_pack_that_has_not_begun_splits_it(tmp_path: Path) -> None:
    """Nobody's bits depend on its shape yet, so the command need not carry the others along."""
    out = tmp_path / "out"
    folder = SweepFolder(out / "default")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorabench.worker.work.train_pack", stop)
        patch.setattr("lorabench.worker.members.begin", lambda member: None)
        patch.setattr("lorabench.worker.work.Worker._close", lambda *_: None)
        assert say(*command(out)).code == 130
    (pack,) = folder.read().current_packs()
    assert len(pack.runs) == 4 and not records(out)
    assert say("train", *FAST, "head=lora", "seed=1", f"trainer.steps={STEPS}",
               f"output_dir={out}").code == 0  # fmt: skip
    ((run, record),) = records(out).items()
    assert record["plan"]["pack"]["members"] == [run]
    sizes = [len(one.runs) for one in folder.read().current_packs()]
    assert sorted(sizes) == [1, 3] and len(folder.read().packs) == 3, "nothing is removed"


@pytest.mark.slow
def test_runs_lists_what_is_only_planned(tmp_path: Path) -> None:
    """sweep.json has every run, before any of them has a record."""
    out = tmp_path / "out"
    with running(tmp_path / "first.txt", *command(out, "hydra.launcher.pack_size=2"),
                 before=slowly) as first:  # fmt: skip
        wait_for(lambda: list(out.glob("*/*/metrics.jsonl")))
        shown = json.loads(say("runs", out / "default", "--json").out)
        assert sorted(run["status"] for run in shown) == ["planned"] * 2 + ["running"] * 2
        first.send(signal.SIGKILL)
        first.wait()
    statuses = sorted(
        run["status"] for run in json.loads(say("runs", out / "default", "--json").out)
    )
    assert statuses == ["interrupted"] * 2 + ["planned"] * 2
    assert say("runs", out / "default").out.count("planned") == 2
    table = json.loads(say("compare", out / "default", "--json").out)
    assert sorted(map(len, table["left_out"].values())) == [2, 2]


@pytest.mark.slow
def test_a_pack_that_another_process_finishes_first_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at what is left and the lease, the other one is done."""
    from lorabench import lease

    out = tmp_path / "out"
    take = lease.take

    def late(path: Path, *rest: Any) -> Any:
        monkeypatch.setattr(lease, "take", take)
        # A fresh interpreter: a fork would be in the middle of this one's command.
        other = [sys.executable, "-m", "lorabench", *command(out)]
        subprocess.run(other, check=True, capture_output=True)
        return take(path, *rest)

    monkeypatch.setattr(lease, "take", late)
    said = say(*command(out))
    assert said.code == 0 and "by another process" in said.err, said.err
    assert all(len(record["evaluations"]) == 1 for record in records(out).values())


@pytest.mark.slow
@pytest.mark.parametrize("when", ["saving", "checkpoint"])
def test_an_interrupt_at_the_worst_moment_is_heard_and_loses_nothing(
    when: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Callable[[int], dict[str, Any]],
) -> None:
    import os

    from lorabench import adapters, checkpoint

    out = tmp_path / "out"
    if when == "saving":  # the last step is done; nothing is recorded yet
        save = adapters.save

        def signalled(*arguments: Any) -> str:
            monkeypatch.setattr(adapters, "save", save)
            os.kill(os.getpid(), signal.SIGTERM)
            return save(*arguments)

        monkeypatch.setattr(adapters, "save", signalled)
        assert say(*command(out)).code == 143
        assert {r["status"] for r in records(out).values()} == {"trained"}
    else:  # the disk is full when the checkpoint is to be kept
        step = Display.step

        def interrupt(self: Display, number: int, *rest: Any) -> None:
            step(self, number, *rest)
            if number == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Display, "step", interrupt)
        monkeypatch.setattr(checkpoint, "write", full)
        assert say(*command(out, "hydra.launcher.pack_size=2")).code == 143
        assert {r["status"] for r in records(out).values()} == {"interrupted"}
        assert len(records(out)) == 2, "the next pack is not begun"
    monkeypatch.undo()
    size = 4 if when == "saving" else 2
    assert say(*command(out, f"hydra.launcher.pack_size={size}")).code == 0
    check_each_was_trained_once(out, whole(size))


def test_two_sweeps_of_one_command_are_told_apart(tmp_path: Path) -> None:
    words = [word for word in command(tmp_path) if word not in GRID]
    said = say(*words, "sweep=x,y", "seed=0,1")
    assert said.code == 0 and "the same run" not in said.err and "run 4/4" in said.err
    assert said.lines[-2:] == [
        f"{tmp_path / name}: 2 of 2 runs done; lorabench compare {tmp_path / name}"
        for name in ("x", "y")
    ]


@pytest.mark.slow
def test_a_mate_that_was_last_scored_on_a_file_that_is_gone_does_not_matter(
    tmp_path: Path,
) -> None:
    """Its slot needs its adapter's shape, not its test set."""
    rows = [json.dumps({"prompt": f"{i}=", "completion": str(i)}) + "\n" for i in range(40)]
    train, test, other = (tmp_path / f"{name}.jsonl" for name in ("train", "test", "other"))
    train.write_text("".join(rows))
    test.write_text("".join(rows[:5]))
    other.write_text("".join(rows[5:9]))
    out = tmp_path / "out"
    words = ["train", "-m", "trainer=smoke", "tracker=none", "data=jsonl", "data.max_length=64",
             f"data.train.path={train}", f"data.test.path={test}", f"output_dir={out}"]  # fmt: skip
    assert say(*words, "seed=0,1").code == 0
    assert say(*words[:-2], f"data.test.path={other}", words[-1], "seed=1").code == 0
    other.unlink()
    assert say(*words, "seed=0", "data.metric=[nll_per_token]").code == 0
    counts = {r["config"]["seed"]: len(r["evaluations"]) for r in records(out).values()}
    assert counts == {0: 2, 1: 2}


def test_trackers_are_dropped_where_a_pack_is_lost_at_its_last_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would end their W&B runs; whoever has the pack now ends it too."""
    write, lost, dropped = Member.write, iter([True]), []

    def last(self: Member) -> None:
        if self.entry.status == "finished" and next(lost, False):
            raise lease.Lost("taken over by another process")
        write(self)

    monkeypatch.setattr(Member, "write", last)
    monkeypatch.setattr(tracking, "drop_all", lambda trackers: dropped.append(list(trackers)))
    said = say(*command(tmp_path / "out", "hydra.launcher.pack_size=2"))
    assert said.code == 0 and "taken over by another process" in said.err
    assert [len(trackers) for trackers in dropped] == [2]
    assert {entry["status"] for entry in records(tmp_path / "out").values()} == {"finished"}
