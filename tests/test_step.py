"""What a step is made of, as `benchmarks/step.py` counts it."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from benches import benchmark
from processes import start_call


@pytest.fixture(scope="module")
def bench() -> Any:
    return benchmark("step")


def test_a_layer_takes_few_calls_and_a_step_one_wait(bench: Any) -> None:
    """Whatever the number of runs: of twelve alike as of one."""
    options = Namespace(device="cpu", tokens=32, lengths=False)
    few, many = (bench.counted("qwen3-0.6b", "alike", 12, layers, options) for layers in (1, 2))
    a_layer = sum(many["ops"].values()) - sum(few["ops"].values())
    assert 100 < a_layer <= 180  # 296 before the step was made of tensors
    assert few["waits"] == many["waits"] == 1


def test_any_number_of_learning_rates_takes_the_same_calls(bench: Any) -> None:
    options = Namespace(device="cpu", tokens=32, lengths=False)
    base, config = bench.base_of("qwen3-0.6b", 1, options)
    skeleton = bench.plan_of["qwen3-0.6b", 1]
    runs = bench.runs_of(config, "mixed", 12)
    pack, steps = bench.stepping(base, runs, skeleton, "mixed", options)
    next(steps)

    def calls(rates: list[float]) -> dict[str, int]:
        for one in pack.stacked.values():
            one.value.grad = one.value.detach().clone()
        with bench.Ops() as ops:
            pack.update(rates)
        return dict(ops.calls)

    assert calls([1e-3] * 12) == calls([1e-3 * (1 + i) for i in range(12)])


@pytest.mark.slow
def test_from_the_command_line(bench: Any, tmp_path: Path) -> None:
    arguments = ["--shapes", "tiny", "--tokens", "32", "--runs", "1,2", "--repeats", "1"]
    arguments += ["--threads", "1", "--out", str(tmp_path)]
    done = start_call(tmp_path, lambda: bench.main(arguments))
    assert done.wait() == 0, done.said
    result = json.loads((tmp_path / "cpu-step.json").read_text())
    assert str(tmp_path) not in result["command"] and result["machine"]["packages"]["torch"]
    rows = result["rows"]
    assert list(rows) == [
        "tiny stock 1", "tiny alike 1", "tiny alike 2", "tiny dropout 2", "tiny mixed 2",
    ]  # fmt: skip
    for name, row in rows.items():
        assert row["operations_a_layer"] > 0 and row["saved_bytes"] > 0, name
        assert row["waits"] == 1 and row["share_of_peak"] > 0, name
        assert row.get("real_share", 1.0) == 1.0, "nothing is padded"
