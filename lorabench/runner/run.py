"""One pack from its plan to its finished records: load, train, evaluate, save, check."""

from __future__ import annotations

import logging
import math
import os
import time
import traceback
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lorabench import checkpoint, data, interrupt, machine, plan, record
from lorabench import model as base_model
from lorabench.progress import Display
from lorabench.runner.members import (
    Member,
    close,
    keep_checkpoint,
    last_line,
    log_to,
    open_logs,
    open_member,
    own_failure,
    pack_id,
    planned_fingerprint,
    resume,
    summary,
)
from lorabench.runner.shared import SHARED
from lorabench.sweep import Job, Outcome

log = logging.getLogger(__name__)


def run_pack(jobs: list[Job], display: Display) -> list[Outcome]:
    """Train, evaluate and record the runs of a pack; a failure is an outcome, never an exception.

    A pack that runs out of memory before its first step is halved, down to runs alone.

    Raises:
        KeyboardInterrupt: after the runs are recorded as interrupted, with a checkpoint.
    """
    begun = time.perf_counter()
    members = [open_member(job, jobs) for job in jobs]
    halve, logs = False, []
    try:
        for member in members:
            member.folder.mkdir(parents=True, exist_ok=True)
            content = OmegaConf.to_yaml(OmegaConf.create(member.entry.config))
            record.write_atomic(member.folder / "config.yaml", content)
            member.entry.write(member.folder)
            logs.append(log_to(member.folder / "train.log"))
        _train_and_record(members, display)
    except KeyboardInterrupt:
        for member in members:
            member.entry.status = "interrupted"
            member.entry.error = "interrupted by a signal"
        raise
    except Exception as error:
        log.error("pack %s failed\n%s", pack_id(jobs), traceback.format_exc())
        started = any(member.entry.steps_done for member in members)
        halve = machine.is_out_of_memory(error) and len(jobs) > 1 and not started
        for member in members:
            member.error = member.error or error
    finally:
        for member in members:
            close(member, time.perf_counter() - begun)
        for handler in logs:
            logging.getLogger().removeHandler(handler)
            handler.close()
    if halve:
        SHARED.bases.clear()
        half = (len(jobs) + 1) // 2
        display.say(f"a pack of {len(jobs)} does not fit into memory; trying packs of {half}")
        return [*run_pack(jobs[:half], display), *run_pack(jobs[half:], display)]
    outcomes = []
    for member in members:
        entry = member.entry
        display.done(member.job.label, last_line(entry), entry.config["trainer"]["steps"])
        outcomes.append(
            Outcome(entry.run_id, member.job.label, entry.status, str(member.folder), entry.error)
        )
    return outcomes


def make_pack(base: Any, jobs: list[Job], device: str) -> Any:
    """The runs of these jobs on one base, ready to train."""
    from lorabench.pack import ModulePack, StackedPack

    configs = [job.config for job in jobs]
    modules = [job.plan.lora_modules for job in jobs]
    if jobs[0].plan.alone is not None:
        return ModulePack(base, configs[0], modules[0], device)
    skeleton = plan.skeleton(configs[0].model, len(jobs[0].plan.labels))
    return StackedPack(base, skeleton, configs, modules, device)


def _train_and_record(members: list[Member], display: Display) -> None:
    """From planned runs to their finished records."""
    from lorabench import adapters

    jobs = [member.job for member in members]
    config = jobs[0].config  # what runs of a pack share: base, data, steps, batch sizes
    machine.configure_torch(config)
    device = machine.choose_device(config.trainer.device)
    memory = machine.PeakMemory(device)
    provenance = record.provenance(device) | base_model.identity(config.model)
    tokenizer = SHARED.tokenizer(config)
    labels = jobs[0].plan.labels
    splits, notes = SHARED.splits(config, labels)
    base, checksum = SHARED.base(config, device, len(labels))
    pack = make_pack(base, jobs, device)
    for run, member in enumerate(members):
        entry, trainer = member.entry, member.job.config.trainer
        entry.provenance = provenance
        entry.notes = [*member.job.plan.warnings, *notes]
        shape = (len(splits["train"]), trainer.batch_size, member.job.config.seeds.data)
        entry.hashes = {
            "base": checksum,
            "data": data.content_hash(config.data),
            "data_order": data.order_hash(*shape, trainer.steps),
            "initial_adapter": adapters.state_hash(pack.adapter_state(run)),
        }
        member.fingerprint = planned_fingerprint(member.job, jobs) | {
            "parameters": pack.fingerprint(run),
            **entry.hashes,
        }
    start_step = resume(members, pack, display)
    try:
        open_logs(members, start_step, display)
        _train(members, pack, splits, tokenizer, start_step, display)
        _evaluate(members, pack, splits, tokenizer)
        for member in members:
            member.entry.cost.peak_memory_bytes = memory.bytes()
        if base_model.checksum(base) != checksum:
            SHARED.bases.clear()
            raise RuntimeError("the frozen base changed while this pack trained; its runs are void")
        for run, member in enumerate(members):
            with own_failure(member):
                tensors = pack.adapter_state(run)
                saved = adapters.save(tensors, pack.settings(run), member.folder / "adapter")
                member.entry.hashes["adapter"] = saved
                checkpoint.remove(member.folder / "checkpoint")
                member.entry.status = "stopped" if member.entry.error else "finished"
                member.tracker.finish(summary(member))
    except BaseException as error:
        trained = any(member.entry.steps_done for member in members)
        if isinstance(error, KeyboardInterrupt) and trained and not interrupt.torn():
            keep_checkpoint(members, pack)
        for member in members:
            member.tracker.finish({}, failed=True)
        raise
    finally:
        for member in members:
            if member.metrics_file is not None:
                member.metrics_file.close()
            if member.error is not None:
                member.tracker.finish({}, failed=True)


def _train(
    members: list[Member],
    pack: Any,
    splits: dict[str, data.Tokens],
    tokenizer: Any,
    start_step: int,
    display: Display,
) -> None:
    import torch

    from lorabench.evaluate import evaluate, summarise
    from lorabench.train import train

    trainer = members[0].job.config.trainer
    validation = _cut(splits["validation"], trainer.eval_examples)
    pad_id = data.pad_id(tokenizer)
    begun = time.perf_counter() - members[0].earlier_seconds
    display.pack([member.job.label for member in members])
    steps = train(pack, splits["train"], pad_id, start_step)
    while True:
        with interrupt.whole():
            step = next(steps, None)
            if step is None:
                break
            seconds = time.perf_counter() - begun
            _note(members, pack, step, seconds)
        tokens = sum(member.tokens for member in members)
        display.step(step.step, trainer.steps, step.loss, tokens / seconds)
        due = trainer.eval_every and step.step % trainer.eval_every == 0
        if due and step.step < trainer.steps:
            tables = evaluate(pack, validation, tokenizer, pad_id, ["nll"])
            for member, table in zip(members, tables, strict=True):
                if member.entry.error is None:
                    value = summarise(table, ["nll"])["nll"][0]
                    member.log(step.step, {"validation/nll": value})
        due = trainer.checkpoint_every and step.step % trainer.checkpoint_every == 0
        if due:
            keep_checkpoint(members, pack)
    if pack.device.startswith("cuda"):
        torch.cuda.synchronize(pack.device)
    seconds = time.perf_counter() - begun
    for member in members:
        cost = member.entry.cost
        cost.train_seconds = round(seconds, 3)
        cost.train_tokens = member.tokens
        cost.tokens_per_second = round(member.tokens / max(1e-9, seconds), 1)
        cost.share = 1 / len(members)


def _note(members: list[Member], pack: Any, step: Any, seconds: float) -> None:
    """What a step did to each run, in its record and its metrics."""
    trainer = members[0].job.config.trainer
    for run, member in enumerate(members):
        member.tokens += step.tokens[run]
        member.entry.cost.train_seconds = round(seconds, 3)
        member.entry.cost.train_tokens = member.tokens
        if member.entry.error is not None:
            continue  # stopped before
        if step.stage is not None:
            member.enter(step.stage, pack.modules(run))
        stopped = run in step.ended
        if step.step % trainer.log_every == 0 or step.step == trainer.steps or stopped:
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


def _cut(tokens: data.Tokens, count: int | None) -> data.Tokens:
    return tokens if count is None else tokens.first(count)


def _evaluate(
    members: list[Member], pack: Any, splits: dict[str, data.Tokens], tokenizer: Any
) -> None:
    """Scores and predictions of every member on validation and test."""
    from lorabench.evaluate import (
        DEFINITIONS,
        GENERATED,
        answers,
        eos_token_ids,
        evaluate,
        summarise,
    )

    config = members[0].job.config
    wanted, pad_id = config.data.metric, data.pad_id(tokenizer)
    begun = time.perf_counter()
    predictions: list[list[Any]] = [[] for _ in members]
    for split in ("validation", "test"):
        tokens = _cut(splits[split], config.trainer.eval_examples)
        tables = evaluate(pack, tokens, tokenizer, pad_id, wanted)
        if split == "test" and set(GENERATED) & set(wanted):
            eos = eos_token_ids(pack.tree.generation_config, tokenizer)
            written = answers(pack, tokens, tokenizer, pad_id, config.data, eos)
            for name in written[0].column_names:
                tables = [
                    table.append_column(name, one[name])
                    for table, one in zip(tables, written, strict=True)
                ]
        for member, table, kept in zip(members, tables, predictions, strict=True):
            member.entry.metrics[split] = {
                name: record.Metric(
                    value=value if math.isfinite(value) else None,
                    num_examples=count,
                    definition=DEFINITIONS[name],
                )
                for name, (value, count) in summarise(table, wanted).items()
            }
            kept.append(table.add_column(0, "split", [[split] * len(table)]))
    for member, tables in zip(members, predictions, strict=True):
        with own_failure(member):
            _write_predictions(member.folder / "predictions.parquet", tables)
        member.entry.cost.evaluate_seconds = round(time.perf_counter() - begun, 3)


def _write_predictions(path: Path, tables: list[Any]) -> None:
    from pyarrow import concat_tables, parquet

    part = path.with_name(f".{path.name}.part")
    parquet.write_table(concat_tables(tables, promote_options="default"), part)
    os.replace(part, path)
