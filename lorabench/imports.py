"""Importing torch, transformers and PEFT: most of what a command waits for before it trains."""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def heavy() -> Iterator[None]:
    """Import large packages in this block without looking for garbage meanwhile.

    Modules stay until the process ends, so each collection on the way finds nothing: 0.6 s of 5.
    Afterwards the collector leaves them alone, also at exit, where looking through them takes
    another second and nothing needs it: the operating system takes the memory back. Handlers of
    atexit run before that, as ever.
    """
    if "peft" in sys.modules:
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
    atexit.register(gc.freeze)
