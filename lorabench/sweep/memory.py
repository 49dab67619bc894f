"""Runs that are larger than their device, and settings with which they fit or train faster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lorabench import machine
from lorabench.config import ConfigErrors
from lorabench.sweep.jobs import Job, Mistakes
from lorabench.sweep.packs import form_packs

if TYPE_CHECKING:
    from lorabench.sweep.needs import Needs

LENGTHS = 32  # tokens between the values of data.max_length that are tried


def check_memory(jobs: Sequence[Job], needs: Needs) -> None:
    """Refuse runs that do not fit their device even alone.

    It is compared with all memory that the device has: what others hold now may be free by then.

    Args:
        jobs: those that are to be trained.
    Raises:
        ConfigErrors: of each such run, with the settings that make it fit.
    """
    mistakes = Mistakes(len(jobs))
    for job in jobs:
        with mistakes.of(job.label):
            device = machine.choose_device(job.config.trainer.device)
            memory = machine.total_memory(device)
            if not needs.fits([job], memory):
                raise ConfigErrors(_refusal(job, device, memory, needs))
    mistakes.refuse()


def _refusal(job: Job, device: str, memory: int, needs: Needs) -> str:
    takes = needs.memory([job])
    step, _ = needs.step_seconds([job])
    found = [
        f"{words} (~{_gb(needs.memory([other]))}, {needs.step_seconds([other])[0] / step:.1f}x the "
        f"time)"
        for words, other in _fitting(job, lambda other: needs.fits([other], memory))
    ]
    if found:
        remedy = f"these fit: {', '.join(found)}"
    elif needs.base_bytes(job) > memory:
        remedy = "the base alone does not fit: use a smaller one, or model.dtype=bfloat16"
    else:
        remedy = "no micro_batch_size, gradient_checkpointing or max_length makes it fit: use a "
        remedy += "smaller base, or model.dtype=bfloat16"
    return (
        f"trainer: must fit the device; a step of {job.plan.model} needs ~{_gb(takes)}, {device} "
        f"has {_gb(memory)}; {remedy}"
    )


def _fitting(job: Job, fits: Callable[[Job], bool]) -> Iterator[tuple[str, Job]]:
    """Yield settings with which a run fits, as words of a command line, and the run with them."""
    trainer = job.config.trainer
    micro = trainer.micro_batch_size or trainer.batch_size
    smaller = [n for n in range(1, micro) if trainer.batch_size % n == 0]
    recomputed = _with(job, gradient_checkpointing=True)
    found = False
    for words, own in (("", job), ("trainer.gradient_checkpointing=true", recomputed)):
        if words and not trainer.gradient_checkpointing and fits(own):
            yield words, own
            found = True
            continue
        most = None if found else _largest(smaller, partial(_micro, own), fits)
        if most:
            yield f"{words} trainer.micro_batch_size={most}".strip(), _micro(own, most)
            found = True
    shorter = list(range(LENGTHS, _longest(job), LENGTHS))
    if most := _largest(shorter, partial(_shorter, job), fits):
        yield f"data.max_length={most}", _shorter(job, most)


def _largest(
    values: list[int], make: Callable[[int], Job], fits: Callable[[Job], bool]
) -> int | None:
    """The largest of rising values with which a run fits, as it does with all below."""
    low, high = 0, len(values)  # values[:low] fit, values[high:] do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(make(values[middle])) else (low, middle)
    return values[low - 1] if low else None


def _with(job: Job, **trainer: Any) -> Job:
    config = job.config
    changed = dataclasses.replace(config.trainer, **trainer)
    return dataclasses.replace(job, config=dataclasses.replace(config, trainer=changed))


def _micro(job: Job, size: int) -> Job:
    """The run with micro-batches of that many examples, its longest ones together."""
    return _batched(_with(job, micro_batch_size=size), lambda batch: sorted(batch)[-size:], 1.0)


def _shorter(job: Job, most: int) -> Job:
    """The run with examples of at most that many tokens."""
    data = dataclasses.replace(job.config.data, max_length=most)
    own = dataclasses.replace(job, config=dataclasses.replace(job.config, data=data))
    lengths = job.plan.lengths
    if lengths is None:
        return own
    share = sum(min(n, most) for n in lengths.batch) / sum(lengths.batch)
    return _batched(own, lambda batch: [min(n, most) for n in batch], share)


def _batched(job: Job, cut: Callable[[list[int]], list[int]], share: float) -> Job:
    """The run with its longest micro-batch cut, and this share of its rows."""
    lengths = job.plan.lengths
    if lengths is None:
        return job
    batch = cut(lengths.batch)
    changed = {
        "batch": batch, "longest": sum(batch), "rows": round(share * lengths.rows),
        "targets": min(lengths.targets, sum(batch)),
    }  # fmt: skip
    plan = job.plan.model_copy(update={"lengths": lengths.model_copy(update=changed)})
    return dataclasses.replace(job, plan=plan)


def _longest(job: Job) -> int:
    lengths = job.plan.lengths
    return job.config.data.max_length if lengths is None else max(lengths.batch)


def faster(
    jobs: list[Job], packs: list[list[int]], limit: int, memory: int, needs: Needs
) -> str | None:
    """Suggest gradient checkpointing where it makes packs larger and the whole faster.

    Args:
        packs: as formed without it.
        limit: the most runs of a pack.
        memory: bytes a pack may take.
    """
    packed = [i for members in packs for i in members if jobs[i].plan.alone is None]
    if any(jobs[i].config.trainer.gradient_checkpointing for i in packed):
        return None
    if len(packed) < 2 or all(len(members) >= min(limit, len(packed)) for members in packs):
        return None
    others = [_with(jobs[i], gradient_checkpointing=True) for i in packed]
    larger = form_packs(others, limit, memory, needs)
    now = [[jobs[i] for i in members] for members in packs if members[0] in packed]
    then = [[others[i] for i in members] for members in larger]
    if len(then) >= len(now):
        return None
    before, after = (sum(map(needs.seconds, each)) for each in (now, then))
    if after >= before:
        return None
    return (
        f"trainer.gradient_checkpointing=true makes packs of {max(map(len, then))} runs in place "
        f"of {max(map(len, now))}: ~{after:.0f} s in place of ~{before:.0f} s"
    )


def _gb(number: int) -> str:
    return f"{number / 1e9:.1f} GB"
