"""trackio and TensorBoard: a process of its own writes their files, from each run's metrics.jsonl.

The command only tells that process which runs start and end, through a thread, and waits for its
answers with a deadline. A process that hangs or fails is killed, and another one writes its runs
from their first row.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from lorabench.tracking import limits
from lorabench.tracking.mirrored import Backend, Ending, Mirrored, NoTracker

WRITER = Path(__file__).with_name("writer.py")
# Where trackio would send its rows to instead of writing them here.
ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID")


class LocalTracker(NoTracker):
    """One run that is written by another process: rows reach it through metrics.jsonl alone."""

    def __init__(self, mirrored: Mirrored, backend: Recorder):
        self.mirrored, self.backend = mirrored, backend
        self.ending = Ending({}, failed=True)
        self.error: str | None = None
        self.is_written = False

    def started(self) -> dict[str, Any]:
        """What the process must know to write the run."""
        mirrored = self.mirrored
        return {
            "start": mirrored.run_id,
            "project": mirrored.settings.project,
            "name": mirrored.name,
            "group": mirrored.sweep,
            "config": mirrored.config | {"notes": mirrored.notes, "tags": mirrored.tags},
            "run_folder": str(mirrored.run_folder),
        }

    def ended(self) -> dict[str, Any]:
        return {"end": self.mirrored.run_id, "summary": self.ending.summary}


class Recorder(Backend):
    """The process that writes the runs of a sweep folder, and what is asked of it."""

    def __init__(self, kind: str, folder: Path):
        self.kind, self.folder = kind, folder
        self.process: subprocess.Popen[str] | None = None
        self.lines: SimpleQueue[str | None] = SimpleQueue()
        self.answered = threading.Condition()
        self.trackers: dict[str, LocalTracker] = {}
        self.has_told = False
        self.ended_now: list[LocalTracker] = []  # that wait to be settled
        self.settled: list[LocalTracker] = []

    def start(self, mirrored: Mirrored) -> NoTracker:
        tracker = LocalTracker(mirrored, self)
        self.trackers[mirrored.run_id] = tracker
        try:
            self._say(tracker.started())
        except OSError as error:
            mirrored.notify(f"{self.kind}: cannot be started ({error}); the run goes on without it")
            return NoTracker()
        return tracker

    def end(self, tracker: NoTracker, ending: Ending) -> None:
        assert isinstance(tracker, LocalTracker)
        tracker.ending = ending
        self.ended_now.append(tracker)

    def settle(self, seconds: float, rewrites: bool = True) -> None:
        self._end(self.ended_now, seconds)
        lost = [tracker for tracker in self.ended_now if not tracker.is_written]
        if lost:
            self._kill()
        if lost and rewrites:
            for tracker in lost:
                tracker.error = None
                with contextlib.suppress(OSError):
                    self._say(tracker.started())
            self._end(lost, limits.REWRITE_SECONDS)
            if not all(tracker.is_written for tracker in lost):
                self._kill()
        self.settled += self.ended_now if rewrites else []
        self.ended_now = []

    def close(self) -> None:
        if self.process is None:
            return
        self.lines.put(None)
        try:
            self.process.wait(limits.CLIENT_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()

    def told(self) -> list[str]:
        lost = [tracker for tracker in self.settled if not tracker.is_written]
        if not lost:
            return []
        return [
            f"{self.kind}: {len(lost)} of {len(self.settled)} runs could not be written"
            + (f" ({lost[0].error})" if lost[0].error else "")
            + "; metrics.jsonl in their folders has all rows"
        ]

    # --- the process -------------------------------------------------------------------------

    def _say(self, message: dict[str, Any]) -> None:
        """Tell the process something; it is started where there is none."""
        if self.process is None or self.process.poll() is not None:
            self._launch()
        self.lines.put(json.dumps(message, default=str))

    def _launch(self) -> None:
        environment = {name: text for name, text in os.environ.items() if name not in ELSEWHERE}
        environment.setdefault("TRACKIO_DIR", str(self.folder.absolute() / "trackio"))
        self.lines = SimpleQueue()
        self.process = subprocess.Popen(
            # -P: its folder is not on the path, where its neighbours could be taken for packages.
            [sys.executable, "-P", str(WRITER), self.kind, str(self.folder.absolute())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # Ctrl-C is for the command, which then tells how runs end
        )
        feeding = threading.Thread(
            target=_feed, args=[self.process.stdin, self.lines], daemon=True
        )
        hearing = threading.Thread(target=self._hear, args=[self.process], daemon=True)
        feeding.start()
        hearing.start()

    def _hear(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError, OSError), process.stdout as answers:
            for line in answers:
                answer = json.loads(line)
                with self.answered:
                    tracker = self.trackers[answer["run"]]
                    tracker.error = answer["error"]
                    tracker.is_written = answer["error"] is None
                    self.answered.notify_all()
                if tracker.error is not None and not self.has_told:
                    self.has_told = True
                    tracker.mirrored.notify(f"{self.kind}: {tracker.error}; the run goes on")
        process.wait()
        with self.answered:
            self.answered.notify_all()

    def _end(self, trackers: Sequence[LocalTracker], seconds: float) -> None:
        """End runs, and wait for the answers."""
        process = self.process
        if process is None or not trackers:
            return
        for tracker in trackers:
            self.lines.put(json.dumps(tracker.ended(), default=str))

        def is_done() -> bool:
            return process.poll() is not None or all(
                tracker.is_written or tracker.error for tracker in trackers
            )

        with self.answered:
            self.answered.wait_for(is_done, seconds)

    def _kill(self) -> None:
        """Kill the process, also a stopped one."""
        if self.process is not None:
            self.lines.put(None)
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(limits.CLIENT_SECONDS)
            self.process = None


def _feed(pipe: IO[str], lines: SimpleQueue[str | None]) -> None:
    """Write lines to the process; it may not take them."""
    with contextlib.suppress(ValueError, OSError), pipe:
        while (line := lines.get()) is not None:
            pipe.write(line + "\n")
            pipe.flush()
