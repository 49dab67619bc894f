"""kill -9 at any moment: what a repeat ends with is what an undisturbed sweep ends with."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from processes import slowly, start

from faults.sweeps import (
    CHECKPOINTED,
    EVERY,
    killed_at,
    leftovers,
    operations,
    outcome,
    repeated,
)


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The operations on files of each kind of command."""
    return {
        kind: operations(words, tmp_path_factory.mktemp(kind))
        for kind, words in CHECKPOINTED.items()
    }


@pytest.mark.faults
def test_between_the_records_of_two_that_trained_together(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    killed_at(8, CHECKPOINTED["pack"], folder, of=".record.json")
    assert repeated(CHECKPOINTED["pack"], folder) == [10]
    assert outcome(folder) == undisturbed["pack"]
    assert not leftovers(folder)


PARTS = 4  # of a window, so that several processes can share it


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_at_every_file_operation_from_the_second_checkpoint_to_the_last_record(
    kind: str,
    part: int,
    undisturbed: dict[str, Any],
    listed: dict[str, list[str]],
    tmp_path: Path,
) -> None:
    done, expected = listed[kind], undisturbed[kind]
    second = [n for n, what in enumerate(done, 1) if "os.mkdir" in what and ".checkpoint." in what]
    begin = second[len(expected)]  # of the second checkpoint
    assert len(done) - begin > 15, done
    for number in range(begin + part, len(done) + 1, PARTS):
        folder = tmp_path / str(number)
        killed_at(number, CHECKPOINTED[kind], folder)
        steps = repeated(CHECKPOINTED[kind], folder)
        told = f"killed before {done[number - 1]}"
        assert outcome(folder) == expected, told
        assert not leftovers(folder), told
        assert all(step >= EVERY for step in steps[:1]), f"{told}: trained from step {steps}"


@pytest.mark.faults
@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_twenty_times_at_random(kind: str, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    expected = undisturbed[kind]
    rng, folder = random.Random(kind), tmp_path / "runs"
    words = [*CHECKPOINTED[kind], "trainer.checkpoint_every=2", f"output_dir={folder}"]
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
