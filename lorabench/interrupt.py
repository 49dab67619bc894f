"""Signals that wait until a step is whole, so that what is saved is a state of the training."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_inside = _waiting = _torn = False


def install() -> None:
    """SIGINT and SIGTERM raise KeyboardInterrupt, at once or after the step they come in."""
    global _waiting, _torn
    _waiting = _torn = False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _arrived)


def _arrived(number: int, frame: Any) -> None:
    global _waiting, _torn
    if _inside and not _waiting:
        _waiting = True
        return
    _torn = _inside  # a second signal does not wait
    raise KeyboardInterrupt


@contextmanager
def whole() -> Iterator[None]:
    """What is inside runs to its end before a signal is heard.

    Raises:
        KeyboardInterrupt: at the end, where one came; a second one at once.
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


def torn() -> bool:
    """Whether a step was broken off: the weights are then no state of the training."""
    return _torn
