"""Processes that died without a message while they trained a pack: how full memory was.

The kernel kills what takes too much memory, and leaves no word. So a process at work writes down
how much it holds, and whoever finds it dead can tell. Imports without torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lorabench import interrupt, machine

FULL = 0.9  # of what was free at the start: a process that died beyond it died of that
DEATHS = 2  # in a row, before a pack is thought too large
LOOK_SECONDS = 0.1
STEP = 0.02  # of what was free: smaller changes are not written
LENGTH = 256  # bytes of the file, which is written in place: a kill leaves the last look


class Watch:
    """Notes how much memory this process holds until it is left; what stays is of a dead one."""

    def __init__(self, path: Path):
        self.path = path
        self.before = _read(path)[1 - DEATHS :]
        self.free = max(1, machine.available_memory() + machine.resident_memory())
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True, name="memory")

    def _look(self) -> None:
        written = None
        with contextlib.suppress(OSError), open(self.path, "wb", buffering=0) as file:
            while not self.over.wait(LOOK_SECONDS if written else 0):
                resident = machine.resident_memory()
                if written is None or abs(resident - written) > STEP * self.free:
                    written = resident
                    self._write(file, [*self.before, {"free": self.free, "resident": resident}])
            self._write(file, self.before)

    def _write(self, file: IO[bytes], attempts: list[dict[str, int]]) -> None:
        os.pwrite(file.fileno(), json.dumps(attempts).ljust(LENGTH - 1).encode() + b"\n", 0)

    def _settle(self) -> None:
        """Leave what was there before: this process does not die without a message."""
        self.over.set()
        self.thread.join()
        if not self.before:
            forget(self.path)

    def __enter__(self) -> Watch:
        self.thread.start()
        interrupt.BEFORE_EXIT.append(self._settle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        interrupt.BEFORE_EXIT.remove(self._settle)
        self._settle()


def of_memory(path: Path) -> str | None:
    """How the last processes ended if it was memory; None if it was not, or not often enough."""
    last = _read(path)[-DEATHS:]
    if len(last) < DEATHS or any(one["resident"] <= FULL * one["free"] for one in last):
        return None
    held, free = (last[-1][name] / 1e9 for name in ("resident", "free"))
    return (
        f"its process died {DEATHS} times without a message, the last time with {held:.2f} GB of "
        f"the {free:.2f} GB that were free at its start"
    )


def forget(path: Path) -> None:
    """The pack is not tried again as it was."""
    with contextlib.suppress(OSError):
        path.unlink()


def _read(path: Path) -> list[dict[str, int]]:
    try:
        found: Any = json.loads(path.read_text())
        return [{name: int(one[name]) for name in ("free", "resident")} for one in found]
    except (OSError, ValueError, TypeError, KeyError):
        return []
