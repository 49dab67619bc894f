"""Sends what W&B has not got of a sweep folder.

A run that the server does not know is sent by `wandb sync`, with all that its file holds. That
command would send all rows once more to a server that has some of them (the client appends when a
run was started online). Such a run is resumed instead, and gets the rows that it lacks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from lorabench import record
from lorabench.config import TrackerConfig, first_line
from lorabench.tracking import wandb_run, wandb_service
from lorabench.tracking.mirrored import Ending, Mirrored, last_values
from lorabench.tracking.wandb_run import SYNCED


def unsent(folder: Path) -> tuple[list[Path], list[str]]:
    """Return W&B's folders of runs that are not at the server, and the ids of those that go on.

    Args:
        folder: of a sweep.
    """
    places, running = [], []
    for file in sorted(folder.glob("wandb/*run-*/run-*.wandb")):
        run_id = _run_id(file.parent)
        found = record.read(folder / run_id)
        if found is not None and (
            found.status == "running"
            or (found.status == "trained" and record.is_held(folder / run_id, found))
        ):
            running.append(run_id)
        elif not _is_sent(file.parent):
            places.append(file.parent)
    return places, sorted(set(running))


def send(places: Sequence[Path], notify: Callable[[str], None]) -> list[Path]:
    """Send runs. `wandb sync` prints what it does.

    Args:
        notify: where a run that cannot be completed is told.
    Returns:
        The folders that were not sent.
    """
    environment = dict(os.environ)
    os.environ["WANDB_SILENT"] = "true"  # without a key the client would ask for one
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    new: list[Path] = []
    by_run: dict[tuple[Path, str], list[Path]] = {}  # a run can have several folders
    for place in places:
        by_run.setdefault((place.parents[1], _run_id(place)), []).append(place)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for (sweep, run_id), own in by_run.items():
                try:
                    if not _complete(sweep, run_id, Path(scratch), notify):
                        new += own
                        continue
                except (wandb.errors.CommError, TimeoutError, OSError) as error:
                    notify(f"wandb: {run_id} is not sent ({first_line(error)})")
                    break  # the others would wait for the same server
                except Exception as error:  # of this run alone
                    notify(f"wandb: {run_id} is not sent ({first_line(error)})")
                    continue
                for place in own:
                    (place / f"run-{run_id}{SYNCED}").touch()
        finally:
            wandb_service.end()
    if new:
        # Online runs among them are those that no server took to the end.
        command = [sys.executable, "-m", "wandb", "sync", "--no-skip-online", *map(str, new)]
        subprocess.run(command, check=False, env=environment)
    return [place for place in places if not _is_sent(place)]


def _complete(sweep: Path, run_id: str, scratch: Path, notify: Callable[[str], None]) -> bool:
    """Send the rows that a run lacks at the server, its last values and its adapter.

    Returns:
        False if its file must be sent instead: the server has no such run, there is no key, or
        the run's own files cannot be read.
    """
    import wandb

    entry = record.read(sweep / run_id)
    if entry is None:
        return False
    settings = TrackerConfig(**entry.config["tracker"])
    config = {"hashes": entry.hashes}
    mirrored = Mirrored(settings, run_id, entry.sweep, run_id, [], config, sweep, notify)
    try:
        rows = [*mirrored.rows()]
    except (OSError, ValueError):
        return False
    try:
        run = wandb_run.resume(mirrored, scratch)
    except wandb.errors.UsageError:
        return False
    for row in rows:
        wandb_run.log(run, row)
    if settings.mode == "online" and settings.log_adapter and entry.has_trained():
        try:
            wandb_run.log_adapter(run, mirrored)
        except Exception as error:  # the rows are more than the adapter
            notify(f"wandb: the adapter of {run_id} is not sent ({first_line(error)})")
    ending = Ending(last_values(entry), entry.status == "failed")
    if not wandb_run.finish(run, mirrored, ending) or wandb_run.gave_up_sending(run):
        raise OSError("the server did not take everything")
    return True


def _run_id(place: Path) -> str:
    (file,) = place.glob("run-*.wandb")
    return file.stem.removeprefix("run-")


def _is_sent(place: Path) -> bool:
    return any(place.glob(f"*{SYNCED}"))
