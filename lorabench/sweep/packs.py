"""Which runs train together."""

from __future__ import annotations

import dataclasses
import json

from lorabench.config import ConfigErrors
from lorabench.sweep.jobs import Job

# What each run of a pack has for itself; everything else must be the same.
OWN_GROUPS = (
    "lora", "head", "target_modules", "start_from", "seeds", "seed", "tracker", "worker",
    "compare", "recipe", "presets", "sweep", "output_dir", "stages",
)  # fmt: skip
OWN_TRAINER = (
    "lr", "schedule", "warmup_steps", "min_lr_ratio", "weight_decay", "beta1", "beta2", "eps",
    "max_grad_norm",
)  # fmt: skip


def to_compile(jobs: list[Job], packs: list[list[int]], device: str) -> list[bool]:
    """Which packs are compiled, by `trainer.compile`.

    Raises:
        ConfigErrors: `always`, and one of its runs cannot be.
    """
    from lorabench.pack import compiling

    found, errors = [], []
    for members in packs:
        first = jobs[members[0]]
        wanted = first.config.trainer.compile
        reason = compiling.why_not(first.config, first.plan)
        if wanted == "always" and reason:
            errors.append(
                f"trainer.compile: always must be a pack that compiles once; {first.label}: "
                f"{reason}; use trainer.compile=auto or never"
            )
        pays = wanted == "auto" and compiling.pays(first.config, first.plan, device)
        found.append(reason is None and (wanted == "always" or pays))
    if errors:
        raise ConfigErrors(errors)
    return found


def form_packs(jobs: list[Job], limit: int, memory: int) -> list[list[int]]:
    """Indices of jobs that train together: what can share a base forward, as evenly as it fits.

    Args:
        limit: the most runs of a pack.
        memory: bytes a pack may take.

    Raises:
        ConfigErrors: the limit is below 1.
    """
    from lorabench.pack.head import CHUNK_BYTES

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
        plans = [jobs[i].plan for i in members]
        free = memory - min(one.base_bytes for one in plans)
        each = max(1, *(one.memory_bytes - one.base_bytes - one.logits_bytes for one in plans))
        logits = max(one.logits_bytes for one in plans)
        # All runs' logits, or the chunk of them that exists at a time.
        most = max(free // (each + logits), (free - 3 * CHUNK_BYTES) // each)
        fits = max(1, min(limit, most))
        count = -(-len(members) // fits)
        size, more = divmod(len(members), count)
        start = 0
        for n in range(count):
            end = start + size + (n < more)
            packs.append(members[start:end])
            start = end
    return sorted(packs)
