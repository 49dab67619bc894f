"""From planned runs to saved adapters: load, train, save, check.

A pack has a slot for every run of its shape. Runs that are not to be trained now, because they have
ended or belong to another command, leave their slot idle: the shape, and so the bits of the others,
stay the same.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from typing import Any

from lorabench import (
    adapters,
    checkpoint,
    data,
    intact,
    interrupt,
    machine,
    provenance,
    record,
    start,
)
from lorabench import model as base_model
from lorabench.config import TrainerConfig
from lorabench.files import sync, sync_folder
from lorabench.lease import Lost
from lorabench.progress import Display
from lorabench.sweep import Job, PackEntry
from lorabench.worker.members import (
    Member,
    keep_checkpoint,
    open_logs,
    own_failure,
    planned_fingerprint,
    put_in_place,
    resume,
)
from lorabench.worker.shared import Shared
from lorabench.worker.validation import Validation, put_back

log = logging.getLogger(__name__)


def make_pack(
    shared: Shared, jobs: Sequence[Job], device: str, compiled: bool = False
) -> tuple[Any, Any, str]:
    """Put the runs of these jobs on their base, ready to train.

    Args:
        compiled: by torch.compile.
    Returns:
        The pack, the base under it, and the checksum of the base.
    """
    from lorabench.pack import ModulePack, StackedPack

    base, checksum = shared.base(jobs[0], device)
    configs = [job.config for job in jobs]
    modules = [job.plan.lora_modules for job in jobs]
    if jobs[0].plan.alone is not None:
        return ModulePack(base, configs[0], modules[0], device), base, checksum
    which = configs[0].model, len(jobs[0].plan.labels)
    skeleton, known = shared.planner.skeleton(*which), shared.planner.wrapped(*which)
    pack = StackedPack(base, skeleton, configs, modules, device, known=known, compiled=compiled)
    return pack, base, checksum


def begin_from(pack: Any, jobs: Sequence[Job]) -> None:
    """Give the runs of a pack the weights of the adapters that they start from.

    Raises:
        ConfigErrors: an adapter is not the one that was planned.
    """
    for slot, job in enumerate(jobs):
        if job.config.start_from is not None:
            found = start.find(job.config.start_from)._replace(hash=job.plan.contents["start"])
            start.put(start.weights(found), pack.adapter_state(slot))


def train_pack(
    members: list[Member],
    slots: Sequence[Job],
    entry: PackEntry,
    start_step: int,
    shared: Shared,
    display: Display,
) -> Any:
    """Train the members, save their adapters, and record them as trained.

    Args:
        slots: every run of the pack's shape, in order.
        start_step: of the checkpoints to continue from; 0 to begin.
    Returns:
        The pack, ready to be scored.
    Raises:
        KeyboardInterrupt: a signal; the members have a checkpoint of the last whole step.
    """
    config = members[0].job.config  # what runs of a pack share: base, data, steps, batch sizes
    machine.configure_torch(config)
    device = machine.choose_device(config.trainer.device)
    memory = machine.PeakMemory(device)
    dataset = shared.dataset(members[0].job)
    tokenizer = shared.tokenizer(members[0].job)
    pack, base, checksum = make_pack(shared, slots, device, entry.compiled)
    begin_from(pack, slots)
    for slot in set(range(pack.size)) - {member.slot for member in members}:
        pack.stop(slot)
    train_tokens = dataset.tokens["train"].hash()
    origin = provenance.of_process(device) | {"command": ["lorabench", *shared.words]}
    for member in members:
        _describe(member, pack, origin, checksum, dataset.tokens["train"], train_tokens)
        used = dataset.template
        member.entry.provenance["chat_template"] = None if used is None else data.text_hash(used)
        member.entry.notes = [*member.job.plan.warnings, *dataset.notes]
        if member.job.plan.padded is None and not pack.end_to_end:
            member.entry.plan["padded"] = other = "a probe of the loaded base"
            if lengths := member.entry.plan["lengths"]:
                lengths["rows"] = lengths["padded_rows"]
            member.entry.notes.append(
                f"batches are padded, by {other}: it does not compute the same where examples lie "
                f"end to end"
            )
        member.fingerprint = planned_fingerprint(member.job, entry) | {
            "parameters": pack.fingerprint(member.slot),
            "end_to_end": pack.end_to_end,
            **member.entry.hashes,
        }
    if start_step:
        resume(members, pack, start_step, display)
    try:
        open_logs(members, start_step, display)
        _train(members, pack, dataset.tokens, tokenizer, start_step, display)
        with interrupt.whole():
            if base_model.checksum(base) != checksum:
                shared.drop_base()
                raise RuntimeError(
                    "the frozen base changed while this pack trained; its runs are void"
                )
            for member in members:
                member.entry.cost.peak_memory_bytes = memory.bytes()
            _save(members, pack, dataset.template)
    except KeyboardInterrupt:
        unsaved = [member for member in members if not member.entry.has_trained()]
        step = max((member.entry.steps_done for member in unsaved), default=0)  # stopped: fewer
        if step:
            try:
                keep_checkpoint(unsaved, pack, step)
            except (Lost, OSError):
                log.exception("no checkpoint of the interrupted runs")
        raise
    finally:
        for member in members:
            if member.metrics_file is not None:
                member.metrics_file.close()
    return pack


def _describe(
    member: Member,
    pack: Any,
    origin: dict[str, Any],
    checksum: str,
    tokens: data.Tokens,
    train_tokens: str,
) -> None:
    """Note what this run starts from."""
    job, entry = member.job, member.entry
    contents = job.plan.contents
    entry.provenance = origin | {
        name: contents[name] for name in ("hub", "revision", "weights", "tokenizer")
    }
    entry.hashes = {
        "base": checksum,
        "train": contents["train"],
        "train_tokens": train_tokens,
        "data_order": data.order_hash(data.order_of(tokens, job.config)),
        "initial_adapter": adapters.state_hash(pack.adapter_state(member.slot)),
    }


def _save(members: list[Member], pack: Any, template: str | None) -> None:
    """Save all adapters, then record all runs as trained, then forget their checkpoints.

    In this order a kill or a power cut loses nothing: a run without its record still has its
    checkpoint, and so have its mates, in whose shape it goes on.
    """
    for member in members:
        with own_failure(member):
            member.lease.check()
            part = member.folder / f".adapter.{member.lease.holder.token}.part"
            shutil.rmtree(part, ignore_errors=True)
            best = member.watch.best if member.job.config.trainer.keep == "best" else None
            if best is not None:
                put_back(pack, member.slot, member.watch.weights)
            member.entry.adapter_step = best.step if best else member.entry.steps_done
            tensors = pack.adapter_state(member.slot)
            saved = adapters.save(tensors, pack.settings(member.slot), part)
            if template is not None:
                (part / data.TEMPLATE_FILE).write_text(template, encoding="utf-8")
            sync_folder(part)
            put_in_place(part, member.folder / "adapter", member.lease)
            sync(member.folder / "metrics.jsonl")
            member.entry.hashes["adapter"] = saved
            member.entry.files |= _files(member)
    recorded = []
    for member in members:
        if not member.failed:
            member.entry.status = "stopped" if member.entry.error else "trained"
            if member.entry.status == "trained":
                member.entry.exports = record.Exports(**member.entry.plan["exports"])
            member.entry.ended = record.now()
        try:
            member.write()
        except OSError:  # tried again when the pack is done; until then its checkpoint stays
            log.exception("record of %s", member.entry.run_id)
            continue
        if not member.failed:
            recorded.append(member)
            member.tracker.save_adapter()
    for member in recorded:
        checkpoint.remove(member.folder / "checkpoint")


def _files(member: Member) -> dict[str, record.RecordedFile]:
    """What a training leaves, for the record."""
    adapter = [f"adapter/{path.name}" for path in (member.folder / "adapter").iterdir()]
    return intact.described(member.folder, [*sorted(adapter), "config.yaml", "metrics.jsonl"])


def _train(
    members: list[Member],
    pack: Any,
    splits: dict[str, data.Tokens],
    tokenizer: Any,
    start_step: int,
    display: Display,
) -> None:
    import torch

    from lorabench.train import train

    trainer, lease = members[0].job.config.trainer, members[0].lease
    validation = Validation(members, pack, splits["validation"], tokenizer)
    begun = time.perf_counter() - members[0].earlier_seconds
    display.pack([member.job.label for member in members])
    if start_step:
        validation.after(start_step)  # where a signal came before it was scored
    steps = train(pack, splits["train"], data.pad_id(tokenizer), start_step)
    done = start_step
    kept, took = time.perf_counter(), 0.0  # when the last checkpoint was written, in seconds
    while True:
        with interrupt.whole():
            step = next(steps, None)
            if step is None:
                break
            done = step.step
            lease.check()
            seconds = time.perf_counter() - begun
            _note(members, pack, step, seconds)
        tokens = sum(member.tokens for member in members)
        losses = [step.loss[member.slot] for member in members]
        display.step(step.step, trainer.num_steps, losses, tokens / seconds)
        validation.after(step.step)
        if is_due(trainer, step.step, time.perf_counter() - kept, took):
            before = time.perf_counter()
            keep_checkpoint(members, pack, step.step)
            kept = time.perf_counter()
            took = kept - before
    if done < trainer.num_steps:  # all runs stopped before: what is left counts as done
        display.resumed((trainer.num_steps - done) * len(members))
    if pack.device.startswith("cuda"):
        torch.cuda.synchronize(pack.device)
    seconds = time.perf_counter() - begun
    for member in members:
        cost = member.entry.cost
        cost.train_seconds = round(seconds, 3)
        cost.train_tokens = member.tokens
        cost.tokens_per_second = round(member.tokens / max(1e-9, seconds), 1)
        cost.share = 1 / len(members)


def is_due(trainer: TrainerConfig, step: int, seconds: float, took: float) -> bool:
    """Whether a checkpoint is to be written after this step.

    Args:
        seconds: since the last one.
        took: seconds to write it; those that are due by time take at most 2% of the training.
    """
    if trainer.checkpoint_every and step % trainer.checkpoint_every == 0:
        return True
    minutes = trainer.checkpoint_minutes
    return minutes > 0 and step < trainer.num_steps and seconds >= max(60 * minutes, 50 * took)


def _note(members: list[Member], pack: Any, step: Any, seconds: float) -> None:
    """What a step did to each run, in its record and its metrics."""
    trainer = members[0].job.config.trainer
    for member in members:
        run = member.slot
        member.entry.cost.train_seconds = round(seconds, 3)
        if member.entry.stopped_early is not None:
            continue
        member.tokens += step.tokens[run]
        member.entry.cost.train_tokens = member.tokens
        if member.entry.error is not None:
            continue  # stopped before
        if (stage := step.stages[run]) is not None:
            member.enter(stage, pack.modules(run))
        stopped = run in step.ended
        if step.step % trainer.log_every == 0 or step.step == trainer.num_steps or stopped:
            row = {
                "train/loss": step.loss[run],
                "train/lr": step.lr[run],
                "train/grad_norm": step.grad_norm[run],
                "train/tokens_per_second": member.tokens / seconds,
            }
            member.log(step.step, row, seconds=seconds)
        if stopped:
            member.entry.error = f"stopped at step {step.step}: loss or gradient is not finite"
        else:
            member.entry.steps_done = step.step
