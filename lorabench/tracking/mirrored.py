"""What a tracker gets of a run, and what every kind of tracker can do."""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.config import Config, TrackerConfig, lora_alpha, model_name
from lorabench.record import Record


@dataclass
class Ending:
    """What a run ends with."""

    summary: dict[str, Any]
    failed: bool


@dataclass
class Mirrored:
    """A run as its tracker gets it. The group is the sweep, the id is the run id."""

    settings: TrackerConfig
    run_id: str
    sweep: str
    name: str
    tags: list[str]
    config: dict[str, Any]
    folder: Path  # the sweep's
    notify: Callable[[str], None]  # where a failure is told, from another thread
    notes: str = ""
    num_rows: int = 0  # in metrics.jsonl when the tracker starts, of a run that is resumed

    @property
    def run_folder(self) -> Path:
        return self.folder / self.run_id

    def rows(self, most: int | None = None) -> Iterator[dict[str, Any]]:
        """Read rows of metrics.jsonl, from the first one on."""
        if most == 0:
            return
        with open(self.run_folder / "metrics.jsonl", encoding="utf-8") as lines:
            for line in itertools.islice(lines, most):
                row = json.loads(line)
                row.pop("seconds", None)  # trackers have a clock of their own
                yield row


class NoTracker:
    """A run's tracker, and the null object: the loop never asks whether there is a tracker."""

    backend: Backend | None = None

    def log(self, row: dict[str, float], step: int) -> None:
        """Take the values of one step. Never blocks."""

    def save_adapter(self) -> None:
        """Take the adapter, which lies in the run's folder now. Never blocks."""


class Backend(ABC):
    """What the trackers of one kind share while a command runs."""

    @abstractmethod
    def start(self, mirrored: Mirrored) -> NoTracker:
        """Start the tracker of one run in the background."""

    @abstractmethod
    def end(self, tracker: NoTracker, ending: Ending) -> None:
        """Note with what a run ends; `settle` brings it to that."""

    @abstractmethod
    def settle(self, seconds: float, rewrites: bool = True) -> None:
        """Wait for the runs that have ended, give up those that hang, and write lost ones again.

        Args:
            seconds: to wait; nothing to end: none.
            rewrites: whether lost runs are written again from metrics.jsonl.
        """

    @abstractmethod
    def close(self) -> None:
        """End what the trackers shared, when the command ends."""

    @abstractmethod
    def told(self) -> list[str]:
        """Say which runs are not where they should be, and what to do."""


def columns(config: Config, setting_id: str) -> dict[str, Any]:
    """Return what runs are grouped by, as plain values at the top of a tracker's config.

    Args:
        setting_id: the same for the seeds of a setting, and for no other run.
    """
    targets = config.target_modules
    names = targets.names if isinstance(targets.names, str) else ",".join(targets.names or [])
    selected = names if targets.select == "custom" else targets.select
    head, rank = config.head.policy, config.lora.r
    return {
        "setting": f"head={head} r={rank} targets={selected} {setting_id}",
        "base": model_name(config.model),
        "dataset": config.data.name,
        "head_policy": head,
        "targets": selected,
        "rank": rank,
        "alpha": float(lora_alpha(config.lora)),
        "dropout": config.lora.lora_dropout,
        "lr": config.trainer.lr,
        "steps": config.trainer.num_steps,
    }


def last_values(entry: Record) -> dict[str, Any]:
    """Return a run's scores and costs, as a tracker shows them beside its config."""
    scores = {
        f"{split}/{name}": metric.value
        for split, metrics in entry.metrics.items()
        for name, metric in metrics.items()
        if metric.value is not None
    }
    found = {
        "status": entry.status,
        "steps_done": entry.steps_done,
        "trainable_parameters": entry.plan["trainable_parameters"],
        "train_seconds": entry.cost.train_seconds,
        "tokens_per_second": entry.cost.tokens_per_second,
        "peak_memory_bytes": entry.cost.peak_memory_bytes,
        "adapter_step": entry.adapter_step,
        "adapter_hash": entry.hashes.get("adapter"),
    }
    return scores | {name: value for name, value in found.items() if value is not None}
