"""Questions and verdicts, through the command line: numbers against statsmodels and scipy."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import anova
import numpy as np
import pandas as pd
import pytest
from conftest import say
from scipy import stats
from sweeps import write_run, write_sweep

from lorabench import compare, record

HEADS, RANKS = ("exclude", "lora"), (16, 32, 64)
GRID = list(itertools.product(HEADS, RANKS))
MEANS = {(head, r): 2.0 - 0.5 * (head == "lora") for head, r in GRID}
BANNED = re.compile(r"\b(p|df|Holm|variance)\b")


def said_json(*words: Any) -> dict[str, Any]:
    said = say("compare", *words, "--json")
    assert said.code == 0, said.err
    return json.loads(said.out)


def by_hand(gains: np.ndarray, level: float) -> tuple[float, float, float]:
    """Mean, p-value and half of the interval of a table of gains, (S, N), from statsmodels' own."""
    seeds = len(gains)
    squares, degrees = anova.mean_squares(gains)
    of_seeds, of_examples, rest = squares
    total = of_seeds + of_examples - rest
    two_way = np.sqrt(max(total, of_seeds, of_examples) / gains.size)
    df = total**2 / sum(ms**2 / n for ms, n in zip(squares, degrees, strict=True))
    df, mean = max(1.0, df), float(gains.mean())
    over_seeds = stats.ttest_1samp(gains.mean(1), 0)
    p = max(2 * stats.t.sf(abs(mean) / two_way, df), over_seeds.pvalue)
    half = max(
        two_way * stats.t.isf(level / 2, df),
        stats.sem(gains.mean(1)) * stats.t.isf(level / 2, seeds - 1),
    )
    return mean, p, half


def test_every_number_is_an_independent_computation_on_the_predictions(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", MEANS, seeds=5)
    found = said_json(tmp_path / "s")["verdicts"]
    assert len(found) == 13
    tables = {}
    for path in sorted((tmp_path / "s").glob("*/record.json")):
        one = json.loads(path.read_text())
        rows = pd.read_parquet(path.parent / one["evaluations"][-1]["predictions"])
        key = one["config"]["head"]["policy"], one["config"]["lora"]["r"], one["seeds"]["init"]
        tables[key] = rows.set_index("example")["nll"]

    def gain(better: tuple[str, int], worse: tuple[str, int]) -> np.ndarray:
        pairs = [(tables[*worse, s], tables[*better, s]) for s in range(5)]
        return np.stack([(w - b).to_numpy() for w, b in pairs])  # less nll is better

    p_values = []
    for one in found:
        levels = one["better"], one["worse"]
        if one["factor"] == "head":
            where = [one["at"]["r"]] if one["at"] else RANKS
            pairs = [[(level, int(r)) for level in levels] for r in where]
        else:
            where = [one["at"]["head"]] if one["at"] else HEADS
            pairs = [[(head, int(level)) for level in levels] for head in where]
        gains = np.mean([gain(*pair) for pair in pairs], 0)
        mean, p, half = by_hand(gains, one["level"])
        assert one["gain"] == pytest.approx(mean, rel=1e-9) and mean >= 0
        assert one["p"] == pytest.approx(p, rel=1e-6, abs=1e-14)
        assert [one["low"], one["high"]] == pytest.approx([mean - half, mean + half], rel=1e-6)
        _, _, plain = by_hand(gains, 0.05)
        ends = [mean - plain, mean + plain]
        assert [one["plain_low"], one["plain_high"]] == pytest.approx(ends, rel=1e-6)
        p_values.append(one["p"])
    rejected, adjusted = anova.holm(p_values)
    assert [one["outcome"] == "found" for one in found] == rejected.tolist()
    assert [one["p_adjusted"] for one in found] == pytest.approx(adjusted.tolist(), rel=1e-9)
    assert all((one["outcome"] == "found") == (one["low"] > 0) for one in found)
    heads = [one for one in found if one["factor"] == "head"]
    assert [one["outcome"] for one in heads] == ["found"] * 4
    assert {one["better"] for one in heads} == {"lora"}


def test_sentences_state_one_of_three_outcomes_in_plain_words(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", MEANS, seeds=5)
    text = say("compare", tmp_path / "s", "--margin", "0.2").out
    sentences = [line.strip() for line in text.partition("13 questions")[0].splitlines()]
    sentences = [line for line in sentences if "[" in line]
    assert len(sentences) == 13
    for line in sentences:
        told = [
            " beats " in line,
            "is not settled" in line,
            "no worse" in line or "differ by" in line,
        ]
        assert sum(told) == 1, line
        assert not BANNED.search(line), line
    found = r"head=lora beats head=exclude by 0\.\d+ nll \[0\.\d+, 0\.\d+\] at r=16"
    assert any(re.fullmatch(found, line) for line in sentences)
    assert any("averaged over r" in line for line in sentences)
    assert text.index("beats") < text.index("test nll"), "sentences stand above the table"
    assert any("r=32" in line and "differ by less than 0.2 nll" in line for line in sentences)


def test_what_is_not_settled_says_what_would(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {("exclude", 16): 2.0, ("lora", 16): 1.97}, seeds=3)
    (one,) = said_json(tmp_path / "s")["verdicts"]
    assert one["outcome"] == "not settled" and one["low"] < 0 < one["high"]
    assert one["more_seeds"] >= 1 and one["settles"] > 0
    assert one["smallest"] > one["settles"] or one["more_seeds"] > 0
    line = one["sentence"]
    assert re.search(r"is not settled: \d+ more seeds? would settle 0\.\d+$", line), line


def test_one_seed_gives_no_verdict_and_says_so(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", MEANS, seeds=1)
    found = said_json(tmp_path / "s")["verdicts"]
    assert {one["outcome"] for one in found} == {"no verdict"}
    assert all("over examples alone" in one["sentence"] for one in found)
    assert all("one seed" in one["sentence"] for one in found)
    values = write_sweep(tmp_path / "t", MEANS, seeds=1)
    gains = values["exclude", 16, 0] - values["lora", 16, 0]
    interval = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    one = next(o for o in found if o["at"] == {"r": "16"} and o["factor"] == "head")
    assert [one["plain_low"], one["plain_high"]] == pytest.approx([*interval], rel=1e-6)


def test_more_is_better_for_exact_match(tmp_path: Path) -> None:
    means = {("exclude", 16): 0.3, ("lora", 16): 0.8}
    write_sweep(tmp_path / "s", means, seeds=5, metric="exact_match")
    (one,) = said_json(tmp_path / "s")["verdicts"]
    assert (one["better"], one["outcome"], one["metric"]) == ("lora", "found", "exact_match")


def test_vary_baseline_metric_and_folders_choose(tmp_path: Path) -> None:
    for r in RANKS:  # a folder a rank
        write_sweep(tmp_path / f"s{r}", {(h, r): MEANS[h, r] for h in HEADS}, seeds=3, draw=r)
    folders = [tmp_path / f"s{r}" for r in RANKS]
    assert len(said_json(*folders)["verdicts"]) == 13
    heads = said_json(*folders, "--vary", "head")["verdicts"]
    assert {one["factor"] for one in heads} == {"head"} and len(heads) == 4
    assert said_json(*folders, "--vary", "head.policy")["verdicts"] == heads
    against = said_json(*folders, "--vary", "r", "--baseline", "lora.r=32")["verdicts"]
    assert {frozenset((one["better"], one["worse"])) for one in against} == {
        frozenset(("16", "32")), frozenset(("32", "64")),
    }  # fmt: skip
    for words, told in (
        (("--vary", "alpha"), "--vary: must name what varies between the runs (head, r); got"),
        (("--baseline", "r=8"), "--baseline: must name a level of r (16, 32, 64); got '8'"),
        (("--baseline", "r"), "must be KEY=VALUE"),
        (("--metric", "bleu"), "--metric: must be one that the runs were scored with"),
        (("--margin", "-1"), "must be a number above 0"),
    ):
        said = say("compare", *folders, *words)
        assert said.code == 2 and told in said.err, said.err


def test_runs_that_cannot_be_compared_are_named_with_what_helps(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    write_sweep(folder, MEANS, seeds=3)
    shutil.rmtree(folder / "lora-16-2" / "evaluations")
    rng = np.random.default_rng(5)
    write_run(folder, "lora", 64, 9, {"exact_match": rng.integers(0, 2, 60).astype(float)})
    write_run(folder, "exclude", 64, 9, {"nll": np.full(60, np.nan)})
    said = say("compare", folder)
    assert said.code == 0, said.err
    assert f"its predictions are gone; `lorabench evaluate {folder}`" in said.out
    assert "lora-16-2" in said.out and "hold no nll" in said.out and "no finite nll" in said.out
    found = said_json(folder)
    assert found["num_compared"] == 17 and len(found["verdicts"]) == 13
    assert found["num_read"] == 20 and "17 runs (3 more left out)" in said.out
    at_16 = next(o for o in found["verdicts"] if o["at"] == {"r": "16"} and o["factor"] == "head")
    assert len(at_16["seeds"]) == 2


def test_edited_and_damaged_predictions_are_not_compared(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    write_sweep(folder, {("exclude", 16): 2.0, ("lora", 16): 1.0}, seeds=4)
    path = folder / "lora-16-1" / "evaluations" / "0123456789ab.parquet"
    rows = pd.read_parquet(path)
    rows["nll"] -= 5
    rows.to_parquet(path)
    (folder / "lora-16-2" / "evaluations" / "0123456789ab.parquet").write_bytes(b"PAR1")
    found = said_json(folder)
    (one,) = found["verdicts"]
    assert len(one["seeds"]) == 2 and one["gain"] == pytest.approx(1, abs=0.3)
    (line,) = found["not_compared"]
    assert "are not those that were recorded; `lorabench evaluate" in line
    assert "lora-16-1" in line and "lora-16-2" in line


def test_of_two_runs_of_one_setting_and_seed_the_newer_counts(tmp_path: Path) -> None:
    folder, values = tmp_path / "s", np.arange(30.0)
    for seed in range(3):
        write_run(folder, "exclude", 16, seed, {"nll": values + 1})
        write_run(folder, "lora", 16, seed, {"nll": values}, ended="2026-11-26T12:00:00Z")
    write_run(folder, "lora", 16, 0, {"nll": values + 9}, name="older")
    found = said_json(folder)
    assert found["not_compared"] == ["there is a newer run of its setting and seeds: older"]
    assert found["verdicts"][0]["gain"] == pytest.approx(1) and found["num_compared"] == 6


def test_settings_without_a_common_seed_or_example(tmp_path: Path) -> None:
    values = np.arange(20.0)
    for head, seeds in (("exclude", (0, 1)), ("lora", (2, 3))):
        for seed in seeds:
            write_run(tmp_path / "s", head, 16, seed, {"nll": values + seed})
    (one,) = said_json(tmp_path / "s")["verdicts"]
    assert one["outcome"] == "no verdict" and "the settings share no seed; train" in one["sentence"]
    for head in HEADS:
        for seed in (0, 1):
            names = [f"{head}{i}" for i in range(20)]
            write_run(tmp_path / "t", head, 16, seed, {"nll": values}, examples=names)
    (one,) = said_json(tmp_path / "t")["verdicts"]
    assert "share fewer than 2 test examples" in one["sentence"]


def test_examples_are_paired_by_their_ids_whatever_their_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"e{i}" for i in range(50)]
    for seed in range(4):
        hard = rng.normal(size=50) * 3
        write_run(tmp_path / "s", "exclude", 16, seed, {"nll": hard + 0.1}, examples=names)
        turned = rng.permutation(50)
        values = (hard + 0.001 * rng.normal(size=50))[turned]
        examples = [names[i] for i in turned]
        write_run(tmp_path / "s", "lora", 16, seed, {"nll": values}, examples=examples)
    (one,) = said_json(tmp_path / "s")["verdicts"]
    assert one["outcome"] == "found" and one["gain"] == pytest.approx(0.1, abs=1e-3)


def test_keys_that_change_together_are_one_factor(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for head, seed in itertools.product(HEADS, range(3)):
        model = {"name": f"m-{head}", "path": f"/x/{head}"}
        values = {"nll": rng.normal(size=30)}
        write_run(tmp_path / "s", head, 16, seed, values, config={"model": model})
    found = said_json(tmp_path / "s")["verdicts"]
    assert len(found) == 1


def test_a_setting_alone_is_no_question(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {("lora", 16): 1.0}, seeds=3)
    said = say("compare", tmp_path / "s")
    assert said.code == 0 and "there is nothing to compare it with" in said.out


def test_verdicts_in_python_are_those_of_the_command(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", MEANS, seeds=3)
    answers = compare.verdicts(record.find(tmp_path / "s"))
    found = said_json(tmp_path / "s")["verdicts"]
    assert answers.sentences() == [one["sentence"] for one in found]
    frame = answers.frame()
    assert frame["gain"].tolist() == pytest.approx([one["gain"] for one in found])
