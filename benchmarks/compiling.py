"""What `trainer.compile=always` costs and saves: seconds to compile, and of a step.

    python benchmarks/compiling.py                  narrow shapes on a CPU
    python benchmarks/compiling.py --device cuda    whole shapes

Packs of runs that share a batch and a rank, and of ranks 16, 32, 64 on two batches (step.py); all
linear layers; every example of one length. Steps with and without are interleaved, five of each.

The table in lorabench/sweep/compiling.py has, of a device and each kind of pack, the seconds to
compile by calls of operators in the graph (the largest of the rows here), and the share of a step
that is saved (the smallest, and 0 where none is).

Results: benchmarks/results/<device>-compiling.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import step as steps_of
import torch
from shapes import random_tokens
from written import begun, options_of, write


def measured(shape: str, kind: str, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to compile a pack, and of its steps with and without."""
    from lorabench import adapters
    from lorabench.pack import StackedPack
    from lorabench.train import train

    layers = steps_of.LAYERS[1] if options.device == "cpu" else None
    base, config = steps_of.base_of(shape, layers, options)
    skeleton = steps_of.plan_of[shape, layers]
    configs = steps_of.runs_of(config, kind, count)
    modules = [adapters.resolve_modules(skeleton, one) for one in configs]
    tokens = random_tokens(config, base.config.vocab_size, alike=True)

    def pack(compiled: bool) -> Any:
        made = StackedPack(base, skeleton, configs, modules, options.device, compiled=compiled)
        return train(made, tokens, 0)

    def timed(steps: Any, count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            next(steps)
        if options.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) / count

    torch._dynamo.reset()
    torch._inductor.config.force_disable_caches = True
    torch._dynamo.utils.counters.clear()
    plain, compiled = pack(False), pack(True)
    timed(plain, 2)
    first = timed(compiled, 1)
    timed(compiled, 2)
    seconds: dict[str, list[float]] = {"plain": [], "compiled": []}
    for _ in range(options.repeats):
        seconds["plain"].append(timed(plain, 5))
        seconds["compiled"].append(timed(compiled, 5))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    calls = torch._dynamo.utils.counters["stats"]["calls_captured"]
    compile_seconds = first - medians["compiled"]
    return {
        "step_seconds": seconds, "compile_seconds": compile_seconds, "calls": calls,
        "modules": len({name for own in modules for name in own}),
        "seconds_a_call": compile_seconds / calls,
        "saved": 1 - medians["compiled"] / medians["plain"],
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options_of(parser)
    parser.add_argument("--shapes", default="qwen3-0.6b,gemma-2b", type=lambda t: t.split(","))
    parser.add_argument("--runs", default=12, type=int)
    parser.add_argument("--tokens", default=1024, type=int, help="of a run and step")
    parser.add_argument("--repeats", default=3, type=int)
    options = parser.parse_args(arguments)
    options.lengths = False  # a compiled pack has batches of one shape

    result = begun("compiling", arguments, options)
    rows = result["rows"] = {
        f"{shape} {kind} {options.runs}": measured(shape, kind, options.runs, options)
        for shape in options.shapes
        for kind in ("alike", "mixed")
    }
    for name, row in rows.items():
        print(
            f"{name}: {row['compile_seconds']:.0f} s to compile {row['calls']} calls of "
            f"{row['modules']} modules ({row['seconds_a_call']:.3f} s each), {row['saved']:.0%} of "
            f"a step saved"
        )
    print(write(result, "compiling", options))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
