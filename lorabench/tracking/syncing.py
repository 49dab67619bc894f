"""What W&B has not got of a sweep folder, and the client's own command that sends it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lorabench import record
from lorabench.tracking.wandb_run import SYNCED


def unsent(folder: Path) -> tuple[list[Path], list[str]]:
    """Return W&B's folders of runs that are not at the server, and the ids of those that still run.

    Args:
        folder: of a sweep.
    """
    places, running = [], []
    for file in sorted(folder.glob("wandb/*run-*/run-*.wandb")):
        run_id = file.stem.removeprefix("run-")
        found = record.read(folder / run_id)
        if found is not None and found.status == "running":
            running.append(run_id)
        elif not _is_sent(file.parent):
            places.append(file.parent)
    return places, sorted(set(running))


def send(places: Sequence[Path]) -> list[Path]:
    """Send runs with `wandb sync`, which prints what it does.

    Returns:
        The folders that were not sent.
    """
    # Online runs among them are those that no server took to the end.
    command = [sys.executable, "-m", "wandb", "sync", "--no-skip-online", *map(str, places)]
    subprocess.run(command, check=False)
    return [place for place in places if not _is_sent(place)]


def _is_sent(place: Path) -> bool:
    return any(place.glob(f"*{SYNCED}"))
