"""Many launches of one sweep at once, killed ones among them, and holders of other hosts."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import records, say
from processes import running, slowly, start, wait_for

from faults.sweeps import PACK, leftovers, outcome
from lorabench import lease

# Four packs of two.
GRID = [*PACK[:-1], "seed=0,1,2,3", "head=exclude,lora", "hydra.launcher.pack_size=2"]
CLONE_NEWUTS = 0x04000000  # sched.h


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert say(*GRID, f"output_dir={folder}").code == 0
    return outcome(folder)


@pytest.mark.faults
@pytest.mark.parametrize("number", [2, 4])
def test_launches_at_once(number: int, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    words = [*GRID, f"output_dir={tmp_path / 'out'}"]
    launches = [start(tmp_path / f"{n}.txt", *words) for n in range(number)]
    for one in launches:
        assert one.wait() == 0, one.said
    assert outcome(tmp_path / "out") == undisturbed
    assert not leftovers(tmp_path / "out")
    ends = [line for one in launches for line in one.said.splitlines() if "  finished" in line]
    assert len([line for line in ends if "by another process" not in line]) == len(undisturbed)


@pytest.mark.faults
def test_four_launches_of_which_one_is_killed_every_second(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    words = [*GRID, f"output_dir={tmp_path / 'out'}", "trainer.checkpoint_every=3"]
    rng, count = random.Random(0), iter(range(1000))

    def launch() -> Any:
        return start(tmp_path / f"{next(count)}.txt", *words, before=lambda: slowly(0.1))

    launches = [launch() for _ in range(4)]
    for _ in range(8):
        time.sleep(1)
        victim = rng.randrange(4)
        if launches[victim].poll() is None:
            launches[victim].send(signal.SIGKILL)
            launches[victim].wait()
        launches[victim] = launch()
    for one in launches:
        assert one.wait(300) == 0, one.said
    assert outcome(tmp_path / "out") == undisturbed
    assert not leftovers(tmp_path / "out")


def another_name() -> None:
    """In the child: the same machine under another name, as a container that is started again."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUTS) == 0 and libc.sethostname(b"node-b", 6) == 0:
        assert socket.gethostname() == "node-b"
    else:  # without the right to
        socket.gethostname = lambda: "node-b"


def another_machine() -> None:
    """In the child: another name, and another boot: no kernel lock tells whether it lives."""
    another_name()
    lease.boot_id = lambda: "of-another-machine"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("elsewhere", "said"),
    [
        (another_name, "on node-b was killed; taken over"),
        (another_machine, "on node-b has not answered for"),
    ],
)
def test_a_holder_that_died_under_another_hostname(
    elsewhere: Callable[[], None], said: str, tmp_path: Path
) -> None:
    words = [*PACK, f"output_dir={tmp_path / 'out'}", "trainer.checkpoint_every=2"]
    words.append("worker.stale_seconds=3")

    def before() -> None:
        elsewhere()
        slowly()

    with running(tmp_path / "killed.txt", *words, before=before) as process:
        wait_for(lambda: list(tmp_path.glob("out/*/*/.checkpoint.old")))
        assert say("runs", tmp_path / "out" / "default").out.count("running") == 2
        process.send(signal.SIGKILL)
        process.wait()
    again = say(*words)
    assert again.code == 0
    assert any(said in line and line.startswith("pack ") for line in again.lines), again.err
    assert {entry["status"] for entry in records(tmp_path / "out").values()} == {"finished"}
    assert say(*PACK, f"output_dir={tmp_path / 'whole'}").code == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    assert os.uname().nodename != "node-b"
