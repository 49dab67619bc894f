"""Memory that is really short: limits on the process, and the kernel's own kill."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import records, say
from processes import Process, slowly, start, start_call, wait_for

from faults.sweeps import FAST, PACK, outcome
from lorabench import cli, deaths, machine
from lorabench.progress import Display
from lorabench.worker.work import SMALLER

LARGE = [
    "train", "-m", *FAST, "trainer.steps=4", "trainer.batch_size=128", "data.num_train=128",
    "seed=0,1,2,3",
    "trainer.eval_base=false",  # nothing but the packs is to come near the limits of memory
]  # fmt: skip
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # malloc.h


def address_space(name: str) -> int:
    """Bytes of address space of this process: VmSize now, VmPeak at most so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


def of_the_kernel() -> int:
    """In the child: every tensor is asked of the kernel and given back to it.

    Returns:
        Bytes that it has before it begins.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    libc.mallopt(M_ARENA_MAX, 1)  # threads would reserve address space of their own
    return address_space("VmSize")


def limit(room: int) -> None:
    """In the child: from now on it can take so much more, and then malloc fails."""
    resource.setrlimit(resource.RLIMIT_AS, (of_the_kernel() + room, resource.RLIM_INFINITY))


def limit_at_step(number: int, room: int) -> None:
    """In the child: the limit comes in mid-training."""
    most, step = of_the_kernel() + room, Display.step

    def limited(self: Display, now: int, *rest: Any) -> None:
        if now == number:
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        step(self, now, *rest)

    Display.step = limited  # type: ignore[method-assign]


class Room(NamedTuple):
    """What packs take: the bytes that suffice for two runs and not for four."""

    bytes: int
    of_two: dict[str, Any]  # the outcome of packs of two where there is room


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    folder = tmp_path_factory.mktemp("room")
    assert say(*PACK, f"output_dir={folder / 'small'}").code == 0  # imports what a run imports

    def taken(size: int, *words: str) -> int:
        def measured() -> int:
            before = of_the_kernel()
            code = cli.main([*LARGE, *words, f"hydra.launcher.pack_size={size}"])
            print(f"\ntook {address_space('VmPeak') - before}")
            return code

        process = start_call(folder, measured)
        assert process.wait() == 0, process.said
        return int(process.said.split()[-1])

    two = taken(2, f"output_dir={folder / 'two'}")
    four = taken(4, f"output_dir={folder / 'four'}", "trainer.steps=1")
    assert four - two > 150 << 20
    return Room((two + four) // 2, outcome(folder / "two"))


@pytest.mark.faults
@pytest.mark.parametrize("when", ["at the start", "in the middle"])
def test_a_pack_that_does_not_fit_is_halved_and_trained_from_the_start(
    when: str, room: Room, tmp_path: Path
) -> None:
    before = {
        "at the start": lambda: limit(room.bytes),
        "in the middle": lambda: limit_at_step(2, room.bytes),
    }[when]
    words = [*LARGE, f"output_dir={tmp_path / 'out'}", "trainer.checkpoint_every=1"]
    process = start(tmp_path / "said.txt", *words, before=before)
    assert process.wait() == 0, process.said
    told = [line for line in process.said.splitlines() if "memory" in line]
    assert told == ["a pack of 4 does not fit into memory; trying packs of 2"]
    assert outcome(tmp_path / "out") == room.of_two


@pytest.mark.faults
def test_memory_that_runs_out_in_scoring_costs_smaller_batches(room: Room, tmp_path: Path) -> None:
    def before() -> None:
        from lorabench.worker import work

        score = work.score

        def short(*rest: Any) -> Any:
            limit(150 << 20)
            return score(*rest)

        work.score = short

    words = [*LARGE, f"output_dir={tmp_path / 'out'}", "hydra.launcher.pack_size=2"]
    words += ["trainer.eval_batch_size=2048", "data.num_test=2048"]
    process = start(tmp_path / "said.txt", *words, before=before)
    assert process.wait() == 0, process.said
    assert "scoring does not fit into memory; trying batches of 1024 examples" in process.said
    found = {run: entry["hashes"] for run, entry in records(tmp_path / "out").items()}
    assert found == {run: one[3] for run, one in room.of_two.items()}


@pytest.mark.faults
def test_a_run_alone_that_does_not_fit_fails_and_the_others_go_on(
    room: Room, tmp_path: Path
) -> None:
    words = ["train", "-m", *FAST, "data.num_train=512", "trainer.batch_size=8,512,4"]
    process = start(
        tmp_path / "said.txt", *words, f"output_dir={tmp_path}", before=lambda: limit(room.bytes)
    )
    assert process.wait() == 1
    assert "1 of 3 runs did not finish:" in process.said
    assert process.said.splitlines()[-1].endswith(SMALLER)
    assert "Traceback" not in process.said
    found = {e["config"]["trainer"]["batch_size"]: e for e in records(tmp_path).values()}
    assert [found[n]["status"] for n in (8, 512, 4)] == ["finished", "failed", "finished"]


# --- killed for memory -----------------------------------------------------------------------


def larger_than_planned() -> None:
    """In the child: the plan thinks that four fit. They fill their memory in no time."""
    deaths.LOOK_SECONDS = 0.005
    machine.free_memory = machine.total_memory = lambda device: 1 << 40


def killed_twice(launch: Callable[[Path], Process], folder: Path) -> list[str]:
    """Two launches that die without a word; what the third one says."""
    for n in range(2):
        process = launch(folder / f"killed-{n}.txt")
        assert process.wait() == -signal.SIGKILL, process.said
        assert "halved" not in process.said and "too large" not in process.said
    process = launch(folder / "third.txt")
    assert process.wait() == 0, process.said
    return [line for line in process.said.splitlines() if "memory" in line]


COPIED = 120 << 20  # pages of this process that a fork writes to
TOO_LARGE = re.compile(
    r"a pack of 4 is too large for memory: its process died 2 times without a message, the last "
    r"time with ([\d.]+) GB of the ([\d.]+) GB that were free at its start; trying packs of 2"
)


@contextlib.contextmanager
def group(most: int) -> Iterator[Callable[[], None] | None]:
    """What puts a child into a control group with a limit; None where no group can be made."""
    kinds = {machine.CGROUPS / "memory": "memory.limit_in_bytes", machine.CGROUPS: "memory.max"}
    root = next((root for root in kinds if (root / "cgroup.procs").exists()), machine.CGROUPS)
    place = root / f"lorabench-test-{os.getpid()}"
    procs = place / "cgroup.procs"
    try:
        place.mkdir()
        (place / kinds[root]).write_text(str(most))
    except OSError:  # not root, or /sys/fs/cgroup is not writable
        yield None
        return

    def enter() -> None:
        procs.write_text(str(os.getpid()))

    try:
        yield enter
    finally:
        wait_for(lambda: not procs.read_text().strip(), 10)
        place.rmdir()


def kill_beyond(most: int) -> None:
    """In the child: a thread does what the kernel does in a control group with that limit."""
    before, left = machine.resident_memory(), machine.available_memory

    def look() -> None:
        while machine.resident_memory() - before < most:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    def available() -> int:
        return min(left(), before + most - machine.resident_memory())

    machine.available_memory = available
    threading.Thread(target=look, daemon=True).start()


@pytest.mark.faults
@pytest.mark.parametrize("kernel", [True, False], ids=["by the kernel", "by a thread"])
def test_a_pack_that_was_killed_twice_for_memory_is_halved(
    kernel: bool, room: Room, tmp_path: Path
) -> None:
    """The kernel kills where a control group can be made, else a thread that watches as it does."""
    words, most = [*LARGE, f"output_dir={tmp_path / 'out'}"], room.bytes + COPIED
    with group(most) if kernel else contextlib.nullcontext() as enter:

        def inside() -> None:
            larger_than_planned()
            if enter is None:
                kill_beyond(most)
            else:
                enter()

        told = killed_twice(lambda said: start(said, *words, before=inside), tmp_path)
    (found,) = map(TOO_LARGE.fullmatch, told)
    assert found is not None and float(found[1]) > 0.9 * float(found[2])
    assert outcome(tmp_path / "out") == room.of_two
    assert not [*tmp_path.glob("out/*/.locks/*.memory.json")]


@pytest.mark.faults
@pytest.mark.parametrize("full", [True, False])
def test_two_kills_halve_a_pack_only_if_memory_was_full(
    full: bool, room: Room, tmp_path: Path
) -> None:
    """The same without the kernel, so that it can be seen on every machine."""
    words = [*LARGE, f"output_dir={tmp_path / 'out'}", "trainer.checkpoint_every=1"]

    def before() -> None:
        larger_than_planned()
        slowly(0.3)
        left = 0 if full else 1 << 40
        machine.available_memory = lambda: left

    def launch(said: Path) -> Process:
        process = start(said, *words, before=before)
        if said.stem != "third":
            wait_for(lambda: process.poll() is None and len(steps()) > len(seen))
            seen.update(steps())
            process.send(signal.SIGKILL)
        return process

    def steps() -> set[str]:
        files = tmp_path.glob("out/*/*/metrics.jsonl")
        return {line.partition(",")[0] for file in files for line in file.read_text().splitlines()}

    seen: set[str] = set()
    told = killed_twice(launch, tmp_path)
    sizes = {entry["plan"]["pack"]["size"] for entry in records(tmp_path / "out").values()}
    if full:
        assert len(told) == 1 and TOO_LARGE.fullmatch(told[0])
        assert sizes == {2} and outcome(tmp_path / "out") == room.of_two
    else:
        assert told == [] and sizes == {4}
