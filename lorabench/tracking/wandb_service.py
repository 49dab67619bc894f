"""The W&B client's service process, wandb-core: how to be rid of it whatever it waits for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

from lorabench.tracking import limits


def end(at_once: bool = False) -> None:
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
    thread.join(limits.CLIENT_SECONDS)
    if thread.is_alive():
        _kill(services)
        thread.join(limits.CLIENT_SECONDS)


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
    psutil.wait_procs(services, limits.CLIENT_SECONDS)
