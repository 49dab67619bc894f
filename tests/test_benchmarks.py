"""The benchmark's command line on a tiny shape, and its check that contenders did the same work."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
from processes import start_call

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "sweep.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_sweep", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("found", "agree"),
    [
        ({"x": [2.0, 1.00001]}, True),
        ({"x": [2.0, 1.001]}, False),  # ten times the tolerance
        ({"x": [2.0, math.nan]}, False),
        ({"x": [2.0]}, False),  # a step short
        ({}, False),  # a run short
    ],
)
def test_losses_agree_only_within_rounding(
    bench: Any, found: dict[str, list[float]], agree: bool
) -> None:
    assert bench.agreement({"x": [2.0, 1.0]}, found, "float32")["agree"] is agree


@pytest.mark.slow
def test_every_contender_does_the_same_work(bench: Any) -> None:
    processes = bench.Processes(1, 12, bench.QUICK)
    found = {name: processes.run(name)["runs"] for name in ("a", "stock", "b", "own", "c", "d4")}
    losses = {name: {run: r["losses"] for run, r in runs.items()} for name, runs in found.items()}
    for name, mine in losses.items():
        assert bench.agreement(losses["a"], mine, "float32")["agree"], name
    for run, one in found["a"].items():  # two dozen steps on: rounding, grown
        assert found["c"][run]["nll"] == pytest.approx(one["nll"], rel=1e-2)


def test_nothing_compared_is_no_agreement(bench: Any) -> None:
    assert not bench.agreement({}, {}, "float32")["agree"]


def test_ratio_is_the_median_of_the_ratios_of_each_repeat(bench: Any) -> None:
    # a slow phase of the machine slows both contenders of a repeat: medians apart would give 6
    assert bench.ratio([4.0, 12.0, 40.0], [2.0, 6.0, 1.0]) == 2.0


def test_shapes_from_the_command_line(bench: Any, tmp_path: Path) -> None:
    arguments = ["--shapes", "tiny", "--tokens", "64", "--packs", "2"]
    arguments += ["--repeats", "1", "--threads", "1", "--no-compile", "--out", str(tmp_path)]
    done = start_call(tmp_path, lambda: bench.main(arguments))
    assert done.wait() == 0, done.said
    result = json.loads((tmp_path / "cpu-shapes.json").read_text())
    assert result["machine"]["packages"]["torch"] and result["command"]
    assert result["peak_matmul_flops_per_second"] > 0
    case = result["cases"]["tiny 64"]
    assert case["left_out"] == {} and case["tuned"] == "solo" and 1 <= case["sizer"] <= 16
    # four settings alone by each loop, and the pack
    assert len(case["step_seconds"]) == 4 + 4 + 1
    pack = case["packs"]["d2"]
    assert pack["losses_as_a"]["agree"]
    assert {"step_seconds", "ratio_to_a", "ratio_to_c", "tokens_per_second"} <= set(pack)
    assert pack["tokens_per_second"] == pytest.approx(2 * 64 / pack["step_seconds"])


def test_what_runs_out_of_memory_or_time_is_recorded(bench: Any, tmp_path: Path) -> None:
    arguments = ["--shapes", "tiny", "--tokens", "64", "--packs", "2", "--budget", "0"]
    assert bench.main([*arguments, "--threads", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cpu-shapes.json").read_text())
    assert result["cases"]["tiny 64"] == {"left_out": {"all": "no time left"}}
