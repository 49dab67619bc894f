"""Processes that died without a message while they trained a pack: how full memory was.

The kernel kills what takes too much memory, and leaves no word. So a process at work writes down
how much it holds, and whoever finds it dead can tell. Imports without torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lorabench import interrupt, machine
from lorabench.lease import Lease, Lost

FULL = 0.9  # of what was free at the start: a process that died beyond it died of that
DEATHS = 2  # in a row, before a pack is thought too large
LOOK_SECONDS = 0.1
STEP = 0.02  # of what was free: smaller changes are not written
JOIN_SECONDS = 1.0  # for the last look; a share that hangs must hold nobody up
LENGTH = 256  # bytes of the file, which is written in place: a kill leaves the last look


@contextlib.contextmanager
def watched(path: Path, held: Lease) -> Iterator[None]:
    """Note how much memory this process holds until the block is left.

    Args:
        path: what stays there afterwards is of processes that died in such a block.
        held: of the pack; whoever has lost it writes nothing more.
    """
    before, over = _read(path)[1 - DEATHS :], threading.Event()
    free = max(1, machine.available_memory() + machine.resident_memory())
    thread = threading.Thread(target=_look, args=(path, held, before, free, over), daemon=True)

    def settle() -> None:
        over.set()
        thread.join(JOIN_SECONDS)
        if not before:
            with contextlib.suppress(Lost):
                held.check()
                forget(path)

    thread.start()
    interrupt.BEFORE_EXIT.append(settle)
    try:
        yield
    finally:
        interrupt.BEFORE_EXIT.remove(settle)
        settle()


def _look(
    path: Path, held: Lease, before: list[dict[str, int]], free: int, over: threading.Event
) -> None:
    """Write what this process holds whenever it has changed; in the end, what was there before."""
    written = None
    with contextlib.suppress(OSError, Lost), open(path, "wb", buffering=0) as file:
        while not over.wait(LOOK_SECONDS if written else 0):
            resident = machine.resident_memory()
            if written is None or abs(resident - written) > STEP * free:
                written = resident
                held.check()
                _write(file, [*before, {"free": free, "resident": resident}])
        held.check()
        _write(file, before)


def _write(file: IO[bytes], attempts: list[dict[str, int]]) -> None:
    os.pwrite(file.fileno(), json.dumps(attempts).ljust(LENGTH - 1).encode() + b"\n", 0)


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
