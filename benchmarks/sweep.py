"""How fast a sweep is: packs against what people do today, interleaved on one machine.

    python benchmarks/sweep.py                       12 runs on the embedded base, whole processes
    python benchmarks/sweep.py --quick               2 runs of 20 steps: a check
    python benchmarks/sweep.py --device cuda         step times of known shapes, random weights

Contenders, each with the same examples in the same order, the same initial adapters, AdamW (fused),
schedule, clipping, precision, threads, allocator settings and evaluation:
    a      Hydra's basic launcher, HF Trainer and stock PEFT; one process, a base loaded per job
    stock  the same with a hand-written loop: shows how much of (a) is the Trainer
    b      the script of (a), one process per run
    own    `lorabench train`, one process per run
    c      the best solo loop of ours: one process, one base, torch.compile where it pays
    dN     `lorabench train -m` in packs of at most N
In favour of (a), stock and (c): they write no records, keep no adapters, and leave determinism off.
Start-up counts on the embedded base. On shapes only steps are timed, in this process, and (a) is
its hand-written loop, run after run.

Results: benchmarks/results/<device>-<name>.json, rewritten after every repeat.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from agree import SAME_STEPS, agreement, all_agree, rates, ratio
from shapes import SHAPES, bench_shapes

AXES = {"head": ["exclude", "lora"], "lora.r": [16, 32, 64], "seed": [0, 1]}
QUICK = {"head": ["exclude", "lora"], "lora.r": [16], "seed": [0]}
# glibc returns pages to the system after every step otherwise, which costs all contenders alike.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}


class Processes:
    """Runs contenders as commands, timed from start to exit."""

    def __init__(self, threads: int, steps: int, axes: dict[str, list[Any]]):
        self.axes = axes
        self.common = [
            f"trainer.steps={steps}", "trainer.batch_size=8", "data.max_length=24",
            "data.metric=[nll]", "target_modules=attention", "model.dtype=float32",
            "trainer.device=cpu", f"trainer.num_threads={threads}", "tracker=none",
        ]  # fmt: skip
        count = str(threads)
        self.environment = os.environ | ALLOCATOR | {
            "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip

    def run(self, contender: str, axes: dict[str, list[Any]] | None = None) -> dict[str, Any]:
        """Seconds of the whole sweep, and what each run of it found."""
        axes = axes or self.axes
        with tempfile.TemporaryDirectory() as folder:
            place = [f"output_dir={folder}", "sweep=bench"]
            begun = time.perf_counter()
            for command in _commands(contender, axes):
                self._must_run([sys.executable, *command, *self.common, *place])
            seconds = time.perf_counter() - begun
            of_lorabench = contender == "own" or contender.startswith("d")
            found = _lorabench_runs(folder) if of_lorabench else _script_runs(folder)
        assert len(found) == len(list(itertools.product(*axes.values()))), sorted(found)
        return {"seconds": seconds, "runs": found}

    def _must_run(self, command: list[str]) -> None:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")


def _commands(contender: str, axes: dict[str, list[Any]]) -> list[list[str]]:
    """What Python is called with: one command for the sweep, or one a run."""
    grid = [f"{key}={','.join(map(str, values))}" for key, values in axes.items()]
    points = itertools.product(*axes.values())
    alone = [[f"{k}={v}" for k, v in zip(axes, point, strict=True)] for point in points]
    if contender == "own":
        return [["-m", "lorabench", "train", *point] for point in alone]
    if contender.startswith("d"):
        size = f"hydra.launcher.pack_size={contender[1:]}"
        return [["-m", "lorabench", "train", "-m", *grid, size]]
    name = {"a": "trainer", "b": "trainer", "c": "solo", "c-compiled": "solo-compiled"}
    path = str(Path(__file__).with_name("contenders.py"))
    script = [path, name.get(contender, contender), "-m", "hydra/launcher=basic"]
    place_of = "hydra.sweep.subdir={}-${{hydra.job.num}}".format
    sweeps = alone if contender == "b" else [grid]
    return [[*script, *values, place_of(i)] for i, values in enumerate(sweeps)]


def _script_runs(folder: str) -> dict[str, dict[str, Any]]:
    found = [json.loads(p.read_text()) for p in Path(folder).glob("bench/*/result.json")]
    return {one["run"]: one for one in found}


def _lorabench_runs(folder: str) -> dict[str, dict[str, Any]]:
    found = {}
    for path in Path(folder).glob("bench/*/record.json"):
        entry = json.loads(path.read_text())
        rows = map(json.loads, (path.parent / "metrics.jsonl").read_text().splitlines())
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        config = entry["config"]
        name = f"head={config['head']['policy']} lora.r={config['lora']['r']} seed={config['seed']}"
        found[name] = {
            "losses": losses[:SAME_STEPS],
            "nll": {
                split: scores["metrics"]["nll"]["value"]
                for split, scores in entry["evaluations"][-1]["splits"].items()
            },
            "tokens": entry["cost"]["train_tokens"],
            "pack": entry["plan"]["pack"]["size"],
        }
    return found


def compile_pays(processes: Processes, steps: int) -> dict[str, Any]:
    """Try torch.compile on one run, and reckon what it would save and cost over the sweep."""
    axes = processes.axes
    one = {key: values[-1:] for key, values in axes.items()}
    try:
        eager, compiled = processes.run("c", one), processes.run("c-compiled", one)
    except SystemExit as error:
        return {"used": False, "why": str(error).strip().splitlines()[-1][:200]}
    (x,), (y,) = eager["runs"].values(), compiled["runs"].values()
    saved = steps * (x["step_seconds"] - y["step_seconds"])
    each = compiled["seconds"] - eager["seconds"] + saved
    total = len(list(itertools.product(*axes.values()))) * saved - len(axes["lora.r"]) * each
    return {
        "used": total > 0,
        "eager_step_seconds": x["step_seconds"],
        "compiled_step_seconds": y["step_seconds"],
        "compile_seconds_a_rank": each,
        "saves_seconds_over_the_sweep": total,
    }


def bench_sweep(options: argparse.Namespace, result: dict[str, Any], save: Callable) -> None:
    """Interleave the contenders on the embedded base."""
    from lorabench import model as base_model
    from lorabench.config import ModelConfig

    steps = 20 if options.quick else 200
    processes = Processes(options.threads, steps, QUICK if options.quick else AXES)
    base = base_model.load(ModelConfig(path="lorabench:tiny-gemma"), "cpu")
    parameters = base_model.num_parameters(base)
    result["steps"], result["runs"] = steps, processes.axes
    compiled = {"used": False, "why": "not tried"}
    result["compile"] = compile_pays(processes, steps) if options.compile else compiled
    names = ["a", "stock", "b", "own", "c", *(f"d{n}" for n in options.packs)]
    table: dict[str, Any] = {name: {"seconds": []} for name in names}
    result["contenders"] = table
    result["load_average"] = []
    exact = processes.run("exact")["runs"]
    for _ in range(options.repeats):
        result["load_average"].append(os.getloadavg()[0])
        for name in names:
            actual = "c-compiled" if name == "c" and result["compile"]["used"] else name
            found = processes.run(actual)
            runs, row = found["runs"], table[name]
            row["seconds"].append(found["seconds"])
            row["mean_test_nll"] = statistics.fmean(r["nll"]["test"] for r in runs.values())
            losses = {run: one["losses"] for run, one in runs.items()}
            if name == "a":
                reference = losses
                doubles = {run: one["losses"] for run, one in exact.items()}
                result["rounding_of_a"] = agreement(doubles, losses, "float32")[
                    "largest_difference"
                ]
            row["losses_as_a"] = agreement(reference, losses, "float32")
            if "pack" in next(iter(runs.values())):
                row["pack_sizes"] = sorted({one["pack"] for one in runs.values()})
                result["tokens"] = sum(one["tokens"] for one in runs.values())
            print(f"{name}: {found['seconds']:.1f} s", file=sys.stderr, flush=True)
        for row in table.values():
            row["median_seconds"] = statistics.median(row["seconds"])
            for other in ("a", "b"):
                row[f"ratio_to_{other}"] = ratio(table[other]["seconds"], row["seconds"])
            rates(row, result["tokens"], row["median_seconds"], parameters, result)
        save()


def peak_matmul(device: str) -> float:
    """FLOPs a second of a large matrix product in the precision trained in: best of several."""
    import torch

    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        begun = time.perf_counter()
        float((x @ y)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def show(result: dict[str, Any]) -> None:
    """The result as tables."""
    from rich.console import Console
    from rich.table import Table

    def row(name: str, one: dict[str, Any], seconds: float) -> list[str]:
        same = one["losses_as_a"]
        return [
            name, f"{seconds:.4g}", *(f"{one[k]:.2f}" if k in one else "-" for k in keys),
            f"{one['tokens_per_second']:,.0f}", f"{one['share_of_peak']:.1%}",
            f"{'yes' if same['agree'] else 'NO'} ({same['largest_difference']:.1e})",
        ]  # fmt: skip

    sweep = "contenders" in result
    keys = ["ratio_to_a", "ratio_to_b" if sweep else "ratio_to_c"]
    heads = ["", "seconds", "x (a)", "x (b)" if sweep else "x (c)", "tokens/s", "of peak"]
    groups = {"the sweep, whole processes": result.get("contenders", {})}
    groups |= {name: case.get("packs", {}) for name, case in result.get("cases", {}).items()}
    for title, rows in groups.items():
        if not rows:
            continue
        table = Table(*heads, "first losses as (a)", title=title)
        for name, one in rows.items():
            table.add_row(*row(name, one, one.get("median_seconds") or one["step_seconds"]))
        Console(width=100).print(table)
        for name, why in result.get("cases", {}).get(title, {}).get("left_out", {}).items():
            print(f"{name}: {why}")
    if "rounding_of_a" in result:
        print(f"(a) itself is up to {result['rounding_of_a']:.1e} of a loss off its float64 run")
    print(f"torch.compile: {result.get('compile', 'in (c) where it was faster, see tuned')}")


def main(arguments: list[str]) -> int:
    """Returns 1 where a contender's first losses are not those of (a)."""
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", default=None, help=f"out of {','.join(SHAPES)}")
    parser.add_argument("--tokens", default="1024,4096,16384", type=numbers, help="a run and step")
    parser.add_argument("--packs", default="2,4,8,16", type=numbers, help="pack sizes")
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--threads", default=os.cpu_count(), type=int)
    parser.add_argument("--budget", default=450, type=float, help="seconds for shapes")
    parser.add_argument("--compile", default=True, action=argparse.BooleanOptionalAction)
    parser.add_argument("--quick", action="store_true", help="2 runs of 20 steps")
    parser.add_argument("--out", default=Path(__file__).parent / "results", type=Path)
    options = parser.parse_args(arguments)
    if options.shapes is None and options.device == "cuda":
        options.shapes = "qwen3-0.6b,gemma-2b"
    options.shapes = options.shapes.split(",") if options.shapes else []
    options.deadline = time.perf_counter() + options.budget
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

    import torch

    from lorabench import provenance, record
    from lorabench.files import write_atomic

    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/sweep.py", *arguments]),
        "machine": provenance.of_process(options.device),
        "started": record.now(),
        "threads": options.threads,
        "allocator": os.environ["PYTORCH_ALLOC_CONF"] if options.shapes else ALLOCATOR,
        "peak_matmul_flops_per_second": peak_matmul(options.device),
    }
    kind = "shapes" if options.shapes else "quick" if options.quick else "sweep"
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.device}-{kind}.json"

    def save() -> None:
        write_atomic(path, json.dumps(result, indent=1) + "\n")

    (bench_shapes if options.shapes else bench_sweep)(options, result, save)
    show(result)
    print(path)
    return 0 if all_agree(result) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
