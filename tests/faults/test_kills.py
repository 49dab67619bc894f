"""kill -9 at any moment: what a repeat ends with is what an undisturbed sweep ends with."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import say
from processes import slowly, start

from faults.sweeps import (
    ALONE,
    PACK,
    STEPS,
    killed_at,
    leftovers,
    operations,
    outcome,
    repeated,
)

EVERY = 5
COMMANDS = {
    "pack": [*PACK, f"trainer.checkpoint_every={EVERY}"],
    "alone": [*ALONE, f"trainer.checkpoint_every={EVERY}"],
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By kind of command: its operations on files, and what it ends with."""
    found = {}
    for kind, words in COMMANDS.items():
        place = tmp_path_factory.mktemp(kind)
        # In this process, so that the forks find everything imported.
        assert say(*words, f"output_dir={place / 'whole'}").code == 0
        found[kind] = operations(words, place), outcome(place / "whole")
    return found


@pytest.mark.faults
def test_between_the_records_of_two_that_trained_together(tmp_path: Path) -> None:
    assert say(*COMMANDS["pack"], f"output_dir={tmp_path / 'whole'}").code == 0
    folder = tmp_path / "killed"
    killed_at(8, COMMANDS["pack"], folder, of=".record.json")
    assert repeated(COMMANDS["pack"], folder) == [10]
    assert outcome(folder) == outcome(tmp_path / "whole")
    assert not leftovers(folder)


PARTS = 4  # of a window, so that several processes can share it


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", COMMANDS)
def test_at_every_file_operation_from_the_second_checkpoint_to_the_last_record(
    kind: str, part: int, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    done, expected = undisturbed[kind]
    second = [n for n, what in enumerate(done, 1) if "os.mkdir" in what and ".checkpoint." in what]
    begin = second[len(expected)]  # of the second checkpoint
    assert len(done) - begin > 15, done
    for number in range(begin + part, len(done) + 1, PARTS):
        folder = tmp_path / str(number)
        killed_at(number, COMMANDS[kind], folder)
        steps = repeated(COMMANDS[kind], folder)
        told = f"killed before {done[number - 1]}"
        assert outcome(folder) == expected, told
        assert not leftovers(folder), told
        assert all(step >= EVERY for step in steps[:1]), f"{told}: trained from step {steps}"


@pytest.mark.faults
@pytest.mark.parametrize("kind", COMMANDS)
def test_twenty_times_at_random(kind: str, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    _, expected = undisturbed[kind]
    rng, folder = random.Random(kind), tmp_path / "runs"
    words = [*COMMANDS[kind], "trainer.checkpoint_every=2", f"output_dir={folder}"]
    kills = 0
    while kills < 20:
        process = start(tmp_path / "said.txt", *words, before=lambda: slowly(0.3))
        deadline = time.monotonic() + rng.uniform(0.2, 2)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is None:
            process.send(signal.SIGKILL)
            process.wait()
            kills += 1
        else:  # it was faster: from the start, with what is left of the kills
            assert process.code == 0 and outcome(folder) == expected
            folder.rename(tmp_path / f"whole-{kills}")
    repeated(words[:-1], folder)
    assert outcome(folder) == expected
    assert not leftovers(folder)
    assert STEPS == 12
