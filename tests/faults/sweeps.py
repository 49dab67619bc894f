"""Small sweeps to break, what counts of them in the end, and kills at a chosen file operation."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from conftest import recorded_runs, scores
from processes import start

STEPS = 12
FAST = [
    "tracker=none", "data.num_train=32", "data.num_validation=4", "data.num_test=4",
    f"trainer.steps={STEPS}", "trainer.batch_size=2", "trainer.num_threads=1", "lora.r=4",
    "trainer.log_every=1", "target_modules=attention",
]  # fmt: skip
PACK = ["train", "-m", *FAST, "seed=0,1"]
ALONE = ["train", *FAST]
EVERY = 5  # steps between checkpoints
CHECKPOINTED = {
    kind: [*words, f"trainer.checkpoint_every={EVERY}"]
    for kind, words in {"pack": PACK, "alone": ALONE}.items()
}


def outcome(folder: Path) -> dict[str, Any]:
    """What counts of every run: how it ended, its bits, its scores, each step logged once."""
    return {
        entry["run_id"]: (
            entry["status"], entry["error"], entry["steps_done"], entry["hashes"], scores(entry),
            [line.partition(",")[0] for line in (run / "metrics.jsonl").read_text().splitlines()],
        )
        for run, entry in recorded_runs(folder)
    }  # fmt: skip


def leftovers(folder: Path) -> list[Path]:
    """What a sweep that has ended must not leave behind."""
    return [
        path
        for pattern in ("*/*/checkpoint", "*/*/.*", "*/*/*/.*", "*/.locks/*.alive")
        for path in folder.glob(pattern)
        if path.name != ".hydra"
        and path.parent.name != ".hydra"
        and not path.name.startswith(".clock.")  # of a moment; removed after a minute
    ]


def at_each_operation(act: Callable[[int, str], None], below: Path) -> None:
    """In the child: call `act` before every operation that changes files of a run, with its number.

    Python's own audit events; what safetensors and pyarrow write natively lies between them.
    """
    count = iter(range(1, 10**6))
    of_there = ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in (*of_there, "open", "os.mkdir"):
            return
        path = str(arguments[0])
        if not path.startswith(str(below)) or "/.locks/" in path or "/.hydra" in path:
            return
        if event == "open":
            changes = bool(arguments[2] & os.O_CREAT)
        else:
            changes = os.path.lexists(path) == (event in of_there)
        if changes and threading.current_thread() is threading.main_thread():
            act(next(count), f"{event} {path.removeprefix(str(below))}")

    sys.addaudithook(heard)


def operations(words: Sequence[Any], place: Path) -> list[str]:
    """Every operation that a command does on files of its runs, in order."""
    listed = place / "operations.txt"

    def note(_: int, what: str) -> None:
        with open(listed, "a") as file:
            file.write(what + "\n")

    words = [*words, f"output_dir={place / 'listed'}"]
    process = start(
        place / "listed.txt", *words, before=partial(at_each_operation, note, place / "listed")
    )
    assert process.wait() == 0, process.said
    return listed.read_text().splitlines()


def killed_at(number: int, words: Sequence[Any], folder: Path, of: str = "") -> None:
    """Run a command that is killed before its operation of that number.

    Args:
        of: count only operations that contain this.
    """
    count = iter(range(1, 10**6))

    def kill(_: int, what: str) -> None:
        if of in what and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    words, said = [*words, f"output_dir={folder}"], folder.with_suffix(".txt")
    process = start(said, *words, before=partial(at_each_operation, kill, folder))
    assert process.wait() == -signal.SIGKILL, f"it was not killed at {number}: {process.said}"


def told_where_it_starts() -> None:
    """In the child: say from which step a pack trains."""
    from lorabench import train

    begin = train.train

    def said(pack: Any, tokens: Any, pad_id: int, start_step: int = 0) -> Any:
        print(f"trains from step {start_step}", flush=True)
        return begin(pack, tokens, pad_id, start_step)

    train.train = said


def repeated(words: Sequence[Any], folder: Path) -> list[int]:
    """Repeat a command to its end; the steps from which its packs went on."""
    words = [*words, f"output_dir={folder}"]
    process = start(folder.with_suffix(".txt"), *words, before=told_where_it_starts)
    assert process.wait() == 0, process.said
    lines = process.said.splitlines()
    return [int(line.split()[-1]) for line in lines if line.startswith("trains from step")]
