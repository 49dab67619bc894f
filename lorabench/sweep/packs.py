"""Which runs train together."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from lorabench.config import ConfigErrors
from lorabench.sweep.jobs import Job

if TYPE_CHECKING:
    from lorabench.sweep.needs import Needs

# What each run of a pack has for itself; everything else must be the same.
OWN_GROUPS = (
    "lora", "head", "target_modules", "start_from", "seeds", "seed", "tracker", "worker",
    "compare", "recipe", "presets", "sweep", "output_dir", "stages",
)  # fmt: skip
OWN_TRAINER = (
    "lr", "schedule", "warmup_steps", "min_lr_ratio", "weight_decay", "beta1", "beta2", "eps",
    "max_grad_norm",
)  # fmt: skip


def form_packs(jobs: list[Job], limit: int, memory: int, needs: Needs) -> list[list[int]]:
    """Indices of jobs that train together: what can share a base forward, as evenly as it fits.

    Args:
        limit: the most runs of a pack.
        memory: bytes a pack may take.
        needs: tells what a pack takes.

    Raises:
        ConfigErrors: the limit is below 1.
    """
    if limit < 1:
        raise ConfigErrors(f"hydra.launcher.pack_size: must be at least 1; got {limit}")
    alike: dict[str, list[int]] = {}
    packs: list[list[int]] = []
    for i, job in enumerate(jobs):
        if job.plan.alone is not None:
            packs.append([i])
            continue
        content = dataclasses.asdict(job.config)
        shared = {key: value for key, value in content.items() if key not in OWN_GROUPS}
        shared["trainer"] = {k: v for k, v in shared["trainer"].items() if k not in OWN_TRAINER}
        alike.setdefault(json.dumps(shared, sort_keys=True), []).append(i)
    for members in alike.values():
        # Runs that see the same batches, and those of one rank among them, side by side.
        members.sort(
            key=lambda i: (
                jobs[i].config.seeds.data,
                jobs[i].config.lora.r,
                [*jobs[i].plan.lora_modules, *jobs[i].plan.saved_modules],
            )
        )
        packs += _split(members, jobs, limit, memory, needs)
    return sorted(packs)


def _split(
    members: list[int], jobs: list[Job], limit: int, memory: int, needs: Needs
) -> list[list[int]]:
    """Members in as few packs as fit into memory, of the same size where possible."""

    def fit(count: int) -> bool:
        largest = max(_evenly(members, count), key=lambda pack: _weight(pack, jobs))
        return len(largest) == 1 or needs.fits([jobs[i] for i in largest], memory)

    count = fewest = -(-len(members) // limit)
    while not fit(count):
        fewest, count = count + 1, min(2 * count, len(members))
    while fewest < count:  # between the last that did not fit and the first that did
        middle = (fewest + count) // 2
        fewest, count = (fewest, middle) if fit(middle) else (middle + 1, count)
    return _evenly(members, count)


def _weight(pack: list[int], jobs: list[Job]) -> tuple[int, int]:
    """What makes one of several packs alike the largest: its runs, then their parameters."""
    return len(pack), sum(jobs[i].plan.trainable_parameters for i in pack)


def _evenly(members: list[int], count: int) -> list[list[int]]:
    size, more = divmod(len(members), count)
    ends = [size * (n + 1) + min(n + 1, more) for n in range(count)]
    return [members[start:end] for start, end in zip([0, *ends], ends, strict=False)]
