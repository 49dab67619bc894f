"""What a run did: the schema of record.json, reading and writing.

Imports without torch. The run folder is the truth; everything else is a view of it.
docs/record-format.md describes every field.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from lorabench import checkpoint, lease, masking
from lorabench.files import write_atomic

SCHEMA_VERSION = 2
# Raised whenever the same config would give other results; part of every run id.
ARITHMETIC_VERSION = 4
# `planned` is never written: it is a run of sweep.json without a record.
Status = Literal["planned", "running", "trained", "finished", "stopped", "interrupted", "failed"]


class Metric(BaseModel):
    """One value over one split, with the version of its definition."""

    value: float | None  # None: not finite
    num_examples: int
    definition: str


class Scores(BaseModel):
    """What an evaluation found on one split."""

    examples: str  # hash of what decides the split's examples
    tokens: str  # hash of the token ids that were scored
    metrics: dict[str, Metric]
    sources: dict[str, dict[str, Metric]] = Field(default_factory=dict)  # of a mixture, by source


class Evaluation(BaseModel):
    """Scores of the run's adapter, with the settings and definitions that made them."""

    id: str  # first 12 hex digits of sha256 over settings, examples and definitions
    settings: dict[str, Any]
    splits: dict[str, Scores]
    predictions: str  # file in the run's folder
    predictions_sha256: str
    batch_size: int  # examples; smaller than asked for where memory was short
    generation: dict[str, Any] | None = None  # of metrics that generate
    seconds: float = 0.0  # of the pack
    stack: dict[str, Any] = Field(default_factory=dict)  # versions, device and threads
    ended: str = ""


class Cost(BaseModel):
    """What the run took. In a pack, seconds and memory are the pack's; share is 1 / pack size.

    A resumed run's seconds and tokens are those up to its checkpoint and those of the last command.
    """

    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    total_seconds: float = 0.0
    train_tokens: int = 0  # non-pad tokens of prompt and completion
    tokens_per_second: float = 0.0  # of this run, non-pad, while training
    peak_memory_bytes: int = 0  # device memory on a GPU, resident set on a CPU
    share: float = 1.0


class StageStart(BaseModel):
    """Modules that train from a step on at one learning rate; what has no entry there is frozen."""

    step: int  # steps done before
    modules: list[str]
    lr_scale: float
    lr: float  # of the first of its steps, re-warm-up aside: the schedule times lr_scale
    rewarm_steps: int = 0  # steps in which the rate rises from zero


class Best(BaseModel):
    """The best value on validation while a run trained, of a run that looks for it."""

    step: int  # steps done when it was scored
    metric: str  # the objective: validation/METRIC
    value: float


class Exports(BaseModel):
    """What the run's adapter can be written as (`lorabench export`): yes, or why not."""

    adapter: str
    merged: str
    gguf: str  # a prediction: see lorabench/formats.py

    @classmethod
    def none(cls, reason: str) -> Exports:
        return cls(adapter=reason, merged=reason, gguf=reason)


class RecordedFile(BaseModel):
    """A file of the run's folder, as it was when it was recorded."""

    size: int  # bytes
    mtime_ns: int
    sha256: str


class Record(BaseModel):
    """record.json."""

    schema_version: int = SCHEMA_VERSION
    arithmetic_version: int = ARITHMETIC_VERSION
    run_id: str
    sweep: str
    status: Status
    error: str | None = None
    config: dict[str, Any]
    seeds: dict[str, int]
    plan: dict[str, Any]
    # Of each other run of the pack, by id: the keys of its config that differ from this run's.
    mates: dict[str, dict[str, Any]] = Field(default_factory=dict)
    provenance: dict[str, Any]
    evaluations: list[Evaluation] = Field(default_factory=list)  # the newest comes last
    cost: Cost = Field(default_factory=Cost)
    hashes: dict[str, str] = Field(default_factory=dict)
    files: dict[str, RecordedFile] = Field(default_factory=dict)  # by name below the run's folder
    stages: list[StageStart] = Field(default_factory=list)  # what trained when, in order
    exports: Exports | None = None  # None: written before exports were recorded
    notes: list[str] = Field(default_factory=list)
    steps_done: int = 0
    best: Best | None = None  # None: nothing looked for it, or no value was finite
    adapter_step: int | None = None  # steps done when the saved adapter was as it is
    stopped_early: str | None = None  # why the run stopped before its last step (trainer.patience)
    started: str = ""
    ended: str | None = None

    @property
    def metrics(self) -> dict[str, dict[str, Metric]]:
        """Values of the newest evaluation: split -> name -> value."""
        if not self.evaluations:
            return {}
        return {split: found.metrics for split, found in self.evaluations[-1].splits.items()}

    def has_trained(self) -> bool:
        """Whether an adapter was saved that no later command trains again."""
        return self.status in ("trained", "finished", "stopped")

    def evaluation(self, id: str) -> Evaluation | None:
        """The evaluation of that id, if there is one."""
        return next((one for one in self.evaluations if one.id == id), None)

    def write(self, folder: Path) -> None:
        """Replace record.json in one step: a reader never sees half of it."""
        content = masking.mask(self.model_dump(mode="json"))
        content["checksum"] = checksum(content)
        write_atomic(folder / "record.json", json.dumps(content, indent=2) + "\n")


def checksum(content: dict[str, Any]) -> str:
    """A hash over everything in record.json but the checksum itself."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read(folder: Path) -> Record | None:
    """Return the record of a run folder; None if there is none or it is not what was written.

    A record that says `running` while nobody holds its pack is an interrupted run. Records of
    earlier schema versions are brought to this one; those of later ones are not read.
    """
    path = folder / "record.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("schema_version", 1) > SCHEMA_VERSION:
            return None
        if "checksum" in content and content["checksum"] != checksum(content):
            return None  # not what was written; older ones have none
        record = Record.model_validate(_upgraded(content))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # no file, no text, no JSON, or not this schema
    if record.status == "running" and not is_held(folder, record):
        record.status = "interrupted"
        record.steps_done = max([0, *checkpoint.steps(folder / "checkpoint")])
    return record


def is_newer(folder: Path) -> bool:
    """Whether a run folder holds a record that only a newer lorabench can read."""
    try:
        content = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        return int(content.get("schema_version", 1)) > SCHEMA_VERSION
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def is_held(folder: Path, record: Record) -> bool:
    """Whether a process has the pack of a run."""
    pack = (record.plan.get("pack") or {}).get("id")
    return bool(pack) and lease.holder_of(folder.parent / ".locks" / f"{pack}.json") is not None


def _upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """A record of an earlier schema version as one of this version."""
    if content.get("schema_version", 1) >= 2 or "evaluations" in content:
        return content
    content = {
        key: value for key, value in content.items() if key not in ("metrics", "process")
    } | {
        "arithmetic_version": 1,
        "evaluations": [_first_evaluation(content)] if content.get("metrics") else [],
    }
    hashes = dict(content.get("hashes", {}))
    if "data" in hashes:
        hashes["train"] = hashes.pop("data")
    return content | {"hashes": hashes}


def _first_evaluation(content: dict[str, Any]) -> dict[str, Any]:
    """The only evaluation of a record of schema version 1."""
    data, trainer = content["config"].get("data", {}), content["config"].get("trainer", {})
    examples = content.get("hashes", {}).get("data", "")
    return {
        "id": "version-1",
        "settings": {"metric": data.get("metric"), "eval_examples": trainer.get("eval_examples")},
        "splits": {
            split: {"examples": examples, "tokens": "", "metrics": metrics}
            for split, metrics in content["metrics"].items()
        },
        "predictions": "predictions.parquet",
        "predictions_sha256": "",
        "batch_size": trainer.get("eval_batch_size", 0),
        "seconds": content.get("cost", {}).get("evaluate_seconds", 0.0),
        "ended": content.get("ended") or "",
    }


def find(folder: Path) -> Iterator[tuple[Path, Record]]:
    """Every run below a folder (a sweep, or the folder of one run), by run id."""
    paths = [folder] if (folder / "record.json").is_file() else sorted(folder.glob("*/"))
    for path in paths:
        record = read(path)
        if record is not None:
            yield path, record


def append_line(file: Any, row: dict[str, Any]) -> None:
    """One row of metrics.jsonl, flushed: a killed run keeps every row written."""
    file.write(json.dumps(row) + "\n")
    file.flush()
