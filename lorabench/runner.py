"""One pack from its plan to its finished records: load, train, evaluate, save, check."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from lorabench import checkpoint, data, machine, plan, record, tracking
from lorabench import model as base_model
from lorabench.config import Config, ConfigErrors
from lorabench.progress import Display, clock
from lorabench.sweep import Job, Outcome

log = logging.getLogger(__name__)


# --- what runs of one base share -------------------------------------------------------------


@dataclass
class Shared:
    """The base, its tokenizer and the tokenised data of the last runs, kept for the next."""

    bases: dict[str, tuple[Any, str]] = field(default_factory=dict)  # model, checksum
    tokenizers: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, tuple[dict[str, data.Tokens], list[str]]] = field(default_factory=dict)

    def base(self, config: Config, device: str) -> tuple[Any, str]:
        key = repr((config.model, device))
        if key not in self.bases:
            self.bases.clear()  # one frozen base at a time
            loaded = base_model.load(config.model, device)
            self.bases[key] = (loaded, base_model.checksum(loaded))
        return self.bases[key]

    def tokenizer(self, config: Config) -> Any:
        key = repr((config.model.path, config.model.revision))
        if key not in self.tokenizers:
            self.tokenizers[key] = base_model.tokenizer(config.model)
        return self.tokenizers[key]

    def splits(self, config: Config) -> tuple[dict[str, data.Tokens], list[str]]:
        """The tokenised splits, and what is to be said about them."""
        key = repr((config.model.path, config.model.revision, config.data))
        if key not in self.tokens:
            self.tokens.clear()
            tokenizer = self.tokenizer(config)
            examples = data.load(config.data)
            found, notes = {}, list(examples.notes)
            for split in ("train", "validation", "test"):
                tokens = data.tokenise(getattr(examples, split), tokenizer, config.data)
                found[split] = tokens
                if tokens.num_too_long:
                    notes.append(
                        f"data.{split}: {tokens.num_too_long} examples of more than "
                        f"{config.data.max_length} tokens are left out (data.max_length)"
                    )
                if not tokens.input_ids:
                    raise ConfigErrors(
                        f"data.{split}: must keep an example of at most data.max_length="
                        f"{config.data.max_length} tokens; all {tokens.num_too_long} are longer; "
                        f"raise data.max_length"
                    )
            self.tokens[key] = (found, notes)
        return self.tokens[key]


SHARED = Shared()


# --- one pack --------------------------------------------------------------------------------


@dataclass
class Member:
    """One run while its pack trains."""

    job: Job
    entry: record.Record
    tracker: tracking.NoTracker = field(default_factory=tracking.NoTracker)
    metrics_file: IO[str] | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    error: Exception | None = None  # what went wrong with this run alone

    @property
    def folder(self) -> Path:
        return self.job.folder

    def log(self, step: int, row: dict[str, float], **more: float) -> None:
        """One row, in the file and in the tracker."""
        assert self.metrics_file is not None
        record.append_line(self.metrics_file, {"step": step, **row, **more})
        self.tracker.log(row, step)


def pack_id(jobs: list[Job]) -> str:
    """First 12 hex digits of sha256 over the run ids, in order."""
    ids = " ".join(job.plan.run_id for job in jobs)
    return hashlib.sha256(ids.encode()).hexdigest()[:12]


def run_pack(jobs: list[Job], display: Display) -> list[Outcome]:
    """Train, evaluate and record the runs of a pack; a failure is an outcome, never an exception.

    A pack that runs out of memory before its first step is halved, down to runs alone.

    Raises:
        KeyboardInterrupt: after the runs are recorded as interrupted, with a checkpoint.
    """
    begun = time.perf_counter()
    members = [_open(job, jobs) for job in jobs]
    halve, logs = False, []
    try:
        for member in members:
            member.folder.mkdir(parents=True, exist_ok=True)
            content = OmegaConf.to_yaml(OmegaConf.create(member.entry.config))
            record.write_atomic(member.folder / "config.yaml", content)
            member.entry.write(member.folder)
            logs.append(_log_to(member.folder / "train.log"))
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
            _close(member, time.perf_counter() - begun)
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
        display.done(member.job.label, _last_line(entry), entry.config["trainer"]["steps"])
        outcomes.append(
            Outcome(entry.run_id, member.job.label, entry.status, str(member.folder), entry.error)
        )
    return outcomes


def _log_to(path: Path) -> logging.Handler:
    """Send this process's log to a run's own file as well."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    return handler


def _open(job: Job, jobs: list[Job]) -> Member:
    planned = job.plan.model_copy()
    planned.pack = {
        "id": pack_id(jobs),
        "size": len(jobs),
        "members": [mate.plan.run_id for mate in jobs],
        "alone": job.plan.alone,
    }
    return Member(
        job,
        record.Record(
            run_id=job.plan.run_id,
            sweep=job.config.sweep,
            status="running",
            seeds=dataclasses.asdict(job.config.seeds),
            config=dataclasses.asdict(job.config),
            plan=planned.model_dump(),
            provenance={},
            process=record.this_process(),
            started=record.now(),
        ),
    )


def _close(member: Member, seconds: float) -> None:
    """Write the record's last state."""
    entry = member.entry
    if member.error is not None:
        first = str(member.error).strip().splitlines()
        entry.status = "failed"
        entry.error = f"{type(member.error).__name__}: {first[0] if first else ''}".rstrip(": ")
        if isinstance(member.error, ConfigErrors):
            entry.error = "; ".join(member.error.errors)
    entry.cost.total_seconds = round(seconds, 3)
    entry.ended = record.now()
    entry.process = {}
    try:
        entry.write(member.folder)
    except OSError as error:
        entry.status, entry.error = "failed", f"record cannot be written: {error}"


def _last_line(entry: record.Record) -> str:
    if entry.status == "failed":
        return f"failed: {entry.error}"
    scores = "".join(
        f"  {name} {'not finite' if m.value is None else format(m.value, '.4f')}"
        for name, m in entry.metrics.get("test", {}).items()
    )
    size = entry.plan["pack"]["size"]
    packed = f" in a pack of {size}" if size > 1 else ""
    return f"{entry.status}{scores}  {clock(entry.cost.total_seconds)}{packed}"


def _make_pack(base: Any, jobs: list[Job], device: str) -> Any:
    from lorabench.pack import ModulePack, StackedPack

    configs = [job.config for job in jobs]
    modules = [job.plan.lora_modules for job in jobs]
    if jobs[0].plan.alone is not None:
        return ModulePack(base, configs[0], modules[0], device)
    return StackedPack(base, plan.skeleton(configs[0].model), configs, modules, device)


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
    splits, notes = SHARED.splits(config)
    base, checksum = SHARED.base(config, device)
    pack = _make_pack(base, jobs, device)
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
        member.fingerprint = {
            "run_id": entry.run_id,
            "pack": entry.plan["pack"]["id"],
            "parameters": pack.fingerprint(run),
            "packages": {
                k: v
                for k, v in provenance["packages"].items()
                if k in ("torch", "peft", "transformers")
            },
            **entry.hashes,
        }
    start_step = _resume(members, pack, display)
    try:
        _open_logs(members, start_step, display)
        _train(members, pack, splits, tokenizer, start_step, display)
        _evaluate(members, pack, splits, tokenizer)
        for member in members:
            member.entry.cost.peak_memory_bytes = memory.bytes()
        if base_model.checksum(base) != checksum:
            SHARED.bases.clear()
            raise RuntimeError("the frozen base changed while this pack trained; its runs are void")
        for run, member in enumerate(members):
            with _own_failure(member):
                tensors = pack.adapter_state(run)
                saved = adapters.save(tensors, pack.settings(run), member.folder / "adapter")
                member.entry.hashes["adapter"] = saved
                checkpoint.remove(member.folder / "checkpoint")
                member.entry.status = "stopped" if member.entry.error else "finished"
                member.tracker.finish(_summary(member))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and members[0].entry.steps_done:
            _checkpoint(members, pack)
        for member in members:
            member.tracker.finish({}, failed=True)
        raise
    finally:
        for member in members:
            if member.metrics_file is not None:
                member.metrics_file.close()
            if member.error is not None:
                member.tracker.finish({}, failed=True)


@contextlib.contextmanager
def _own_failure(member: Member) -> Any:
    """What fails here is this run's, not its pack's."""
    try:
        yield
    except Exception as error:
        log.error("run %s failed\n%s", member.entry.run_id, traceback.format_exc())
        member.error = error


def _summary(member: Member) -> dict[str, float]:
    scores = {
        f"{split}/{name}": metric.value
        for split, found in member.entry.metrics.items()
        for name, metric in found.items()
        if metric.value is not None
    }
    return scores | {
        "trainable_parameters": member.job.plan.trainable_parameters,
        "train_seconds": member.entry.cost.train_seconds,
    }


def _open_logs(members: list[Member], start_step: int, display: Display) -> None:
    for member in members:
        path = member.folder / "metrics.jsonl"
        kept = _kept_rows(path, start_step)
        member.metrics_file = open(path, "w", encoding="utf-8")  # noqa: SIM115
        for row in kept:
            record.append_line(member.metrics_file, row)
        config = member.job.config
        member.tracker = tracking.start(
            config.tracker,
            run_id=member.entry.run_id,
            sweep=config.sweep,
            name=member.job.label,
            tags=[member.job.plan.model, f"head={config.head.policy}"],
            config=member.entry.config,
            folder=member.folder.parent,
            notify=display.say,
        )


def _kept_rows(path: Path, steps_done: int) -> list[dict[str, Any]]:
    """Rows of an interrupted run's metrics.jsonl that its checkpoint has behind it."""
    rows = []
    if steps_done and path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break  # the line a kill cut short
            if row["step"] <= steps_done:
                rows.append(row)
    return rows


def _resume(members: list[Member], pack: Any, display: Display) -> int:
    """Load the latest step that every member has a checkpoint of; 0 where there is none."""
    steps = [
        set(checkpoint.steps(member.folder / "checkpoint", member.fingerprint["pack"]))
        for member in members
    ]
    common = set.intersection(*steps)
    if not common:
        return 0
    step = max(common)
    for run, member in enumerate(members):
        state = checkpoint.load(member.folder / "checkpoint", step, member.fingerprint)
        pack.load_state(run, state)
        member.entry.steps_done = step
    display.resumed(step * len(members))
    return step


def _checkpoint(members: list[Member], pack: Any) -> None:
    """All members' checkpoints of this step: written first, then put in place together."""
    for run, member in enumerate(members):
        checkpoint.write(
            member.folder / "checkpoint",
            pack.state(run),
            members[0].entry.steps_done,
            member.fingerprint,
        )
    for member in members:
        checkpoint.commit(member.folder / "checkpoint")


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
    begun = time.perf_counter()
    display.pack([member.job.label for member in members])
    for step in train(pack, splits["train"], pad_id, start_step):
        seconds = time.perf_counter() - begun
        for run, member in enumerate(members):
            member.tokens += step.tokens[run]
            if member.entry.error is not None:
                continue  # stopped before
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
        if due and not any(member.entry.error for member in members):
            _checkpoint(members, pack)
    if pack.device.startswith("cuda"):
        torch.cuda.synchronize(pack.device)
    seconds = time.perf_counter() - begun
    for member in members:
        cost = member.entry.cost
        cost.train_seconds = round(seconds, 3)
        cost.train_tokens = member.tokens
        cost.tokens_per_second = round(member.tokens / max(1e-9, seconds), 1)
        cost.share = 1 / len(members)


def _cut(tokens: data.Tokens, count: int | None) -> data.Tokens:
    return tokens if count is None else tokens.first(count)


def _evaluate(
    members: list[Member], pack: Any, splits: dict[str, data.Tokens], tokenizer: Any
) -> None:
    """Scores and predictions of every member on validation and test."""
    from lorabench.evaluate import DEFINITIONS, answers, evaluate, summarise

    config = members[0].job.config
    wanted, pad_id = config.data.metric, data.pad_id(tokenizer)
    begun = time.perf_counter()
    predictions: list[list[Any]] = [[] for _ in members]
    for split in ("validation", "test"):
        tokens = _cut(splits[split], config.trainer.eval_examples)
        tables = evaluate(pack, tokens, tokenizer, pad_id, wanted)
        if "answer" in wanted and split == "test":
            written = answers(pack, tokens, tokenizer, pad_id, config.data)
            tables = [
                table.merge(one, on="example", how="left")
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
            table.insert(0, "split", split)
            kept.append(table)
    for member, tables in zip(members, predictions, strict=True):
        with _own_failure(member):
            _write_predictions(member.folder / "predictions.parquet", tables)
        member.entry.cost.evaluate_seconds = round(time.perf_counter() - begun, 3)


def _write_predictions(path: Path, tables: list[Any]) -> None:
    import pandas as pd

    part = path.with_name(f".{path.name}.part")
    pd.concat(tables, ignore_index=True).to_parquet(part, index=False)
    os.replace(part, path)
