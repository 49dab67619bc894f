"""The process that writes runs into a local tracker: a script that imports nothing of lorabench.

It follows the metrics.jsonl of each run. On stdin it is told, one JSON object per line, which runs
start ({"start": run id, ...}) and end ({"end": run id, "summary": values}); on stdout it answers
{"run": run id, "error": null or text} when a run is written. When stdin ends, because the command
has ended or was killed, it writes the rows that are there and exits.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

POLL_SECONDS = 1.0  # between looks for new rows
LOCK_SECONDS = 10.0  # for the writer of a command that was killed to finish


class Trackio:
    """A run in trackio's database of the project, TRACKIO_DIR/PROJECT.db."""

    def __init__(self, run: dict[str, Any], folder: Path):
        import trackio

        # trackio knows runs by their names: the id makes this one's its own.
        self.project, self.name = run["project"], f"{run['name']} {run['start']}"
        with contextlib.suppress(ValueError):  # no such project yet
            for earlier in trackio.Api().runs(self.project):
                if earlier.name.endswith(run["start"]):
                    earlier.delete()
        self.run = trackio.init(
            project=self.project,
            name=self.name,
            group=run["group"],
            config=run["config"],
            embed=False,
        )
        self.num_rows = 0

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)
        self.num_rows += 1

    def close(self) -> None:
        """Write what is left.

        Raises:
            OSError: rows are missing. trackio only warns of those that it could not store.
        """
        from trackio.sqlite_storage import SQLiteStorage

        self.run.finish()
        stored = SQLiteStorage.get_log_count(self.project, self.name)
        if stored != self.num_rows:
            raise OSError(
                f"{stored} of {self.num_rows} rows are in the database, as where its disk is full"
            )


class TensorBoard:
    """A run as event files in FOLDER/tensorboard/NAME; values are float32 there."""

    def __init__(self, run: dict[str, Any], folder: Path):
        from tensorboard.plugins.hparams import summary_v2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        place = folder / "tensorboard"
        for earlier in place.glob(f"*{run['start']}"):
            shutil.rmtree(earlier)
        name = re.sub(r"[^\w.=,+-]+", "_", run["name"])[:100]
        self.writer = EventFileWriter(str(place / f"{name}_{run['start']}"), flush_secs=10)
        plain = {k: v for k, v in run["config"].items() if isinstance(v, str | int | float)}
        self._add(summary_v2.hparams_pb(plain, trial_id=run["start"]), 0)

    def log(self, values: dict[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=x) for name, x in values.items()]
        self._add(Summary(value=scalars), step)

    def _add(self, summary: Any, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self.writer.close()


NOT_COMPARED = ("steps_done", "adapter_step")  # last values that say no more than the rows
KINDS: dict[str, type[Trackio] | type[TensorBoard]] = {
    "trackio": Trackio,
    "tensorboard": TensorBoard,
}


class Followed:
    """A run whose metrics.jsonl is read as it grows."""

    def __init__(self, kind: str, run: dict[str, Any], folder: Path):
        place = Path(run["run_folder"])
        self.lock = _lock(place)
        self.file = open(place / "metrics.jsonl", "rb")  # noqa: SIM115
        self.rest, self.step = b"", 0
        self.tracker = KINDS[kind](run, folder)

    def follow(self) -> None:
        """Write the rows that are new."""
        *lines, self.rest = (self.rest + self.file.read()).split(b"\n")
        for line in lines:
            values = json.loads(line)
            self.step = values.pop("step")
            values.pop("seconds", None)  # trackers have a clock of their own
            self.tracker.log(values, self.step)

    def end(self, summary: dict[str, Any]) -> None:
        """Write what is left, and the last values at the last step."""
        self.follow()
        numbers = {
            name if "/" in name else f"cost/{name}": x
            for name, x in summary.items()
            if _is_number(x) and name not in NOT_COMPARED
        }
        if numbers:
            self.tracker.log(numbers, self.step)
        self.close()

    def close(self) -> None:
        self.file.close()
        try:
            self.tracker.close()
        finally:
            os.close(self.lock)


def _is_number(value: Any) -> bool:
    is_plain = isinstance(value, int | float) and not isinstance(value, bool)
    return is_plain and math.isfinite(value)


def _lock(folder: Path) -> int:
    """Keep other writers from this run as long as the answer is open."""
    held, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return held
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        except OSError:
            return held  # a file system without such locks


class Writer:
    """All runs of this process."""

    def __init__(self, kind: str, folder: Path, answers: IO[str]):
        self.kind, self.folder, self.answers = kind, folder, answers
        self.runs: dict[str, Followed] = {}

    def serve(self, messages: SimpleQueue[dict[str, Any] | None]) -> None:
        while True:
            try:
                message = messages.get(timeout=POLL_SECONDS)
            except Empty:
                for run_id in [*self.runs]:
                    self.attempt(run_id, self.runs[run_id].follow)
                continue
            if message is None:
                break
            if "start" in message:
                self.attempt(message["start"], partial(self.start, message))
            elif message["end"] in self.runs:
                self.end(message["end"], message["summary"])
        for run_id, run in [*self.runs.items()]:
            self.attempt(run_id, partial(run.end, {}))

    def end(self, run_id: str, summary: dict[str, Any]) -> None:
        if self.attempt(run_id, partial(self.runs[run_id].end, summary)):
            del self.runs[run_id]
            self.answer(run_id, None)

    def start(self, message: dict[str, Any]) -> None:
        self.runs[message["start"]] = Followed(self.kind, message, self.folder)

    def attempt(self, run_id: str, action: Callable[[], None]) -> bool:
        """Do something for a run; what fails there leaves the others alone."""
        try:
            action()
        except Exception as error:
            self.runs.pop(run_id, None)
            text = str(error).splitlines() or [""]
            self.answer(run_id, f"{type(error).__name__}: {text[0]}")
            return False
        return True

    def answer(self, run_id: str, error: str | None) -> None:
        with contextlib.suppress(OSError):  # the command is gone
            print(json.dumps({"run": run_id, "error": error}), file=self.answers, flush=True)


def main(kind: str, folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # trackio prints
    messages: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def hear() -> None:
        for line in sys.stdin:
            messages.put(json.loads(line))
        messages.put(None)

    threading.Thread(target=hear, daemon=True).start()
    Writer(kind, Path(folder), answers).serve(messages)


if __name__ == "__main__":
    main(*sys.argv[1:])
