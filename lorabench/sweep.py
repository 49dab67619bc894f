"""The runs of one command: all planned, or all their errors at once; what earlier ones left."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from lorabench import config as configs
from lorabench import plan, record
from lorabench.config import Config, ConfigErrors

log = logging.getLogger(__name__)

KEPT = ("finished", "stopped")  # outcomes that a repeat of the command keeps


@dataclass
class Job:
    """One run of the command, planned."""

    config: Config
    label: str  # the overrides that tell it from the others
    plan: plan.Plan

    @property
    def folder(self) -> Path:
        return Path(self.plan.folder)


@dataclass
class Outcome:
    """How one run ended."""

    run_id: str
    label: str
    status: str
    folder: str
    error: str | None = None
    kept: bool = False


# --- planning --------------------------------------------------------------------------------


def plan_jobs(composed: list[DictConfig], labels: list[str]) -> list[Job]:
    """Plan every run; nothing is loaded but names and shapes.

    Raises:
        ConfigErrors: everything wrong with any of them, each error once.
    """
    labels = distinct(labels)
    mistakes = Mistakes(len(composed))
    jobs: list[Job] = []
    typed: list[tuple[Config, str]] = []
    for cfg, label in zip(composed, labels, strict=True):
        with mistakes.of(label):
            config = configs.typed(cfg)
            if found := plan.check(config):
                raise ConfigErrors(found)
            typed.append((config, label))
    mistakes.refuse()
    for config, label in typed:
        with mistakes.of(label):
            jobs.append(Job(config, label, plan.make(config)))
    mistakes.refuse()
    return jobs


def distinct(labels: list[str]) -> list[str]:
    """The overrides that tell the runs of a command apart; those they share left out."""
    words = [label.split() for label in labels]
    common = set(words[0]).intersection(*words[1:]) if len(words) > 1 else set()
    return [" ".join(word for word in label if word not in common) or "defaults" for label in words]


class Mistakes:
    """What is wrong with the runs of a command, gathered over them all."""

    def __init__(self, total: int):
        self.total = total  # runs of the command
        self.found: dict[str, list[str]] = {}  # an error, and the labels of the runs it is about

    @contextmanager
    def of(self, *labels: str) -> Iterator[None]:
        """What is refused within is wrong with these runs."""
        try:
            yield
        except ConfigErrors as refused:
            for error in refused.errors:
                self.found.setdefault(error, []).extend(labels)

    def refuse(self) -> None:
        """Raise it all, if there is any.

        Raises:
            ConfigErrors: each error once.
        """
        if self.found:
            raise ConfigErrors(_with_runs(*one, self.total) for one in self.found.items())


def _with_runs(error: str, labels: list[str], total: int) -> str:
    """Says which runs of a sweep an error is about, unless it is all of them."""
    if len(labels) == total:
        return error
    more = f" and {len(labels) - 2} more" if len(labels) > 2 else ""
    return f"{error}  [{' | '.join(labels[:2])}{more}]"


def earlier(job: Job) -> Outcome | None:
    """The outcome of an earlier command, where it is to be kept."""
    found = record.read(job.folder)
    if found is None or found.status not in (*KEPT, "running"):
        return None
    error = found.error
    if found.status == "running":
        process = found.process
        error = f"being trained by process {process.get('pid')} on {process.get('host')}"
    return Outcome(job.plan.run_id, job.label, found.status, job.plan.folder, error, kept=True)


def lacking(outcome: Outcome) -> list[str]:
    """Files of a run that is kept, deleted since it ended."""
    if outcome.status not in KEPT:
        return []
    names = ("adapter/adapter_model.safetensors", "predictions.parquet")
    return [name for name in names if not (Path(outcome.folder) / name).is_file()]


# --- packs -----------------------------------------------------------------------------------

# What each run of a pack has for itself; everything else must be the same.
OWN_GROUPS = ("lora", "head", "target_modules", "seeds", "seed", "tracker", "sweep", "output_dir")
OWN_TRAINER = (
    "lr", "schedule", "warmup_steps", "weight_decay", "beta1", "beta2", "eps", "max_grad_norm",
)  # fmt: skip


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
    packs = interrupted_packs(jobs)
    placed = {i for members in packs for i in members}
    for i, job in enumerate(jobs):
        if i in placed:
            continue
        if job.plan.alone is not None:
            packs.append([i])
            continue
        content = dataclasses.asdict(job.config)
        shared = {key: value for key, value in content.items() if key not in OWN_GROUPS}
        shared["trainer"] = {k: v for k, v in shared["trainer"].items() if k not in OWN_TRAINER}
        alike.setdefault(json.dumps(shared, sort_keys=True), []).append(i)
    for members in alike.values():
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


def interrupted_packs(jobs: list[Job]) -> list[list[int]]:
    """Packs that an earlier command left with a checkpoint: they go on with the same members.

    A run's bits depend on the shape of its pack, so a resumed pack is the same or none.
    """
    index = {job.plan.run_id: i for i, job in enumerate(jobs)}
    packs = []
    for i, job in enumerate(jobs):
        found = record.read(job.folder)
        if found is None or found.status != "interrupted":
            continue
        members = found.plan.get("pack", {}).get("members", [])
        if members and members[0] == job.plan.run_id and all(m in index for m in members):
            packs.append([index[m] for m in members])
            assert packs[-1][0] == i
    return packs
