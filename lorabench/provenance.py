"""What a run came from: code, versions, machine and switches. Imports without torch."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from lorabench.versions import installed

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
# Those whose other version may give other bits, where they are installed.
MOVING = (
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "gguf",
    "numpy",
    "flash-attn",
    "kernels",
)


def of_process(device: str) -> dict[str, Any]:
    """Code, versions, machine and switches this process runs with.

    Args:
        device: torch device string of the run.
    """
    import torch

    cuda = device.startswith("cuda")
    return {
        "git": git_state(),
        "commits": [git_state()],
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
    }


def versions() -> dict[str, str]:
    """The packages this process runs with."""
    names = dict.fromkeys([*PACKAGES, *MOVING])
    return {name: version for name in names if (version := installed(name))}


def moving(packages: dict[str, str]) -> dict[str, str]:
    """Those packages of which another version may give other bits."""
    return {name: packages[name] for name in MOVING if name in packages}


@cache
def git_state() -> dict[str, str | None]:
    """Commit of the code that runs, and a hash of what differs from it; None outside git."""
    git = ("git", "-C", str(Path(__file__).parent))
    commit = _output(*git, "rev-parse", "HEAD")
    # git answers for any repository around an installed package: ours tracks this very file.
    if commit is None or not _output(*git, "ls-files", Path(__file__).name):
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


def stack(origin: dict[str, Any]) -> dict[str, Any]:
    """What of the provenance can move bits: rows that differ here come from different stacks."""
    return moving(origin.get("packages", {})) | {
        key: origin.get(key) for key in ("device", "gpu", "cpu", "threads")
    }
