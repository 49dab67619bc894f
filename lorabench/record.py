"""What a run did: the schema of record.json, provenance, reading and writing.

Imports without torch. The run folder is the truth; everything else is a view of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from lorabench.versions import installed

SCHEMA_VERSION = 1
PACKAGES = (
    "lorabench",
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "datasets",
    "safetensors",
    "gguf",
    "hydra-core",
    "omegaconf",
    "wandb",
    "numpy",
    "pyarrow",
    "pydantic",
)
Status = Literal["running", "finished", "stopped", "interrupted", "failed"]


class Metric(BaseModel):
    """One value over one split, with the version of its definition."""

    value: float | None  # None: not finite
    num_examples: int
    definition: str


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
    lr: float  # of the first of its steps; the schedule times lr_scale


class Exports(BaseModel):
    """What the run's adapter can be written as (`lorabench export`): yes, or why not."""

    adapter: str
    merged: str
    gguf: str  # a prediction: see lorabench/formats.py

    @classmethod
    def none(cls, reason: str) -> Exports:
        return cls(adapter=reason, merged=reason, gguf=reason)


class Record(BaseModel):
    """record.json."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    sweep: str
    status: Status
    error: str | None = None
    config: dict[str, Any]
    seeds: dict[str, int]
    plan: dict[str, Any]
    provenance: dict[str, Any]
    metrics: dict[str, dict[str, Metric]] = Field(default_factory=dict)  # split -> name -> value
    cost: Cost = Field(default_factory=Cost)
    hashes: dict[str, str] = Field(default_factory=dict)
    stages: list[StageStart] = Field(default_factory=list)  # what trained when, in order
    exports: Exports | None = None  # None: written before exports were recorded
    notes: list[str] = Field(default_factory=list)
    steps_done: int = 0
    process: dict[str, Any] = Field(default_factory=dict)  # pid, host: who writes this record
    started: str = ""
    ended: str | None = None

    def write(self, folder: Path) -> None:
        """Replace record.json in one step: a reader never sees half of it."""
        write_atomic(folder / "record.json", self.model_dump_json(indent=2) + "\n")


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read(folder: Path) -> Record | None:
    """The record of a run folder; None where there is none or it cannot be read.

    A record that says `running` while its process is gone is an interrupted run.
    """
    path = folder / "record.json"
    try:
        record = Record.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no file, no text, no JSON, or not this schema
        return None
    if record.status == "running" and not is_alive(record):
        record.status = "interrupted"
    return record


def is_alive(record: Record) -> bool:
    """Whether the process that writes this record still runs (another host's is taken to)."""
    pid = record.process.get("pid")
    if record.process.get("host") != socket.gethostname() or pid is None:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return process_start(pid) == record.process.get("start")


def process_start(pid: int) -> str | None:
    """When a process started, as the kernel counts: tells a reused pid from the old one.

    None where the kernel does not say, and for a process that is dead but not yet reaped.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        return None


def this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "start": process_start(pid)}


def find(folder: Path) -> Iterator[tuple[Path, Record]]:
    """Every run below a folder (a sweep, or the folder of one run), by run id."""
    paths = [folder] if (folder / "record.json").is_file() else sorted(folder.glob("*/"))
    for path in paths:
        record = read(path)
        if record is not None:
            yield path, record


# --- provenance ------------------------------------------------------------------------------


def provenance(device: str) -> dict[str, Any]:
    """Code, versions, machine and switches this process runs with.

    Args:
        device: torch device string of the run.
    """
    import torch

    cuda = device.startswith("cuda")
    return {
        "git": git_state(),
        "python": platform.python_version(),
        "packages": versions(),
        "os": platform.platform(),
        "host": socket.gethostname(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "device": device,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "driver": driver() if cuda else None,
        "threads": torch.get_num_threads(),
        "determinism": {
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED"),
            "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        },
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def versions() -> dict[str, str]:
    """The packages this process runs with."""
    return {name: version for name in PACKAGES if (version := installed(name))}


@cache
def git_state() -> dict[str, str | None]:
    """Commit of the code that runs, and a hash of what differs from it; None outside git."""
    git = ("git", "-C", str(Path(__file__).parent))
    commit = _output(*git, "rev-parse", "HEAD")
    # git answers for any repository around an installed package: ours tracks this very file.
    if commit is None or not _output(*git, "ls-files", "record.py"):
        return {"commit": None, "dirty": None}
    diff = _output(*git, "diff", "HEAD")
    dirty = hashlib.sha256(diff.encode()).hexdigest()[:16] if diff else None
    return {"commit": commit, "dirty": dirty}


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def driver() -> str | None:
    """Version of the GPU's driver."""
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0] if lines else None


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not there, fails, or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def append_line(file: Any, row: dict[str, Any]) -> None:
    """One row of metrics.jsonl, flushed: a killed run keeps every row written."""
    file.write(json.dumps(row) + "\n")
    file.flush()
