"""Data, tokenizer and base that change at every stage of a run."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import recorded_runs, say
from processes import start, wait_for

from faults.sweeps import ALONE, outcome
from lorabench.progress import Display


class Place(NamedTuple):
    """A base and its data, which a test may change, and the command that trains on them."""

    base: Path
    data: Path
    out: Path

    @property
    def words(self) -> list[str]:
        drawn = ("data.num_train", "data.num_validation", "data.num_test")
        words = [word for word in ALONE if not word.startswith(drawn)]
        return [
            *words, "model=local", f"model.path={self.base}", "data=jsonl", "data.max_length=64",
            f"data.train.path={self.data}", f"output_dir={self.out}",
            "trainer.checkpoint_every=2",
        ]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Place:
    found = Place(tmp_path / "base", tmp_path / "data.jsonl", tmp_path / "out")
    shutil.copytree(tiny_folder("llama"), found.base)
    rows = ({"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(40))
    found.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def change_data(place: Place) -> None:
    place.data.write_text(place.data.read_text().replace('"7"', '"8"'))


def change_tokenizer(place: Place) -> None:
    file = place.base / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"clean_up_tokenization_spaces": 1}))


def change_base(place: Place) -> None:
    file = place.base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 8
    file.write_bytes(content)


CHANGES = {
    "data": (change_data, "data.train: must still be the data that was planned"),
    "tokenizer": (change_tokenizer, "model.path: "),
    "base": (change_base, "model.path: "),
}


@pytest.fixture
def expected(place: Place) -> dict[str, Any]:
    """What the run ends with if nothing changes."""
    assert say(*place.words).code == 0
    found = outcome(place.out)
    shutil.rmtree(place.out)
    return found


@pytest.mark.faults
@pytest.mark.parametrize("what", CHANGES)
def test_after_the_plan(what: str, place: Place, tmp_path: Path) -> None:
    change, law = CHANGES[what]

    def before() -> None:
        from lorabench.worker.shared import Shared

        check = Shared.check_data

        def changed(self: Shared, jobs: Any) -> Any:
            change(place)
            return check(self, jobs)

        Shared.check_data = changed  # type: ignore[method-assign]

    process = start(tmp_path / "said.txt", *place.words, before=before)
    assert process.wait() in (1, 2)
    assert any(law in line for line in process.said.splitlines()), process.said
    assert "defect" not in process.said and "Traceback" not in process.said
    assert all(entry["status"] == "failed" for _, entry in recorded_runs(place.out))


@pytest.mark.faults
@pytest.mark.parametrize("what", CHANGES)
def test_while_it_trains(what: str, place: Place, expected: dict[str, Any], tmp_path: Path) -> None:
    """What was planned is in memory: the run is the one it says it is."""
    change, _ = CHANGES[what]

    def before() -> None:
        step = Display.step

        def changed(self: Display, now: int, *rest: Any) -> None:
            if now == 3:
                change(place)
            step(self, now, *rest)

        Display.step = changed  # type: ignore[method-assign]

    process = start(tmp_path / "said.txt", *place.words, before=before)
    assert process.wait() == 0, process.said
    assert outcome(place.out) == expected
    # The same words mean another run now; this one stays as it is.
    assert say(*place.words).code == 0
    found = outcome(place.out)
    (run,) = expected
    assert len(found) == 2 and found[run] == expected[run]


@pytest.mark.faults
@pytest.mark.parametrize("what", CHANGES)
def test_between_a_kill_and_the_repeat(
    what: str, place: Place, expected: dict[str, Any], tmp_path: Path
) -> None:
    change, _ = CHANGES[what]
    (run,) = expected

    def before() -> None:
        from processes import slowly

        slowly()

    process = start(tmp_path / "said.txt", *place.words, before=before)
    wait_for(lambda: list(place.out.glob("*/*/.checkpoint.old")))
    process.send(signal.SIGKILL)
    process.wait()
    kept = tmp_path / "kept"
    shutil.copytree(place.base, kept / "base")
    shutil.copy(place.data, kept)
    change(place)
    said = say("work", place.out / "default")
    assert said.code in (1, 2) and f"run {run} must still resolve to what was planned" in said.err
    assert {e["status"] for _, e in recorded_runs(place.out)} <= {"running", "interrupted"}
    shutil.rmtree(place.base)
    shutil.copytree(kept / "base", place.base)
    shutil.copy(kept / place.data.name, place.data)
    assert say("work", place.out / "default").code == 0
    assert outcome(place.out) == expected


@pytest.mark.faults
@pytest.mark.parametrize("what", ["tokenizer", "base"])
def test_between_training_and_scoring(
    what: str, place: Place, expected: dict[str, Any], tmp_path: Path
) -> None:
    change, law = CHANGES[what]
    assert say(*place.words).code == 0
    change(place)
    said = say("evaluate", place.out / "default", "data.metric=[nll_per_token]")
    assert said.code in (1, 2) and law in said.err
    assert outcome(place.out) == expected
