"""The benchmark's command line on a tiny shape, and its check that contenders did the same work."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benches import benchmark
from processes import start_call


@pytest.fixture(scope="module")
def bench() -> Any:
    return benchmark("sweep")


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


@pytest.mark.slow
def test_shapes_from_the_command_line(bench: Any, tmp_path: Path) -> None:
    arguments = ["--shapes", "tiny", "--tokens", "64", "--packs", "2"]
    arguments += ["--repeats", "1", "--threads", "1", "--no-compile", "--out", str(tmp_path)]
    done = start_call(tmp_path, lambda: bench.main(arguments))
    assert done.wait() == 0, done.said
    result = json.loads((tmp_path / "cpu-shapes.json").read_text())
    assert result["machine"]["packages"]["torch"] and result["command"]
    assert result["peak_matmul_flops_per_second"] > 0
    assert str(tmp_path) not in result["command"]
    case = result["cases"]["tiny 64"]
    assert case["left_out"] == {} and case["tuned"] == "solo" and 1 <= case["sizer"] <= 16
    # four settings alone by each loop, and the pack
    assert len(case["step_seconds"]) == 4 + 4 + 1
    pack = case["packs"]["d2"]
    assert pack["losses_as_a"]["agree"]
    assert {"step_seconds", "ratio_to_a", "ratio_to_c", "tokens_per_second"} <= set(pack)
    assert pack["tokens_per_second"] == pytest.approx(2 * 64 / pack["step_seconds"])


@pytest.mark.slow
def test_shapes_have_examples_of_different_lengths(bench: Any, tmp_path: Path) -> None:
    arguments = ["--shapes", "tiny", "--tokens", "512", "--packs", "2", "--lengths"]
    arguments += ["--repeats", "1", "--threads", "1", "--no-compile", "--out", str(tmp_path)]
    done = start_call(tmp_path, lambda: bench.main(arguments))
    assert done.wait() == 0, done.said
    result = json.loads((tmp_path / "cpu-shapes-lengths.json").read_text())
    pack = result["cases"]["tiny 512 lengths"]["packs"]["d2"]
    assert pack["losses_as_a"]["agree"]
    mean = pack["tokens_per_second"] * pack["step_seconds"] / 2  # of a run's step of 4 examples
    assert 4 * 80 < mean < 4 * 128


@pytest.mark.slow
def test_what_runs_out_of_memory_or_time_is_recorded(bench: Any, tmp_path: Path) -> None:
    arguments = ["--shapes", "tiny", "--tokens", "64", "--packs", "2", "--budget", "0"]
    assert bench.main([*arguments, "--threads", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cpu-shapes.json").read_text())
    assert result["cases"]["tiny 64"] == {"left_out": {"all": "no time left"}}


def test_lengths_are_those_of_an_instruction_set(bench: Any) -> None:
    many = bench.lengths.lengths(20_000, seed=1, cap=1 << 20)
    # the standard error of the mean is 0.7%
    assert statistics.mean(many) == pytest.approx(bench.lengths.MEAN, rel=0.03)
    capped = bench.lengths.lengths(20_000, seed=1)
    assert min(capped) >= 8 and 500 < max(capped) <= bench.lengths.CAP
    assert 99 < statistics.mean(capped) < 105  # the tail above the cap holds 6% of the tokens
    longest_of_8 = [max(capped[i : i + 8]) for i in range(0, len(capped), 8)]
    # else nothing would be computed for padding, and nothing shown
    assert statistics.mean(longest_of_8) > 2 * statistics.mean(capped)


def test_lengths_are_reproducible(bench: Any) -> None:
    assert bench.lengths.lengths(50, seed=3) == bench.lengths.lengths(50, seed=3)
    assert bench.lengths.lengths(50, seed=3) != bench.lengths.lengths(50, seed=4)


def test_written_examples_have_the_drawn_lengths(bench: Any, tmp_path: Path) -> None:
    from lorabench import cli, config, data
    from lorabench import model as base_model

    (cfg,), *_ = cli.compose([*bench.lengths.write(tmp_path), "data.max_length=512"])
    typed = config.typed(cfg)
    splits, tokenizer = data.load(typed.data), base_model.tokenizer(typed.model)
    assert not splits.notes  # of prompts that are in two splits
    for seed, (split, count) in enumerate(bench.lengths.COUNTS.items()):
        tokens = data.tokenise(getattr(splits, split), tokenizer, typed.data)
        found = sorted(len(ids) for ids in tokens.input_ids)
        assert found == sorted(bench.lengths.lengths(count, seed))


def test_contenders_from_the_command_line(bench: Any, capsys: pytest.CaptureFixture) -> None:
    every = ["a", "stock", "b", "own", "c", "d2", "d16"]
    assert bench.parse(["--packs", "2,16"]).contenders == every
    unequal = ["a", "a-grouped", "stock", "d12", "d12-grouped"]
    assert bench.parse(["--lengths"]).contenders == unequal
    assert bench.parse(["--contenders", "d12,a,d12"]).contenders == ["d12", "a"]
    for arguments in (
        ["--contenders", "a,d0"],
        ["--contenders", "own-grouped"],
        ["--contenders", "a", "--shapes", "tiny"],
        ["--contenders", "a", "--device", "cuda"],
    ):
        with pytest.raises(SystemExit):
            bench.parse(arguments)
    assert "got 'd0'" in capsys.readouterr().err


class Told:
    """Contenders that take no time; `stock` trains otherwise than the rest."""

    def __init__(self, axes: dict[str, list[Any]]) -> None:
        self.axes = axes

    def run(self, name: str) -> dict[str, Any]:
        tokens = 300 if name.endswith("-grouped") else 100
        run: dict[str, Any] = {"nll": {"test": 1.0}, "tokens": tokens, "computed_tokens": 400}
        run["losses"] = [9.0 if name == "stock" or tokens == 300 else 2.0]
        seconds = {"a": 8.0, "a-grouped": 12.0}.get(name, 2.0)
        parts = {"train_seconds": seconds / 2, "evaluate_seconds": seconds / 4}
        return {"seconds": seconds, "runs": {"x": run}, **parts}


def interleaved(bench: Any, *names: str) -> dict[str, Any]:
    options = SimpleNamespace(contenders=[*names], compile=False, repeats=2)
    result = {"peak_matmul_flops_per_second": 1000.0, "steps": 1}
    numbers = {"all": 60, "linear": 50}
    bench.interleave(Told(bench.QUICK), numbers, options, result, lambda: None)
    return result


def test_grouped_contenders_are_compared_per_token_and_by_no_loss(
    bench: Any, capsys: pytest.CaptureFixture
) -> None:
    result = interleaved(bench, "d12", "a", "a-grouped", "d12-grouped")
    rows = result["contenders"]
    assert rows["d12"]["losses_as_a"]["agree"] and bench.all_agree(result)
    assert rows["a-grouped"]["losses_as_a"] is None and rows["a-grouped"]["other_batches"]
    assert rows["d12"]["ratio_to_a"] == 4.0
    assert rows["d12-grouped"]["ratio_to_a"] == 12.0  # three times the tokens
    assert rows["d12-grouped"]["ratio_to_a-grouped"] == 6.0
    assert rows["a"]["real_share"] == 0.25 and rows["a-grouped"]["real_share"] == 0.75
    assert rows["a"]["tokens_per_second"] == 100 / 8
    assert rows["a"]["median_start_seconds"] == 2.0
    assert result["matmul_bound_seconds"] == 4 * 50 * 100 / 1000  # of the tokens of (a)
    bench.show(result)
    said = capsys.readouterr().out
    assert said.count("other batches") == 2 and said.count("yes") == 2
    assert "20.0 s at the measured peak" in said


def test_losses_that_differ_fail_the_benchmark(bench: Any) -> None:
    assert not bench.all_agree(interleaved(bench, "a", "stock"))


def test_without_a_nothing_is_compared_and_that_is_said(
    bench: Any, capsys: pytest.CaptureFixture
) -> None:
    result = interleaved(bench, "stock", "d12")
    assert bench.all_agree(result) and "rounding_of_a" not in result
    assert not any("ratio_to_a" in row for row in result["contenders"].values())
    bench.show(result)
    said = capsys.readouterr().out
    assert "(a) is not among the contenders" in said and "yes" not in said


@pytest.mark.slow
def test_grouping_by_length_is_shown_and_the_rest_does_the_same_work(
    bench: Any, tmp_path: Path
) -> None:
    data = (*bench.lengths.write(tmp_path), "data.max_length=512")
    processes = bench.Processes(1, 4, bench.QUICK, data)
    found = {name: processes.run(name) for name in ("a", "a-grouped", "d12", "d12-grouped")}
    losses = {name: bench.losses_of(one["runs"]) for name, one in found.items()}
    assert bench.agreement(losses["a"], losses["d12"], "float32")["agree"]
    assert not bench.agreement(losses["a"], losses["a-grouped"], "float32")["agree"]
    rows: dict[str, Any] = {}
    for name, one in found.items():
        rows[name] = {"seconds": [], "train_seconds": [], "evaluate_seconds": []}
        bench.add(rows[name], one)
        parts = one["train_seconds"] + one["evaluate_seconds"]
        assert 0 < parts < one["seconds"], name
    assert rows["a"]["tokens"] == rows["d12"]["tokens"]
    assert rows["a"]["real_share"] < 0.6 < 0.8 < rows["a-grouped"]["real_share"] < 1
    assert rows["d12"]["real_share"] == rows["d12-grouped"]["real_share"] == 1
    # The Trainer and lorabench group alike: the longest examples of a stretch come first.
    assert rows["d12-grouped"]["tokens"] > 2 * rows["d12"]["tokens"]
    assert rows["a-grouped"]["tokens"] > 2 * rows["a"]["tokens"]
