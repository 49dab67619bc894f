"""Ranks with their uncertainty, the best on validation, other people's results: the table."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import anova
import numpy as np
import pytest
from conftest import say
from scipy import stats
from sweeps import write_run, write_sweep

from lorabench import compare, record
from lorabench.compare.ranks import rank_intervals
from lorabench.compare.scores import Scores

FOREIGN = Path(__file__).parent / "foreign"


def test_ranks_are_those_that_pairwise_tests_leave_open() -> None:
    """Against statsmodels' mean squares and Holm, pair by pair."""
    rng = np.random.default_rng(0)
    means = [1.0, 1.02, 1.3, 1.3, 1.9]
    hard = rng.normal(size=30)
    y = np.array([m + hard + 0.02 * rng.normal(size=(4, 1)) + 0.1 * rng.normal(size=(4, 30))
                  for m in means])  # fmt: skip
    examples = tuple(map(str, range(30)))
    runs = [{s: Scores(examples, y[k, s]) for s in range(4)} for k in range(5)]
    found = rank_intervals(runs, higher_is_better=False)
    pairs = list(itertools.combinations(range(5), 2))
    p = []
    for a, b in pairs:
        d = y[a] - y[b]
        squares, degrees = anova.mean_squares(d)
        total = squares[0] + squares[1] - squares[2]
        error = np.sqrt(max(total, squares[0], squares[1]) / d.size)
        df = max(1, total**2 / sum(ms**2 / n for ms, n in zip(squares, degrees, strict=True)))
        two_way = 2 * stats.t.sf(abs(d.mean()) / error, df)
        p.append(max(two_way, stats.ttest_1samp(d.mean(1), 0).pvalue))
    rejected, _ = anova.holm(p)
    expected = [[1, 5] for _ in means]
    for (a, b), differ in zip(pairs, rejected, strict=True):
        if differ:
            better, worse = (a, b) if y[a].mean() < y[b].mean() else (b, a)
            expected[worse][0] += 1
            expected[better][1] -= 1
    assert [list(one) for one in found if one] == expected
    assert expected[0] != expected[4] and expected[2] == expected[3], "some differ, some do not"
    turned = rank_intervals(runs, higher_is_better=True)
    assert [(6 - high, 6 - low) for low, high in found] == turned


def test_no_ranks_without_two_shared_seeds(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {("exclude", 16): 1.0, ("lora", 16): 2.0}, seeds=1)
    assert compare.verdicts(record.find(tmp_path / "s")).ranks == {}
    said = say("compare", tmp_path / "s")
    assert said.code == 0 and "│ rank" not in said.out and "┃ rank" not in said.out


def test_the_table_shows_both_splits_and_marks_the_best_on_validation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for head, loss in (("exclude", 1.0), ("lora", 0.5)):
        for seed in range(3):
            scores = {
                "nll": loss + rng.normal(size=20) / 9,
                "exact_match": rng.integers(0, 2, 20).astype(float),
            }
            # On validation the other one is better.
            means = {"nll": 1.5 - loss, "exact_match": 0.5}
            write_run(tmp_path / "s", head, 16, seed, scores, validation=means)
    out = say("compare", tmp_path / "s").out
    assert re.search(r"test nll ↓ .*validation nll ↓ .*test exact_match ↑", out)
    assert re.search(r"exclude \* *│ +2 │", out) and re.search(r"lora +│ +1 │", out)
    assert "* the best on validation nll; test judges" in out
    out = say("compare", tmp_path / "s", "--metric", "exact_match").out
    assert "nll" not in out.partition("\n\n")[2], "only what was asked for is in the table"
    said = say("compare", tmp_path / "s", "--metric", "exact_match,nll", "--json")
    found = json.loads(said.out)
    assert found["metric"] == "exact_match" and {v["metric"] for v in found["verdicts"]} == {
        "exact_match"
    }
    ranks = {row["setting"]["head.policy"]: row["rank"] for row in found["rows"]}
    assert ranks == {"exclude": [1, 2], "lora": [1, 2]}


def test_results_of_pefts_benchmark_stand_beside_ours_and_get_no_verdict(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {("exclude", 16): 1.0, ("lora", 16): 2.0}, seeds=3)
    alone = json.loads(say("compare", tmp_path / "s", "--json").out)
    said = say("compare", tmp_path / "s", FOREIGN, "--json")
    both = json.loads(said.out)
    assert both["verdicts"] == alone["verdicts"] and both["rows"] == alone["rows"]
    assert len(both["foreign"]) == 8
    one = next(
        r for r in both["foreign"] if r["setting"]["experiment"] == "lora/little-rank24-bdlora"
    )
    interval = one["foreign"]["intervals"]["test"]
    assert interval["num_examples"] == 1319 and one["foreign"]["verdict"].startswith("one seed")
    said = say("compare", tmp_path / "s", FOREIGN)
    assert re.search(rf"{interval['low']:.3f}, {interval['high']:.3f}\]", said.out)
    assert "8 results of PEFT's benchmark: one seed each, so no verdict" in said.out
    assert "2026-03_canceled.json: its run did not finish" in said.err
    said = say("compare", FOREIGN)
    assert said.code == 0 and "accuracy" in said.out and "beats" not in said.out


@pytest.mark.parametrize("word", ["head+lora.r", "head+r"])
def test_two_factors_are_asked_about_as_one(tmp_path: Path, word: str) -> None:
    """Does r=64 without the head beat r=16 with it: a question across both."""
    means = {("exclude", 16): 2.0, ("exclude", 64): 1.5, ("lora", 16): 1.0, ("lora", 64): 0.9}
    write_sweep(tmp_path / "s", means, seeds=4)
    words = ["--vary", word, "--baseline", "head+r=lora+16"]
    found = json.loads(say("compare", tmp_path / "s", *words, "--json").out)["verdicts"]
    assert len(found) == 3
    told = [one["sentence"] for one in found]
    assert any("head=lora r=16 beats head=exclude r=64 by" in text for text in told), told
    said = say("compare", tmp_path / "s", "--vary", "head+bias")
    assert said.code == 2 and "--vary: must name what varies" in said.err


def test_options_go_before_the_experiment_and_contradictions_are_refused(tmp_path: Path) -> None:
    means = {(h, r): 1.0 + 0.1 * r for h in ("exclude", "lora") for r in (1, 2)}
    write_sweep(tmp_path / "s", means, seeds=3)
    for words, told in (
        (["--select", "lora.r", "--vary", "lora.r"], "--select: must be a key that is not asked"),
        (["--vary", "lora.r", "--baseline", "head=lora"], "--baseline: must be of what is asked"),
        (
            ["--baseline", "r=1", "--baseline", "r=2"],
            "--baseline: must name a key once; got r twice",
        ),
        (
            ["--metric", "nll,bogus"],
            "--metric: must be scores that the runs have (nll); got 'bogus'",
        ),
        (["--metric", ","], "must be names with commas between them; got ','"),
    ):
        said = say("compare", tmp_path / "s", *words)
        assert said.code == 2 and told in said.err, said.err
    # A level is a value, however it is written.
    assert say("compare", tmp_path / "s", "--vary", "r", "--baseline", "r=1.0").code == 0
    once = json.loads(say("compare", tmp_path / "s", "--json").out)
    again = json.loads(say("compare", tmp_path / "s", tmp_path / "s", "--json").out)
    assert (again["num_read"], again["verdicts"]) == (once["num_read"], once["verdicts"])


def test_sentences_do_not_round_an_end_onto_zero_or_the_margin() -> None:
    from lorabench.compare.sentences import numbers

    assert numbers(0.004, 0.11, 0.06) == ("0.004", "0.110", "0.060")
    assert numbers(-0.03, 0.0796, 0.02, apart=(0.08,)) == ("-0.0300", "0.0796", "0.0200")
    assert numbers(0.0, 0.0, 0.0) == ("0.00", "0.00", "0.00")


def test_identical_scores_are_called_so(tmp_path: Path) -> None:
    for head in ("exclude", "lora"):
        for seed in range(3):
            write_run(tmp_path / "s", head, 16, seed, {"exact_match": np.zeros(40)})
    found = json.loads(say("compare", tmp_path / "s", "--margin", "0.02", "--json").out)
    (one,) = found["verdicts"]
    assert one["outcome"] == "not settled", "40 examples may all miss what one in 50 shows"
    assert one["sentence"].endswith("exact_match is identical on all 40 examples of 3 seeds")
    assert one["high"] == pytest.approx(-np.log(0.05) / 40)  # the rule of three
    said = say("compare", tmp_path / "s", "--margin", "0.1")
    assert "differ by less than 0.1 exact_match" in said.out


def test_values_that_look_alike_are_told_apart(tmp_path: Path) -> None:
    for lr in (0.0001234567, 0.0001234568):
        for seed in range(3):
            write_run(
                tmp_path / "s", "lora", 16, seed, {"nll": np.arange(20.0) + lr},
                config={"trainer": {"steps": 4, "lr": lr}}, name=f"{lr}-{seed}",
            )  # fmt: skip
    (one,) = json.loads(say("compare", tmp_path / "s", "--json").out)["verdicts"]
    assert {one["better"], one["worse"]} == {"0.0001234567", "0.0001234568"}
