"""Trackers: mirrors of a run's values, which may fail without hurting or delaying the run.

Only this room knows Weights & Biases, trackio and TensorBoard. All of them can fail, hang or be
killed. So nothing of theirs runs in the training thread: W&B's client is called by daemon threads,
the local trackers write in a process of their own, and whoever waits for them has a deadline.

metrics.jsonl has every row. A run that a tracker lost, or that is resumed, is written again from
there.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorabench.config import TrackerConfig
from lorabench.tracking import limits
from lorabench.tracking.mirrored import Backend, Ending, Mirrored, NoTracker, columns, last_values

__all__ = [
    "Mirrored",
    "NoTracker",
    "backend",
    "columns",
    "drop_all",
    "finish_all",
    "is_on",
    "last_values",
    "of_command",
    "start",
]

_backends: dict[tuple[str, Path | None], Backend] = {}  # of the command that runs


def backend(kind: str, folder: Path) -> Backend:
    """Return what trackers of a kind share; that of a local tracker belongs to a sweep folder."""
    key = (kind, None if kind == "wandb" else folder)
    if key not in _backends:
        if kind == "wandb":
            from lorabench.tracking.wandb_client import Client

            _backends[key] = Client()
        else:
            from lorabench.tracking.local import Recorder

            _backends[key] = Recorder(kind, folder)
    return _backends[key]


def is_on(settings: TrackerConfig) -> bool:
    """Whether there is to be a tracker."""
    return settings.kind != "none" and settings.mode != "disabled"


def start(mirrored: Mirrored) -> NoTracker:
    """Start the tracker of one run. It starts in the background; rows may come at once."""
    settings = mirrored.settings
    if not is_on(settings):
        return NoTracker()
    return backend(settings.kind, mirrored.folder).start(mirrored)


def finish_all(
    ended: Sequence[tuple[NoTracker, dict[str, Any], bool]], is_interrupted: bool = False
) -> None:
    """End the trackers of a pack, all at once, when its records are written.

    Takes at most FINISH_SECONDS (INTERRUPTED_SECONDS after a signal). If something was lost, at
    most REWRITE_SECONDS and three times CLIENT_SECONDS more.

    Args:
        ended: tracker, final values, whether the run failed.
    """
    seconds = limits.INTERRUPTED_SECONDS if is_interrupted else limits.FINISH_SECONDS
    _end([(tracker, Ending(summary, failed)) for tracker, summary, failed in ended], seconds)


def drop_all(trackers: Sequence[NoTracker]) -> None:
    """End the trackers of runs that start again or that another process has taken over."""
    ended = [(tracker, Ending({}, failed=True)) for tracker in trackers]
    _end(ended, limits.INTERRUPTED_SECONDS, rewrites=False)


def _end(
    ended: Sequence[tuple[NoTracker, Ending]], seconds: float, rewrites: bool = True
) -> None:
    used: list[Backend] = []
    for tracker, ending in ended:
        if tracker.backend is not None:
            tracker.backend.end(tracker, ending)
            used += [] if tracker.backend in used else [tracker.backend]
    for one in used:
        one.settle(seconds, rewrites)


@contextlib.contextmanager
def of_command() -> Iterator[None]:
    """The trackers of one command; at its end, say what they did not write or send."""
    _backends.clear()
    try:
        yield
    finally:
        used = list(_backends.values())
        _backends.clear()
        for one in used:
            one.settle(limits.INTERRUPTED_SECONDS)  # of a signal while they were waited for
            one.close()
        with contextlib.suppress(OSError):  # a closed terminal
            for line in [line for one in used for line in one.told()]:
                print(line, file=sys.stderr)
