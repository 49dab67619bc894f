"""Whether the disk has room for what a command will write."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from lorabench.config import ConfigErrors
from lorabench.files import nearest_folder
from lorabench.sweep.jobs import Job


def check_room(packs: Sequence[Sequence[Job]]) -> None:
    """Refuse runs for which their disk has no room.

    Args:
        packs: the runs that are to be trained, those of a pack together.
    Raises:
        ConfigErrors: a disk with less room than the runs leave on it, with the checkpoints of the
            pack whose are largest.
    """
    disks: dict[int, list[Sequence[Job]]] = {}
    places: dict[int, Path] = {}
    for pack in filter(None, packs):
        place = nearest_folder(pack[0].folder)
        device = place.stat().st_dev
        disks.setdefault(device, []).append(pack)
        places.setdefault(device, place)
    errors = []
    for device, there in disks.items():
        left = sum(job.plan.disk_bytes for pack in there for job in pack)
        most = max(sum(map(_checkpoint_bytes, pack)) for pack in there)
        free, count = shutil.disk_usage(places[device]).free, sum(map(len, there))
        if left + most > free:
            errors.append(
                f"disk: must have room for {count} run{'s' if count > 1 else ''}, "
                f"{_mb(left)}, and for checkpoints, {_mb(most)}; got {_mb(free)} free at "
                f"'{places[device]}'; make room, or set output_dir=... on another disk"
            )
    if errors:
        raise ConfigErrors(errors)


def _checkpoint_bytes(job: Job) -> int:
    """What checkpoints of a run will take beside those that are there."""
    places = [job.folder / "checkpoint", job.folder / ".checkpoint.old"]
    there = sum(path.stat().st_size for place in places for path in place.glob("*"))
    return max(0, job.plan.checkpoint_bytes - there)


def _mb(number: int) -> str:
    return f"{number / 1e6:,.1f} MB"
