"""One pack from its plan to its finished records: load, train, evaluate, save, check."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import resource
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from lorabench import data, record, tracking
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


def choose_device(wanted: str) -> str:
    """`auto` becomes what this machine has; anything else must be there."""
    import torch

    if wanted == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(wanted.partition(":")[0], True):
        raise ConfigErrors(
            f"trainer.device: must be on this machine; got {wanted}; use auto or cpu"
        )
    return wanted


def configure_torch(config: Config) -> None:
    """Threads and determinism of this process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    trainer = config.trainer
    if trainer.num_threads is not None and torch.get_num_threads() != trainer.num_threads:
        torch.set_num_threads(trainer.num_threads)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    torch.use_deterministic_algorithms(trainer.deterministic)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = trainer.allow_tf32
    torch.backends.cudnn.allow_tf32 = trainer.allow_tf32


class PeakMemory:
    """The most memory a run held: on the device, or of this process on a CPU."""

    def __init__(self, device: str):
        import torch

        self.device = device
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # Linux: forget the high-water mark of the runs before.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        import torch

        if self.device.startswith("cuda"):
            return int(torch.cuda.max_memory_allocated(self.device))
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.partition("VmHWM:")[2].split()[0]) * 1024
        except (OSError, IndexError):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if os.uname().sysname == "Darwin" else peak * 1024


# --- one pack --------------------------------------------------------------------------------


def run_pack(jobs: list[Job], display: Display) -> list[Outcome]:
    """Train, evaluate and record the runs of a pack; a failure is an outcome, never an exception.

    Raises:
        KeyboardInterrupt: after the runs are recorded as interrupted, with a checkpoint.
    """
    outcomes = []
    for job in jobs:
        outcomes.append(_run(job, display))
    return outcomes


def _run(job: Job, display: Display) -> Outcome:
    folder, config = job.folder, job.config
    seeds = dataclasses.asdict(config.seeds)
    entry = record.Record(
        run_id=job.plan.run_id,
        sweep=config.sweep,
        status="running",
        seeds=seeds,
        config=dataclasses.asdict(config),
        plan=job.plan.model_dump(),
        provenance={},
        process=record.this_process(),
        started=record.now(),
    )
    begun = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record.write_atomic(
            folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(entry.config))
        )
        entry.write(folder)
        _train_and_record(job, entry, display)
    except KeyboardInterrupt:
        entry.status, entry.error = "interrupted", "interrupted by a signal"
        raise
    except Exception as error:
        first = str(error).strip().splitlines()
        entry.status = "failed"
        entry.error = f"{type(error).__name__}: {first[0] if first else ''}".rstrip(": ")
        if isinstance(error, ConfigErrors):
            entry.error = "; ".join(error.errors)
        log.error("run %s failed\n%s", job.plan.run_id, traceback.format_exc())
        display.skip(config.trainer.steps - entry.steps_done)
    finally:
        entry.cost.total_seconds = round(time.perf_counter() - begun, 3)
        entry.ended = record.now()
        entry.process = {}
        try:
            entry.write(folder)
        except OSError as error:
            entry.status, entry.error = "failed", f"record cannot be written: {error}"
    display.done(job.label, _last_line(entry))
    return Outcome(job.plan.run_id, job.label, entry.status, str(folder), entry.error)


def _last_line(entry: record.Record) -> str:
    if entry.status == "failed":
        return f"failed: {entry.error}"
    scores = entry.metrics.get("test", {})
    text = "  ".join(
        f"{name} {'not finite' if m.value is None else format(m.value, '.4f')}"
        for name, m in scores.items()
    )
    return f"{entry.status}  {text}  {clock(entry.cost.total_seconds)}".replace("    ", "  ")


def _train_and_record(job: Job, entry: record.Record, display: Display) -> None:
    """From a planned run to its finished record."""
    import torch

    from lorabench import adapters, checkpoint
    from lorabench.evaluate import DEFINITIONS, answers, evaluate, summarise
    from lorabench.pack import ModulePack
    from lorabench.train import train

    config, folder = job.config, job.folder
    trainer = config.trainer
    configure_torch(config)
    device = choose_device(trainer.device)
    entry.provenance = record.provenance(device) | base_model.identity(config.model)
    tokenizer = SHARED.tokenizer(config)
    splits, notes = SHARED.splits(config)
    entry.notes = [*job.plan.warnings, *notes]
    for note in notes:
        log.warning(note)
    base, checksum = SHARED.base(config, device)
    memory = PeakMemory(device)
    pack = ModulePack(base, config, job.plan.lora_modules, device)
    pad_id = data.pad_id(tokenizer)

    num_examples = len(splits["train"].input_ids)
    shape = (num_examples, trainer.batch_size, config.seeds.data, trainer.steps)
    entry.hashes = {
        "base": checksum,
        "data": data.content_hash(config.data),
        "data_order": data.order_hash(*shape),
        "initial_adapter": adapters.state_hash(adapters.adapter_state(pack.wrapped)),
    }
    fingerprint = {
        "run_id": job.plan.run_id,
        "parameters": [[n, list(p.shape)] for n, p in pack.parameters.items()],
        "packages": {
            k: v for k, v in record.versions().items() if k in ("torch", "peft", "transformers")
        },
        **entry.hashes,
    }
    saved = checkpoint.load(folder / "checkpoint", fingerprint)
    if saved is not None:
        pack.load_state(saved[0])
        entry.steps_done = saved[1]
        display.skip(saved[1])
    rows = _kept_rows(folder / "metrics.jsonl", entry.steps_done)
    tracker = tracking.start(
        config.tracker,
        run_id=job.plan.run_id,
        sweep=config.sweep,
        name=job.label,
        tags=[job.plan.model, f"head={config.head.policy}"],
        config=entry.config,
        folder=folder.parent,
        notify=display.say,
    )
    begun = time.perf_counter()
    tokens_seen = 0
    stopped = False
    evaluated = (
        splits
        if trainer.eval_examples is None
        else {name: split.first(trainer.eval_examples) for name, split in splits.items()}
    )
    try:
        with open(folder / "metrics.jsonl", "w", encoding="utf-8") as metrics_file:
            for row in rows:
                record.append_line(metrics_file, row)
            order = data.order(*shape, start_step=entry.steps_done)
            for step in train(pack, splits["train"], pad_id, order, entry.steps_done):
                tokens_seen += step.tokens
                seconds = time.perf_counter() - begun
                stopped = not np.isfinite([*step.loss, *step.grad_norm]).all()
                if step.step % trainer.log_every == 0 or step.step == trainer.steps or stopped:
                    row = {
                        "train/loss": step.loss[0],
                        "train/lr": step.lr,
                        "train/grad_norm": step.grad_norm[0],
                        "train/tokens_per_second": tokens_seen / seconds,
                    }
                    record.append_line(metrics_file, {"step": step.step, **row, "seconds": seconds})
                    tracker.log(row, step.step)
                display.step(
                    job.label, step.step, trainer.steps, step.loss[0], tokens_seen / seconds
                )
                if stopped:
                    entry.error = f"stopped at step {step.step}: loss or gradient is not finite"
                    display.skip(trainer.steps - step.step)
                    break
                entry.steps_done = step.step
                if (
                    trainer.eval_every
                    and step.step % trainer.eval_every == 0
                    and step.step < trainer.steps
                ):
                    table = evaluate(pack, evaluated["validation"], tokenizer, pad_id, ["nll"])[0]
                    value = summarise(table, ["nll"])["nll"][0]
                    record.append_line(metrics_file, {"step": step.step, "validation/nll": value})
                    tracker.log({"validation/nll": value}, step.step)
                if trainer.checkpoint_every and step.step % trainer.checkpoint_every == 0:
                    checkpoint.save(folder / "checkpoint", pack.state(), step.step, fingerprint)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        entry.cost.train_seconds = round(time.perf_counter() - begun, 3)
        entry.cost.train_tokens = tokens_seen
        entry.cost.tokens_per_second = round(tokens_seen / max(1e-9, entry.cost.train_seconds), 1)

        begun = time.perf_counter()
        tables = []
        for split in ("validation", "test"):
            table = evaluate(pack, evaluated[split], tokenizer, pad_id, config.data.metric)[0]
            if "answer" in config.data.metric and split == "test":
                written = answers(pack, evaluated[split], tokenizer, pad_id, config.data)
                table = table.merge(written, on="example", how="left")
            entry.metrics[split] = {
                name: record.Metric(
                    value=value if np.isfinite(value) else None,
                    num_examples=count,
                    definition=DEFINITIONS[name],
                )
                for name, (value, count) in summarise(table, config.data.metric).items()
            }
            table.insert(0, "split", split)
            tables.append(table)
        _write_predictions(folder / "predictions.parquet", tables)
        entry.cost.evaluate_seconds = round(time.perf_counter() - begun, 3)
        entry.cost.peak_memory_bytes = memory.bytes()

        entry.hashes["adapter"] = adapters.save(pack.wrapped, folder / "adapter")
        if base_model.checksum(base) != checksum:
            SHARED.bases.clear()
            raise RuntimeError("the frozen base changed while this run trained; its result is void")
        checkpoint.remove(folder / "checkpoint")
        entry.status = "stopped" if stopped else "finished"
        summary = {
            f"{split}/{name}": metric.value
            for split, scores in entry.metrics.items()
            for name, metric in scores.items()
            if metric.value is not None
        }
        tracker.finish(
            summary
            | {
                "trainable_parameters": job.plan.trainable_parameters,
                "train_seconds": entry.cost.train_seconds,
            }
        )
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and entry.steps_done:
            checkpoint.save(folder / "checkpoint", pack.state(), entry.steps_done, fingerprint)
        tracker.finish({}, failed=True)
        raise


def _write_predictions(path: Path, tables: list[Any]) -> None:
    import pandas as pd

    part = path.with_name(f".{path.name}.part")
    pd.concat(tables, ignore_index=True).to_parquet(part, index=False)
    os.replace(part, path)


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
