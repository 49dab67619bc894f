"""Signals that wait until a step is whole, so that what is saved is a state of the training."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# What a terminal sends (Ctrl-C, a closed window), and what schedulers send before they kill.
HEARD = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
]
ONE_REQUEST_SECONDS = 0.5  # a closed terminal sends SIGHUP twice: its shell does, and the kernel

BEFORE_EXIT: list[Callable[[], None]] = []  # what a second signal must not leave undone

_inside = _waiting = False
_first: tuple[int, float] | None = None  # the signal that came, and when


def install() -> None:
    """Make each signal raise KeyboardInterrupt, at once or after the step it comes in.

    A second signal ends the process at once. SIGHUP stays ignored where it is (`nohup`).
    """
    global _waiting, _first
    _waiting, _first = False, None
    for number in HEARD:
        if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
            signal.signal(number, _arrived)


def _arrived(number: int, frame: Any) -> None:
    global _waiting, _first
    if _first is not None:
        if time.monotonic() - _first[1] < ONE_REQUEST_SECONDS:
            return
        for act in BEFORE_EXIT:
            act()
        with contextlib.suppress(OSError):
            if select.select([], [2], [], 0)[1]:  # a terminal that is stopped must not hold it up
                os.write(2, b"ended at once, without another checkpoint\n")
        os._exit(128 + number)
    _first = number, time.monotonic()
    if _inside:
        _waiting = True
    else:
        raise KeyboardInterrupt


def number() -> int:
    """The signal that came; SIGINT where Python itself raised KeyboardInterrupt."""
    return _first[0] if _first else signal.SIGINT


def name() -> str:
    return signal.Signals(number()).name


@contextmanager
def whole() -> Iterator[None]:
    """What is inside runs to its end before a signal is heard.

    Raises:
        KeyboardInterrupt: at the end, where one came.
    """
    global _inside, _waiting
    _inside = True
    try:
        yield
    finally:
        _inside = False
        if _waiting:
            _waiting = False
            raise KeyboardInterrupt
