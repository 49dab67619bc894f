"""Trackers: mirrors of a run's values, which may fail without hurting or delaying the run.

Only this room knows Weights & Biases. Its client hands everything to a service process,
wandb-core, and any of its calls can block: on a server that does not answer, or on wandb-core
itself. So only daemon threads call it, and whoever waits for them has a deadline.

metrics.jsonl has every row. A run that the client lost is written again from there, offline.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Full, Queue
from typing import Any

from lorabench import masking
from lorabench.config import TrackerConfig, first_line

INIT_SECONDS = 20.0  # for the server to answer when a run starts
FINISH_SECONDS = 30.0  # for all runs of a pack to send their last rows
INTERRUPTED_SECONDS = 5.0  # the same after a signal: Docker kills 10 s after SIGTERM, Slurm 30 s
CLIENT_SECONDS = 5.0  # for the client to close its files when it gives up or ends
REWRITE_SECONDS = 20.0  # to write runs again that the client lost
QUEUED_ROWS = 10_000  # per run, while the client does not take them


class NoTracker:
    """The null object: the loop never asks whether there is a tracker."""

    def log(self, row: dict[str, float], step: int) -> None:
        """Take the values of one step. Never blocks."""


@dataclass
class Ending:
    """What a run ends with."""

    summary: dict[str, float]
    failed: bool


@dataclass
class Mirrored:
    """What a W&B run is made of: group = sweep, id = run id."""

    settings: TrackerConfig
    run_id: str
    sweep: str
    name: str
    tags: list[str]
    config: dict[str, Any]
    folder: Path  # the sweep's
    notify: Callable[[str], None]

    def init(self, mode: str) -> Any:
        """Start the W&B run. May block."""
        import wandb

        def refuse_stop() -> None:  # else the client interrupts the command, with all its runs
            self.notify(f"wandb: the server asks to stop {self.name}; press Ctrl-C here instead")

        run = wandb.init(
            project=self.settings.project,
            entity=self.settings.entity,
            id=self.run_id,
            name=self.name,
            group=self.sweep,
            job_type="train",
            tags=[*self.tags, *self.settings.tags],
            config=self.config,
            dir=str(self.folder),
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            reinit="create_new",  # the default would hand back the previous run of the process
            settings=wandb.Settings(
                init_timeout=INIT_SECONDS,
                # Before our own deadline: a client that gives up by itself leaves a whole file.
                finish_timeout=max(FINISH_SECONDS - CLIENT_SECONDS, 1),
                finish_timeout_raises=True,
                stop_fn=refuse_stop,
                console="off",
                silent=True,
                x_disable_stats=True,
            ),
        )
        run.define_metric("step")
        for pattern in ("train/loss", "validation/*", "test/*"):
            run.define_metric(pattern, step_metric="step", summary="last")
        return run

    def rows(self) -> Iterator[dict[str, Any]]:
        """Read the rows that were logged, from metrics.jsonl."""
        with open(self.folder / self.run_id / "metrics.jsonl", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                row.pop("seconds", None)  # W&B has a clock of its own
                yield row


class WandbTracker(NoTracker):
    """One W&B run, fed by a thread."""

    def __init__(self, mirrored: Mirrored, client: Client):
        self.mirrored, self.client = mirrored, client
        self.queue: Queue[dict[str, Any] | Ending] = Queue(QUEUED_ROWS)
        self.ending = Ending({}, failed=True)
        self.begun = time.time()
        self.place: Path | None = None  # W&B's folder of this run, once its file is whole
        self.is_sent = False  # or offline, where that was asked for
        self.is_broken = False  # a row was lost, or the client failed
        self.is_given_up = False  # nobody waits for the thread any more
        self.thread = threading.Thread(target=self._mirror, daemon=True)
        self.thread.start()

    def log(self, row: dict[str, float], step: int) -> None:
        if self.is_broken:
            return
        try:
            self.queue.put_nowait({**row, "step": step, "_timestamp": time.time()})
        except Full:
            self.is_broken = True

    def set_torn_aside(self) -> None:
        """Rename what starts and clients that failed have left: `wandb sync` stumbles over it."""
        name = f"run-{self.mirrored.run_id}.wandb"
        for file in self.mirrored.folder.glob(f"wandb/*run-*-{self.mirrored.run_id}/{name}"):
            with contextlib.suppress(OSError):
                if file.parent != self.place and file.stat().st_mtime >= self.begun:
                    file.replace(file.with_suffix(".torn"))

    def _mirror(self) -> None:
        doing = "start"
        try:
            run, mode = self.client.open(self)
            doing = "log"
            while not isinstance(item := self.queue.get(), Ending):
                run.log(item)
            doing = "finish"
            is_whole = _finish(run, item) and (mode == "offline" or not _gave_up_sending(run))
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
            self.set_torn_aside()


def _finish(run: Any, ending: Ending) -> bool:
    """End a W&B run; False if the server did not take everything in time."""
    run.summary.update(ending.summary)
    try:
        run.finish(exit_code=int(ending.failed))
    except TimeoutError:
        return False
    return True


def _gave_up_sending(run: Any) -> bool:
    """Whether the client has stopped sending rows, say after a 401: only its own log tells."""
    log = Path(run.settings.log_internal)
    return log.is_file() and '"level":"ERROR+4"' in log.read_text(errors="replace")


class Client:
    """The W&B client of this process: one service process, and the runs of a command."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # the client starts one run at a time
        self.live: set[WandbTracker] = set()  # with a run open in the service process
        self.is_used = False
        self.is_offline = False  # after the first failure no server is tried any more
        self.ended: list[WandbTracker] = []  # that wait to be settled
        self.settled: list[WandbTracker] = []

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
                run = mirrored.init(mode)
            except Exception as error:  # no key, no network, no server: all end here
                self.is_offline = True
                # Until its service ends, the client keeps the id of the failed start in use.
                if mode == "offline" or tracker.is_given_up or self.live:
                    raise
                mirrored.notify(
                    f"wandb: online start failed ({first_line(error)}); this run and later ones "
                    f"go on offline"
                )
                self.end_service()
                mode = "offline"
                run = mirrored.init(mode)
            self.live.add(tracker)
            return run, mode

    def end(self, ended: Sequence[tuple[NoTracker, Ending]]) -> None:
        """Note with what runs end; `settle` brings them to it."""
        for tracker, ending in ended:
            if isinstance(tracker, WandbTracker):
                tracker.ending = ending
                self.ended.append(tracker)

    def settle(self, seconds: float, rewrites: bool = True) -> None:
        """Wait for the runs that have ended, give up those that hang, and write lost ones again."""
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
            self.end_service(at_once=bool(hanging))
        if lost and rewrites:
            thread = threading.Thread(target=self._rewrite, args=[lost], daemon=True)
            thread.start()
            thread.join(REWRITE_SECONDS)
        self.is_offline |= any(not tracker.is_sent for tracker in self.ended)
        self.settled += self.ended if rewrites else []
        self.ended = []

    def _rewrite(self, lost: Sequence[WandbTracker]) -> None:
        with self.lock:
            for tracker in lost:
                try:
                    run = tracker.mirrored.init("offline")
                    for row in tracker.mirrored.rows():
                        run.log(row)
                    _finish(run, tracker.ending)
                    tracker.place = Path(run.dir).parent
                    tracker.set_torn_aside()
                except Exception as error:
                    tracker.mirrored.notify(f"wandb: not written offline ({first_line(error)})")

    def end_service(self, at_once: bool = False) -> None:
        """End the service process, and have nothing wait for it: no thread, no exit of Python.

        Args:
            at_once: kill it, as it may be stopped; else it may close its files first.
        """
        import wandb

        def tear_down() -> None:
            with contextlib.suppress(BaseException):  # it raises and exits with the service's code
                wandb.teardown()

        services = _services()
        if at_once:
            _kill(services)
        # In a thread, since it waits for the service; first of all it takes back its atexit hook.
        thread = threading.Thread(target=tear_down, daemon=True)
        thread.start()
        thread.join(CLIENT_SECONDS)
        if thread.is_alive():
            _kill(services)
            thread.join(CLIENT_SECONDS)

    def told(self) -> list[str]:
        """Say which runs are not at the server, and how to send them."""
        unsent = [tracker for tracker in self.settled if not tracker.is_sent]
        places = [tracker.place for tracker in unsent if tracker.place is not None]
        lines = []
        if places:
            lines.append(
                f"wandb: {len(places)} of {len(self.settled)} runs are not wholly at the server; "
                f"this sends them: wandb sync --no-skip-online {shlex.join(map(str, places))}"
            )
        if len(places) < len(unsent):
            lines.append(
                f"wandb: {len(unsent) - len(places)} of {len(self.settled)} runs could not be "
                f"written for wandb; metrics.jsonl in their folders has all rows"
            )
        return lines


def _services() -> list[Any]:
    """The service process of this process; in a list, since it may have none."""
    import psutil

    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("wandb-core"):
                found.append(child)
    return found


def _kill(services: Sequence[Any]) -> None:
    """Kill processes, also stopped ones."""
    import psutil

    for service in services:
        with contextlib.suppress(psutil.Error):
            service.kill()
    psutil.wait_procs(services, CLIENT_SECONDS)


CLIENT = Client()  # of the command that runs


def start(
    settings: TrackerConfig,
    *,
    run_id: str,
    sweep: str,
    name: str,
    tags: list[str],
    config: dict[str, Any],
    folder: Path,
    notify: Callable[[str], None],
) -> NoTracker:
    """Start the tracker of one run. It starts in the background; rows may come at once.

    Args:
        name: what the dashboard calls the run.
        folder: the sweep's folder; W&B's files go to its `wandb/`.
        notify: where a failure is told, from another thread.
    """
    if settings.kind == "none" or settings.mode == "disabled":
        return NoTracker()
    os.environ["WANDB_SILENT"] = "true"  # without a key it would ask for one on the terminal
    # The client's reports on itself go to the same server, and at exit it waits for them.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        notify(f"wandb: cannot be imported ({first_line(error)}); the run goes on without it")
        return NoTracker()
    folder.mkdir(parents=True, exist_ok=True)
    sys.argv = masking.mask(sys.argv)  # the client copies the command line
    mirrored = Mirrored(settings, run_id, sweep, name, tags, config, folder, notify)
    return WandbTracker(mirrored, CLIENT)


def finish_all(
    ended: Sequence[tuple[NoTracker, dict[str, float], bool]], is_interrupted: bool = False
) -> None:
    """End the trackers of a pack, all at once, when its records are written.

    Takes at most FINISH_SECONDS (INTERRUPTED_SECONDS after a signal). If something was lost, at
    most REWRITE_SECONDS and three times CLIENT_SECONDS more.

    Args:
        ended: tracker, final values, whether the run failed.
    """
    CLIENT.end([(tracker, Ending(summary, failed)) for tracker, summary, failed in ended])
    CLIENT.settle(INTERRUPTED_SECONDS if is_interrupted else FINISH_SECONDS)


def drop_all(trackers: Sequence[NoTracker]) -> None:
    """End the trackers of runs that start again or that another process has taken over."""
    CLIENT.end([(tracker, Ending({}, failed=True)) for tracker in trackers])
    CLIENT.settle(INTERRUPTED_SECONDS, rewrites=False)


@contextlib.contextmanager
def of_command() -> Iterator[None]:
    """The trackers of one command; at its end, say what they did not send."""
    global CLIENT
    CLIENT = client = Client()
    try:
        yield
    finally:
        if client.ended:  # a signal came while they were waited for
            client.settle(INTERRUPTED_SECONDS)
        if client.is_used:
            client.end_service()
        with contextlib.suppress(OSError):  # a closed terminal
            for line in client.told():
                print(line, file=sys.stderr)
