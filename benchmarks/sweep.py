"""How fast a sweep is: packs against what people do today, interleaved on one machine.

    python benchmarks/sweep.py                       12 runs on the embedded base, whole processes
    python benchmarks/sweep.py --lengths             12 runs on examples of very different lengths
    python benchmarks/sweep.py --quick [--lengths]   2 runs of a few steps: a check
    python benchmarks/sweep.py --contenders a,d12    these contenders alone
    python benchmarks/sweep.py --device cuda         step times of known shapes, random weights

Contenders, each with the same initial adapters, AdamW (fused), schedule, clipping, precision,
threads, allocator settings and evaluation, and, unless grouped, the same examples in the same
order:
    a           Hydra's basic launcher, HF Trainer and stock PEFT; one process, a base loaded per
                job; each batch is padded to its longest example
    a-grouped   (a) with train_sampling_strategy="group_by_length": batches of similar lengths, in
                evaluation too, where (a) takes the examples as they come
    stock       (a) with a hand-written loop: shows how much of (a) is the Trainer
    b           the script of (a), one process per run
    own         `lorabench train`, one process per run
    c           the best solo loop of ours: one process, one base, torch.compile where it pays
    dN          `lorabench train -m` in packs of at most N
    dN-grouped  the same with data.group_by_length=true
In favour of (a), stock and (c): they write no records, keep no adapters, and leave determinism off.

Kinds of sweep:
    the dense one   200 steps on the embedded base; its examples are single words: a padded
                    batch is four fifths real tokens.
                    By default all contenders that are not grouped
    --lengths       40 steps on a Llama of 4 layers with random weights and examples whose lengths
                    are those of an instruction set, 8 to 512 tokens (lengths.py). By default a,
                    a-grouped, stock, d12 and d12-grouped
    --shapes        only steps are timed, in this process, and (a) is its hand-written loop, run
                    after run. With --lengths on examples of different lengths, one for every 128
                    --tokens; (a) pads each batch to its longest

Columns of the sweeps:
    seconds         whole processes, start-up included: the median of the interleaved rounds
    x (a), ...      times faster than that contender, per real token of the training: grouped
                    batches hold other examples, in 40 steps about a fifth more tokens, because the
                    longest come first. Start-up and evaluation are then spread over more tokens
    tokens/s        real (non-pad) tokens of the training by seconds of the whole processes
    real            share of the computed tokens of the training that are real: of lorabench from
                    the plan in its records, 100% where examples lie end to end; of the others from
                    the batches they train on. Evaluation, and attention within rows, do not count
    of peak         4 FLOPs per parameter and real token, as a share of what a large matrix
                    product reaches on this machine
    start-up, training, evaluation
                    the parts of the seconds, each its own median. Training is measured around the
                    loop and evaluation around the scoring, in every job; start-up is the rest
    first losses as (a)
                    whether they agree within rounding, and the largest difference; "other
                    batches" where contenders group, which are not compared
Below the table: the seconds that the frozen base's matrix products alone would take at the
measured peak for the real tokens of the training, each through every linear layer and back to its
inputs.

Results: benchmarks/results/<device>-<sweep, lengths, shapes or shapes-lengths>.json, with --quick
cpu-quick.json or cpu-quick-lengths.json; rewritten after every repeat.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import lengths
from agree import SAME_STEPS, agreement, all_agree, matmul_bound, rates, ratio
from shapes import SHAPES, bench_shapes
from written import begun, options_of, write

AXES: dict[str, list[Any]] = {"head": ["exclude", "lora"], "lora.r": [16, 32, 64], "seed": [0, 1]}
QUICK: dict[str, list[Any]] = {"head": ["exclude", "lora"], "lora.r": [16], "seed": [0]}
DENSE = ("data.max_length=24",)  # the embedded data
PARTS = ("train_seconds", "evaluate_seconds")  # of the whole; start-up is the rest
# glibc returns pages to the system after every step otherwise, which costs all contenders alike.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}


class Processes:
    """Runs contenders as commands, timed from start to exit.

    Args:
        data: Overrides that choose the data, and the base.
    """

    def __init__(
        self, threads: int, steps: int, axes: dict[str, list[Any]], data: Sequence[str] = DENSE
    ):
        self.axes = axes
        self.common = [
            *data, f"trainer.steps={steps}", "trainer.batch_size=8",
            "data.metric=[nll]", "target_modules=attention", "model.dtype=float32",
            "trainer.device=cpu", f"trainer.num_threads={threads}", "tracker=none",
            "trainer.eval_base=false",  # the others score what they trained, and no more
        ]  # fmt: skip
        count = str(threads)
        self.environment = os.environ | ALLOCATOR | {
            "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONDONTWRITEBYTECODE": "",  # or every process compiles lorabench: 0.7 s
        }  # fmt: skip

    def run(self, contender: str, axes: dict[str, list[Any]] | None = None) -> dict[str, Any]:
        """Return the seconds of the whole sweep and of its parts, and what each run found."""
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
        parts = {part: sum(one.get(part, 0.0) for one in found.values()) for part in PARTS}
        return {"seconds": seconds, "runs": found, **parts}

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
        size, grouped, _ = contender[1:].partition("-grouped")
        own = [f"hydra.launcher.pack_size={size}"]
        own += ["data.group_by_length=true"] if grouped else []
        return [["-m", "lorabench", "train", "-m", *grid, *own]]
    name = {
        "a": "trainer", "a-grouped": "grouped", "b": "trainer", "c": "solo",
        "c-compiled": "solo-compiled",
    }  # fmt: skip
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
        config, cost, planned = entry["config"], entry["cost"], entry["plan"]["lengths"]
        # Where the loaded base alone showed that it must pad, `rows` counts no padding.
        computed = planned["padded_rows" if entry["plan"]["padded"] else "rows"]
        name = f"head={config['head']['policy']} lora.r={config['lora']['r']} seed={config['seed']}"
        found[name] = {
            "losses": losses[:SAME_STEPS],
            "nll": {
                split: scores["metrics"]["nll"]["value"]
                for split, scores in entry["evaluations"][-1]["splits"].items()
            },
            "tokens": cost["train_tokens"],
            "computed_tokens": computed,
            "pack": entry["plan"]["pack"]["size"],
            # The seconds of its pack, of which each run of it takes an equal share.
            **{part: cost[part] * cost["share"] for part in PARTS},
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
    """Interleave the contenders on the embedded base, or with --lengths on that of lengths.py."""
    with contextlib.ExitStack() as stack:
        path, overrides = "lorabench:tiny-gemma", DENSE
        steps = 20 if options.quick else 200
        if options.lengths:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            overrides = (*lengths.write(Path(folder)), f"data.max_length={lengths.CAP}")
            path, steps = f"{folder}/base", 4 if options.quick else 40
        axes = QUICK if options.quick else AXES
        processes = Processes(options.threads, steps, axes, overrides)
        result["steps"], result["runs"] = steps, axes
        interleave(processes, parameters_of(path), options, result, save)


def parameters_of(path: str) -> dict[str, int]:
    """Return the number of all parameters of a base, and of those in its linear layers."""
    import torch

    from lorabench import model as base_model
    from lorabench.config import ModelConfig

    base = base_model.load(ModelConfig(path=path), "cpu")
    linear = [module for module in base.modules() if isinstance(module, torch.nn.Linear)]
    return {
        "all": base_model.num_parameters(base),
        "linear": sum(module.weight.numel() for module in linear),
    }


def interleave(
    processes: Processes,
    parameters: dict[str, int],
    options: argparse.Namespace,
    result: dict[str, Any],
    save: Callable,
) -> None:
    """Run the contenders one after the other, round by round, and compare them after each."""
    names = options.contenders
    table: dict[str, Any] = {name: {"seconds": []} | {part: [] for part in PARTS} for name in names}
    result["compile"] = {"used": False, "why": "not tried"}
    if options.compile and "c" in names:
        result["compile"] = compile_pays(processes, result["steps"])
    result["contenders"] = table
    result["load_average"] = []
    exact = losses_of(processes.run("exact")["runs"]) if "a" in names else {}
    for _ in range(options.repeats):
        result["load_average"].append(os.getloadavg()[0])
        losses = {}
        for name in names:
            actual = "c-compiled" if name == "c" and result["compile"]["used"] else name
            found = processes.run(actual)
            add(table[name], found)
            losses[name] = losses_of(found["runs"])
            print(f"{name}: {found['seconds']:.1f} s", file=sys.stderr, flush=True)
        for name, row in table.items():
            row["other_batches"] = is_grouped(name)
            row["losses_as_a"] = None  # nothing to compare
            if "a" in names and not is_grouped(name):
                row["losses_as_a"] = agreement(losses["a"], losses[name], "float32")
        if "a" in names:
            apart = agreement(exact, losses["a"], "float32")
            result["rounding_of_a"] = apart["largest_difference"]
        reckon(result, parameters)
        save()


def is_grouped(name: str) -> bool:
    """Return whether a contender groups by length, and so sees other batches than (a)."""
    return name.endswith("-grouped")


def losses_of(runs: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Return the first losses of each run."""
    return {run: one["losses"] for run, one in runs.items()}


def add(row: dict[str, Any], found: dict[str, Any]) -> None:
    """Add a repeat to a contender's row: seconds, tokens and scores."""
    runs = found["runs"].values()
    for key in ("seconds", *PARTS):
        row[key].append(found[key])
    row["mean_test_nll"] = statistics.fmean(one["nll"]["test"] for one in runs)
    row["tokens"] = sum(one["tokens"] for one in runs)
    row["real_share"] = row["tokens"] / sum(one["computed_tokens"] for one in runs)
    packs = {one["pack"] for one in runs if "pack" in one}
    if packs:
        row["pack_sizes"] = sorted(packs)


def reckon(result: dict[str, Any], parameters: dict[str, int]) -> None:
    """Put medians, ratios, rates and the bound of the matrix products into a result."""
    table = result["contenders"]
    for row in table.values():
        row["median_seconds"] = statistics.median(row["seconds"])
        for part in PARTS:
            row[f"median_{part}"] = statistics.median(row[part])
        whole = zip(row["seconds"], *(row[part] for part in PARTS), strict=True)
        row["median_start_seconds"] = statistics.median(x - sum(parts) for x, *parts in whole)
        for other in {"a", "a-grouped", "b"} & table.keys():
            theirs = table[other]
            row[f"ratio_to_{other}"] = ratio(
                theirs["seconds"], row["seconds"], theirs["tokens"], row["tokens"]
            )
        rates(row, row["tokens"], row["median_seconds"], parameters["all"], result)
    # Contenders that are not grouped see the same tokens.
    same = [row["tokens"] for name, row in table.items() if not is_grouped(name)]
    assert len(set(same)) <= 1, f"contenders trained on different numbers of tokens: {same}"
    result["tokens"] = [*same, *(row["tokens"] for row in table.values())][0]
    result["linear_parameters"] = parameters["linear"]
    peak = result["peak_matmul_flops_per_second"]
    result["matmul_bound_seconds"] = matmul_bound(parameters["linear"], result["tokens"], peak)


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


def _number(key: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: format(row[key], form) if key in row else "-"


def _seconds(row: dict[str, Any]) -> str:
    return f"{row.get('median_seconds') or row['step_seconds']:.4g}"


def _same(row: dict[str, Any]) -> str:
    """Whether the first losses are those of (a), as a cell."""
    same = row["losses_as_a"]
    if same is None:
        return "other batches" if row["other_batches"] else "-"
    return f"{'yes' if same['agree'] else 'NO'} ({same['largest_difference']:.1e})"


# Head, key that a row must have for it, and the cell.
COLUMNS: list[tuple[str, str, Callable[[dict[str, Any]], str]]] = [
    ("seconds", "", _seconds),
    ("x (a)", "ratio_to_a", _number("ratio_to_a", ".2f")),
    ("x (a-grouped)", "ratio_to_a-grouped", _number("ratio_to_a-grouped", ".2f")),
    ("x (b)", "ratio_to_b", _number("ratio_to_b", ".2f")),
    ("x (c)", "ratio_to_c", _number("ratio_to_c", ".2f")),
    ("tokens/s", "", _number("tokens_per_second", ",.0f")),
    ("real", "real_share", _number("real_share", ".1%")),
    ("of peak", "", _number("share_of_peak", ".1%")),
    ("start-up", "median_start_seconds", _number("median_start_seconds", ".1f")),
    ("training", "median_train_seconds", _number("median_train_seconds", ".1f")),
    ("evaluation", "median_evaluate_seconds", _number("median_evaluate_seconds", ".1f")),
    ("first losses as (a)", "", _same),
]


def show(result: dict[str, Any]) -> None:
    """Print the result as tables."""
    from rich.console import Console
    from rich.table import Table

    contenders = result.get("contenders", {})
    groups = {"the sweep, whole processes": contenders}
    groups |= {name: case.get("packs", {}) for name, case in result.get("cases", {}).items()}
    for title, rows in groups.items():
        if not rows:
            continue
        columns = [
            (head, cell)
            for head, key, cell in COLUMNS
            if not key or any(key in row for row in rows.values())
        ]
        table = Table("", *(head for head, _ in columns), title=title)
        for name, row in rows.items():
            table.add_row(name, *(cell(row) for _, cell in columns))
        Console(width=130).print(table)
        for name, why in result.get("cases", {}).get(title, {}).get("left_out", {}).items():
            print(f"{name}: {why}")
    if "matmul_bound_seconds" in result:
        print(
            f"the frozen base's matrix products alone: {result['matmul_bound_seconds']:.1f} s at "
            f"the measured peak of {result['peak_matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s "
            f"(4 x {result['linear_parameters']:,} parameters in linear layers x "
            f"{result['tokens']:,} real tokens of the training)"
        )
    if contenders and "a" not in contenders:
        print("(a) is not among the contenders: no ratios to it, and no losses are compared")
    if "rounding_of_a" in result:
        print(f"(a) itself is up to {result['rounding_of_a']:.1e} of a loss off its float64 run")
    print(f"torch.compile: {result.get('compile', 'in (c) where it was faster, see tuned')}")


CONTENDER = re.compile(r"a|a-grouped|stock|b|own|c|d[1-9]\d*(-grouped)?")


def contender_names(text: str) -> list[str]:
    """Return the contenders of a comma-separated list, each once."""
    names = list(dict.fromkeys(text.split(",")))
    wrong = [name for name in names if not CONTENDER.fullmatch(name)]
    if wrong:
        raise argparse.ArgumentTypeError(
            "must be out of a, a-grouped, stock, b, own, c, dN and dN-grouped, N the size of a "
            f"pack; got '{','.join(wrong)}'"
        )
    return names


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options of a command line."""
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options_of(parser)
    parser.add_argument("--lengths", action="store_true", help="examples of different lengths")
    parser.add_argument("--contenders", type=contender_names, help="these alone: a,stock,d12,...")
    parser.add_argument("--shapes", default=None, help=f"out of {','.join(SHAPES)}")
    parser.add_argument("--tokens", default="1024,4096,16384", type=numbers, help="a run and step")
    parser.add_argument("--packs", default="2,4,8,16", type=numbers, help="pack sizes by default")
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--budget", default=450, type=float, help="seconds for shapes")
    parser.add_argument("--compile", default=True, action=argparse.BooleanOptionalAction)
    parser.add_argument("--quick", action="store_true", help="2 runs of a few steps")
    options = parser.parse_args(arguments)
    if options.contenders and (options.shapes or options.device == "cuda"):
        parser.error("--contenders are of the sweeps on the CPU, not of shapes")
    if options.shapes is None and options.device == "cuda":
        options.shapes = "qwen3-0.6b,gemma-2b"
    options.shapes = options.shapes.split(",") if options.shapes else []
    if options.contenders is None and options.lengths and not options.shapes:
        options.contenders = ["a", "a-grouped", "stock", "d12", "d12-grouped"]
    elif options.contenders is None:
        options.contenders = ["a", "stock", "b", "own", "c", *(f"d{n}" for n in options.packs)]
    return options


def main(arguments: list[str]) -> int:
    """Run the benchmark; return 1 where first losses that are compared are not those of (a)."""
    options = parse(arguments)
    options.deadline = time.perf_counter() + options.budget
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

    result = begun("sweep", arguments, options) | {
        "allocator": os.environ["PYTORCH_ALLOC_CONF"] if options.shapes else ALLOCATOR,
        "peak_matmul_flops_per_second": peak_matmul(options.device),
    }
    kind = "quick" if options.quick else "sweep"
    if options.lengths:
        kind = "quick-lengths" if options.quick else "lengths"
    if options.shapes:
        kind = "shapes-lengths" if options.lengths else "shapes"
    def save() -> Path:
        return write(result, kind, options)

    (bench_shapes if options.shapes else bench_sweep)(options, result, save)
    show(result)
    print(save())
    return 0 if all_agree(result) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
