"""How long the plan says that a step of a pack takes, and how long it takes.

    python benchmarks/times.py [--device cuda]

Packs of 1, 4 and 12 runs of `experiment=lm_head` on the embedded base, and on examples of very
different lengths (lengths.py). Measured: the median of 20 steps, by the clock, on a machine that
does nothing else. Results: benchmarks/results/<device>-times.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import lengths
from written import begun, options_of, write

STEPS = 23  # the first three warm up
GRID = ("head=exclude,lora", "lora.r=16,32,64", "seed=0,1,2,3,4")


def measured(words: Sequence[str], count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of a pack of that many runs: as planned, and as trained."""
    from lorabench import cli, data, machine, sweep
    from lorabench.plan import Planner
    from lorabench.sweep.needs import Needs
    from lorabench.train import train
    from lorabench.worker import Shared, make_pack

    planner = Planner()
    common = [
        f"trainer.steps={STEPS}", f"trainer.device={options.device}", "tracker=none",
        f"trainer.num_threads={options.threads}", "target_modules=attention",
    ]  # fmt: skip
    composed = cli.compose(["-m", *GRID, *common, *words], planner)
    every = sweep.plan_jobs(*composed[:2], planner)
    jobs = sorted(every, key=lambda job: (job.config.seeds.data, job.config.lora.r))[:count]
    shared = Shared(planner)
    shared.check_data(jobs)
    needs = Needs(planner)
    needs.know(jobs)
    planned, _ = needs.step_seconds(jobs)
    machine.configure_torch(jobs[0].config)
    pack, *_ = make_pack(shared, jobs, options.device)
    tokens = shared.dataset(jobs[0]).tokens["train"]
    took, start = [], time.perf_counter()
    for _ in train(pack, tokens, data.pad_id(shared.tokenizer(jobs[0]))):
        took.append(time.perf_counter() - start)
        start = time.perf_counter()
    seconds = statistics.median(took[3:])
    return {"planned_seconds": planned, "measured_seconds": seconds, "ratio": planned / seconds}


def main(arguments: list[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options_of(parser)
    parser.add_argument("--runs", default="1,4,12", type=lambda text: [*map(int, text.split(","))])
    options = parser.parse_args(arguments)
    result = begun("times", arguments, options)
    rows = result["rows"] = {}
    with tempfile.TemporaryDirectory() as folder:
        mixed = [*lengths.write(Path(folder)), f"data.max_length={lengths.CAP}"]
        for name, words in (("embedded", ["data.max_length=24"]), ("lengths", mixed)):
            for count in options.runs:
                row = rows[f"{name} {count}"] = measured(words, count, options)
                print(
                    f"{name}, {count} runs: planned {1e3 * row['planned_seconds']:,.0f} ms, "
                    f"measured {1e3 * row['measured_seconds']:,.0f} ms: {row['ratio']:.2f}"
                )
    print(write(result, "times", options))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
