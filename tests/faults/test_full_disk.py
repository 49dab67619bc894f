"""A disk that fills at each stage of a run: said in a line, and nothing that was saved is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import say
from processes import start

from faults.sweeps import CHECKPOINTED, PACK, at_each_operation, leftovers, outcome, repeated
from lorabench import model as base_model

# What the operation that finds the disk full is on, which of its kind it is in a pack of two and
# alone, and from which step the repeat goes on; none: nothing is trained again.
STAGES: dict[str, tuple[str, dict[str, int], list[int]]] = {
    "before anything": ("/.config.yaml", {"pack": 1, "alone": 1}, [0]),
    "the first checkpoint": (".checkpoint.1.part", {"pack": 1, "alone": 1}, [0]),
    "the second checkpoint": (".checkpoint.1.part", {"pack": 7, "alone": 4}, [5]),
    "the adapter": (".adapter.1.part", {"pack": 1, "alone": 1}, [10]),
    "the record of the adapter": ("/.record.json", {"pack": 5, "alone": 3}, [10]),
    "the predictions": ("/evaluations", {"pack": 1, "alone": 1}, []),
    "the last record": ("/.record.json", {"pack": 9, "alone": 5}, []),
}


SIZE = 8 << 20


@contextlib.contextmanager
def small_disk(place: Path, size: int = SIZE) -> Iterator[bool]:
    """A file system of that many bytes at `place`; False where none can be mounted."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    is_mounted = not subprocess.run(words, capture_output=True, check=False).returncode
    yield is_mounted
    if is_mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextlib.contextmanager
def nothing(place: Path) -> Iterator[bool]:
    """As on a machine that lets its user mount nothing."""
    place.mkdir()
    yield False


class Filling:
    """A disk that has no room from one operation on, until its ballast is thrown off.

    Where it could not be mounted, it is full in that what makes files and folders fails.
    """

    def __init__(self, disk: Path, is_mounted: bool):
        self.disk, self.is_mounted, self.ballast = disk, is_mounted, disk / "ballast"

    def fill(self) -> None:
        with open(self.ballast, "ab", buffering=0) as file:
            for block in (1 << 20, 1 << 12, 1) if self.is_mounted else ():
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"\0" * block)

    def refuse(self, operation: str) -> None:
        kind, _, path = operation.partition(" ")
        if not self.is_mounted and self.ballast.exists() and kind in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


@pytest.mark.usefixtures("no_weights")
def test_runs_that_have_no_room_are_refused_before_a_base_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 2 << 20) as is_mounted:
        if not is_mounted:
            usage = shutil.disk_usage(tmp_path)._replace(free=2 << 20)
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        for verb in ("plan", "train"):
            said = say(verb, *PACK[1:], "lora.r=16,32", f"output_dir={disk}")
            assert said.code == 2 and not any(disk.iterdir())
            assert said.err == (
                "disk: must have room for 4 runs, 2.5 MB, and for checkpoints, 11.5 MB; got 2.1 MB "
                f"free at '{disk}'; make room, or set output_dir=... on another disk\n"
            )
        assert say("plan", *PACK[1:], f"output_dir={disk}").code == 0


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("weights were loaded before the refusal")

    monkeypatch.setattr(base_model, "load_verified", refuse)


def closed_pipe() -> None:
    """In the child: whoever read what it says is gone."""
    readable, writable = os.pipe()
    os.close(readable)
    os.dup2(writable, 2)


def full_file() -> None:
    """In the child: what it says goes to a full disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)


@pytest.mark.faults
@pytest.mark.parametrize("before", [closed_pipe, full_file])
def test_what_is_said_reaches_nobody(before: Callable[[], None], tmp_path: Path) -> None:
    process = start(tmp_path / "said.txt", *PACK, f"output_dir={tmp_path / 'out'}", before=before)
    assert process.wait() == 0, process.said
    assert {one[0] for one in outcome(tmp_path / "out").values()} == {"finished"}
    assert not leftovers(tmp_path / "out")


@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("kind", "mounted"), [("pack", True), ("alone", True), ("pack", False)])
def test_it_fills_at(
    kind: str, stage: str, mounted: bool, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    what, numbers, steps = STAGES[stage]
    folder, count = tmp_path / "disk" / "out", iter(range(1, 10**6))
    with small_disk(tmp_path / "disk") if mounted else nothing(tmp_path / "disk") as is_mounted:
        filling = Filling(tmp_path / "disk", is_mounted)

        def act(_: int, operation: str) -> None:
            if what in operation and next(count) == numbers[kind]:
                filling.fill()
            filling.refuse(operation)

        words, said = [*CHECKPOINTED[kind], f"output_dir={folder}"], tmp_path / "said.txt"
        process = start(said, *words, before=partial(at_each_operation, act, folder))
        assert process.wait() in (1, 2), process.said
        assert filling.ballast.exists(), "the stage was never reached"
        assert "No space left on device" in process.said
        assert "Traceback" not in process.said and "defect" not in process.said
        filling.ballast.unlink()
        assert repeated(CHECKPOINTED[kind], folder) == steps
        assert outcome(folder) == undisturbed[kind]
        assert not leftovers(folder)
