"""Options and result files that the benchmarks share."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def options_of(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark of a device has."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", default=os.cpu_count(), type=int)
    parser.add_argument("--out", default=RESULTS, type=Path, help="folder of the result")


def begun(script: str, arguments: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Return what a result says of its making: the command, the machine, when, and the threads."""
    import torch

    from lorabench import provenance, record

    torch.set_num_threads(options.threads)
    return {
        "command": " ".join([f"python benchmarks/{script}.py", *without_out(arguments)]),
        "machine": provenance.of_process(options.device),
        "started": record.now(),
        "threads": options.threads,
    }


def without_out(arguments: list[str]) -> list[str]:
    """A command line without the folder of its result, which is of one machine."""
    where = [i for i, word in enumerate(arguments) if word == "--out"]
    return [word for i, word in enumerate(arguments) if i not in where and i - 1 not in where]


def write(result: dict[str, Any], kind: str, options: argparse.Namespace) -> Path:
    """Write a result, in one step, and return where it lies."""
    from lorabench.files import write_atomic

    options.out.mkdir(parents=True, exist_ok=True)
    path: Path = options.out / f"{options.device}-{kind}.json"
    write_atomic(path, json.dumps(result, indent=1) + "\n")
    return path
