"""A disk that fills at each stage of a run: said in a line, and nothing that was saved is lost."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import say
from processes import start

from faults.sweeps import ALONE, PACK, at_each_operation, leftovers, outcome, repeated
from lorabench import model as base_model

COMMANDS = {
    kind: [*words, "trainer.checkpoint_every=5"]
    for kind, words in {"pack": PACK, "alone": ALONE}.items()
}
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


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of its own, of 8 MB if the test does not say otherwise."""
    place, size = tmp_path / "disk", getattr(request, "param", "8m")
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here: needs root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> None:
    """Leave no room at all."""
    with open(disk / "ballast", "ab", buffering=0) as file:
        for block in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * block)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("disk", ["2m"], indirect=True)
def test_runs_that_have_no_room_are_refused_before_a_base_is_loaded(disk: Path) -> None:
    for verb in ("plan", "train"):
        said = say(verb, *PACK[1:], "lora.r=16,32", f"output_dir={disk}")
        assert said.code == 2 and not any(disk.iterdir())
        assert re.fullmatch(
            r"disk: must have room for 4 runs, 2\.5 MB, and for checkpoints, 11\.5 MB; "
            rf"got 2\.1 MB free at '{disk}'; make room, or set output_dir=\.\.\. on another disk\n",
            said.err,
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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = {}
    for kind, words in COMMANDS.items():
        folder = tmp_path_factory.mktemp(kind)
        assert say(*words, f"output_dir={folder}").code == 0
        found[kind] = outcome(folder)
    return found


@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", COMMANDS)
def test_it_fills_at(
    kind: str, stage: str, undisturbed: dict[str, Any], disk: Path, tmp_path: Path
) -> None:
    what, numbers, steps = STAGES[stage]
    folder, count = disk / "out", iter(range(1, 10**6))

    def act(_: int, operation: str) -> None:
        if what in operation and next(count) == numbers[kind]:
            fill(disk)

    words = [*COMMANDS[kind], f"output_dir={folder}"]
    process = start(tmp_path / "said.txt", *words, before=partial(at_each_operation, act, folder))
    assert process.wait() in (1, 2), process.said
    assert (disk / "ballast").exists(), "the stage was never reached"
    assert "No space left on device" in process.said
    assert "Traceback" not in process.said and "defect" not in process.said
    (disk / "ballast").unlink()
    assert repeated(COMMANDS[kind], folder) == steps
    assert outcome(folder) == undisturbed[kind]
    assert not leftovers(folder)
