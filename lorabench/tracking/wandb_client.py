"""The W&B client, kept at arm's length.

It hands everything to a service process, wandb-core, and any of its calls can block: on a server
that does not answer, or on wandb-core itself. So only daemon threads call it, and whoever waits for
them has a deadline.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Full, Queue
from typing import Any

from lorabench import masking
from lorabench.config import first_line
from lorabench.tracking import limits, wandb_run, wandb_service
from lorabench.tracking.mirrored import Backend, Ending, Mirrored, NoTracker

ADAPTER = "adapter"  # in the queue: the adapter is saved


class WandbTracker(NoTracker):
    """One W&B run, fed by a thread."""

    def __init__(self, mirrored: Mirrored, client: Client):
        self.mirrored, self.backend = mirrored, client
        self.client = client
        self.queue: Queue[dict[str, Any] | str | Ending] = Queue(limits.QUEUED_ROWS)
        self.ending = Ending({}, failed=True)
        self.begun = time.time()
        self.place: Path | None = None  # W&B's folder of this run, once its file is whole
        self.is_sent = False  # or offline, where that was asked for
        self.is_broken = False  # a row was lost, or the client failed
        self.is_given_up = False  # nobody waits for the thread any more
        self.sending = threading.Thread()  # hands over the adapter
        self.thread = threading.Thread(target=self._mirror, daemon=True)
        self.thread.start()

    def log(self, row: dict[str, float], step: int) -> None:
        self._put({**row, "step": step, "_timestamp": time.time()})

    def save_adapter(self) -> None:
        settings = self.mirrored.settings
        if settings.log_adapter and settings.mode == "online":
            self._put(ADAPTER)

    def _put(self, item: dict[str, Any] | str) -> None:
        if self.is_broken:
            return
        try:
            self.queue.put_nowait(item)
        except Full:
            self.is_broken = True

    def set_torn_aside(self) -> None:
        """Rename what starts and clients that failed have left: a sync fails on it."""
        for file in self._files():
            with contextlib.suppress(OSError):
                if file.parent != self.place and file.stat().st_mtime >= self.begun:
                    file.replace(file.with_suffix(".torn"))

    def remove_earlier(self) -> None:
        """Remove what earlier starts of this run have written; the rows of it are logged again."""
        for file in self._files():
            with contextlib.suppress(OSError):
                if file.stat().st_mtime < self.begun:
                    shutil.rmtree(file.parent)

    def _files(self) -> list[Path]:
        name = f"run-{self.mirrored.run_id}.wandb"
        return list(self.mirrored.folder.glob(f"wandb/*run-*-{self.mirrored.run_id}/{name}"))

    def _mirror(self) -> None:
        doing = "start"
        try:
            run, mode = self.client.open(self)
            doing = "log"
            self.remove_earlier()
            ending = self._log_all(run, mode)
            if self.sending.is_alive():
                self.sending.join(limits.ADAPTER_SECONDS)
            doing = "finish"
            is_whole = wandb_run.finish(run, self.mirrored, ending)
            is_whole = is_whole and (mode == "offline" or not wandb_run.gave_up_sending(run))
        except Exception as error:  # whatever a network or a disk does, the run goes on
            self.is_broken = True
            if not self.is_given_up:
                self.mirrored.notify(
                    f"wandb: {doing} failed ({first_line(error)}); the run goes on, and is written "
                    f"offline when it has ended"
                )
            return
        finally:
            self.client.live.discard(self)
        if not self.is_broken:
            self.is_sent = is_whole and mode == self.mirrored.settings.mode
            self.place = Path(run.dir).parent
            if self.is_sent and mode == "online":
                self._mark_as_sent(self.place)
            self.set_torn_aside()

    def _log_all(self, run: Any, mode: str) -> Ending:
        """Log the rows of a resumed run, then those that come, until the run ends."""
        for item in self._items():
            if isinstance(item, Ending):
                return item
            if isinstance(item, str):
                if mode == "online":
                    self.sending = threading.Thread(
                        target=self._log_adapter, args=[run], daemon=True
                    )
                    self.sending.start()
            else:
                wandb_run.log(run, item)
        raise AssertionError("a tracker's rows end with its ending")

    def _items(self) -> Iterator[dict[str, Any] | str | Ending]:
        yield from self.mirrored.rows(self.mirrored.num_rows)
        while True:
            yield self.queue.get()

    def _log_adapter(self, run: Any) -> None:
        try:
            wandb_run.log_adapter(run, self.mirrored)
        except Exception as error:  # the rows are more than the adapter, which lies in its folder
            if not self.is_given_up:
                self.mirrored.notify(
                    f"wandb: the adapter of {self.mirrored.name} is not logged "
                    f"({first_line(error)})"
                )

    def _mark_as_sent(self, place: Path) -> None:
        with contextlib.suppress(OSError):
            (place / f"run-{self.mirrored.run_id}{wandb_run.SYNCED}").touch()


class Client(Backend):
    """The W&B client of this process: one service process, and the runs of a command."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # the client starts one run at a time
        self.live: set[WandbTracker] = set()  # with a run open in the service process
        self.is_used = False
        self.is_offline = False  # after the first failure no server is tried any more
        self.ended: list[WandbTracker] = []  # that wait to be settled
        self.settled: list[WandbTracker] = []

    def start(self, mirrored: Mirrored) -> NoTracker:
        os.environ["WANDB_SILENT"] = "true"  # without a key it would ask for one on the terminal
        # The client's reports on itself go to the same server, and at exit it waits for them.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            mirrored.notify(
                f"wandb: cannot be imported ({first_line(error)}); the run goes on without it"
            )
            return NoTracker()
        mirrored.folder.mkdir(parents=True, exist_ok=True)
        sys.argv = masking.mask(sys.argv)  # the client copies the command line
        return WandbTracker(mirrored, self)

    def open(self, tracker: WandbTracker) -> tuple[Any, str]:
        """Start a W&B run; offline if it cannot be online.

        Returns:
            The run and its mode.
        """
        mirrored = tracker.mirrored
        with self.lock:
            self.is_used = True
            mode = "offline" if self.is_offline else mirrored.settings.mode
            if tracker.is_given_up:
                raise RuntimeError("given up")
            try:
                run = wandb_run.begin(mirrored, mode)
            except Exception as error:  # no key, no network, no server: all end here
                self.is_offline = True
                # Until its service ends, the client keeps the id of the failed start in use.
                if mode == "offline" or tracker.is_given_up or self.live:
                    raise
                mirrored.notify(
                    f"wandb: online start failed ({first_line(error)}); this run and later ones "
                    f"go on offline"
                )
                wandb_service.end()
                mode = "offline"
                run = wandb_run.begin(mirrored, mode)
            self.live.add(tracker)
            return run, mode

    def end(self, tracker: NoTracker, ending: Ending) -> None:
        assert isinstance(tracker, WandbTracker)
        tracker.ending = ending
        self.ended.append(tracker)

    def settle(self, seconds: float, rewrites: bool = True) -> None:
        deadline = time.monotonic() + seconds
        for tracker in self.ended:
            if tracker.thread.is_alive():
                with contextlib.suppress(Full):
                    left = max(0.0, deadline - time.monotonic())
                    tracker.queue.put(tracker.ending, timeout=left)
        for tracker in self.ended:
            tracker.thread.join(max(0.0, deadline - time.monotonic()))
        hanging = [tracker for tracker in self.ended if tracker.thread.is_alive()]
        for tracker in hanging:
            tracker.is_given_up = tracker.is_broken = True
        lost = [tracker for tracker in self.ended if tracker.place is None]
        if lost:
            wandb_service.end(at_once=bool(hanging))
        if lost and rewrites:
            thread = threading.Thread(target=self._rewrite, args=[lost], daemon=True)
            thread.start()
            thread.join(limits.REWRITE_SECONDS)
        self.is_offline |= any(not tracker.is_sent for tracker in self.ended)
        self.settled += self.ended if rewrites else []
        self.ended = []

    def _rewrite(self, lost: Sequence[WandbTracker]) -> None:
        with self.lock:
            for tracker in lost:
                try:
                    run = wandb_run.begin(tracker.mirrored, "offline")
                    tracker.remove_earlier()
                    for row in tracker.mirrored.rows():
                        wandb_run.log(run, row)
                    wandb_run.finish(run, tracker.mirrored, tracker.ending)
                    tracker.place = Path(run.dir).parent
                    tracker.set_torn_aside()
                except Exception as error:
                    tracker.mirrored.notify(f"wandb: not written offline ({first_line(error)})")

    def close(self) -> None:
        if self.is_used:
            wandb_service.end()

    def told(self) -> list[str]:
        unsent = [tracker for tracker in self.settled if not tracker.is_sent]
        written = [tracker for tracker in unsent if tracker.place is not None]
        lines = []
        if written:
            folders = sorted({str(tracker.mirrored.folder) for tracker in written})
            lines.append(
                f"wandb: {len(written)} of {len(self.settled)} runs are not wholly at the server; "
                f"this sends them: lorabench sync {shlex.join(folders)}"
            )
        if len(written) < len(unsent):
            lines.append(
                f"wandb: {len(unsent) - len(written)} of {len(self.settled)} runs could not be "
                f"written for wandb; metrics.jsonl in their folders has all rows"
            )
        return lines
