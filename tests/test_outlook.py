"""What a sweep will be able to tell, before it is trained; what an experiment asks of itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import say
from sweeps import write_sweep

from lorabench.compare import statistics
from lorabench.compare.power import upper_factor

SMALL = (
    "trainer.steps=3", "trainer.batch_size=2", "data.num_train=16", "data.num_validation=8",
    "data.num_test=64", "lora.r=2", "tracker=none",
)  # fmt: skip


def outlook(*words: Any) -> dict[str, Any]:
    said = say("plan", "-m", "--json", *SMALL, *words)
    assert said.code == 0, said.err
    return json.loads(said.out)["outlook"]


def share_found(spreads: dict[str, float], seeds: int, n: int, level: float, gain: float) -> float:
    """How many of 4,000 simulated sweeps find a difference in one of their questions."""
    rng = np.random.default_rng(0)
    d = gain + spreads["seeds"] * rng.normal(size=(4000, seeds, 1))
    d = d + spreads["examples"] * rng.normal(size=(4000, 1, n))
    d = d + spreads["rest"] * rng.normal(size=(4000, seeds, n))
    return float((statistics.test_of(statistics.components(d)).p <= level).mean())


@pytest.mark.slow
def test_plan_names_the_smallest_difference_that_four_of_five_sweeps_find() -> None:
    found = outlook("head=exclude,lora", "trainer.lr=1e-3,2e-3", "seed=0,1,2,3,4")
    assert (found["questions"], found["settings"]) == (6, 4)
    assert (found["seeds"], found["examples"]) == (5, 64)
    share = share_found(found["spreads"]["of"], 5, 64, 0.05 / 6, found["smallest"])
    assert share == pytest.approx(0.8, abs=0.05)  # the bound; draws are within 1.3 points


@pytest.mark.slow
def test_a_pilot_tells_the_spreads_and_settle_the_seeds(tmp_path: Path) -> None:
    means = {("exclude", 16): 2.0, ("lora", 16): 1.5}
    write_sweep(tmp_path / "s", means, seeds=5, examples=400, spreads=(0.05, 0.1, 0.2))
    words = ["--pilot", str(tmp_path / "s"), "--settle", "0.1", "head=exclude,lora", "seed=0,1"]
    found = outlook(*words)
    verdict = json.loads(say("compare", tmp_path / "s", "--json").out)["verdicts"][0]
    of = found["spreads"]["of"]
    assert of["examples"] == pytest.approx(verdict["spreads"]["examples"])
    assert of["seeds"] == pytest.approx(verdict["spreads"]["seeds"] * float(upper_factor(5)))
    needed = found["settle"]["seeds"]
    enough, fewer = (share_found(of, s, 64, 0.05, 0.1) for s in (needed, needed - 1))
    assert enough >= 0.77 and fewer < 0.83  # 80%, and three standard errors of 4,000 draws
    told = say("plan", "-m", *SMALL, *words).out
    assert re.search(rf"settle +0\.1 nll needs {needed} seeds of 2 settings", told), told
    assert "is taken 1.6 times, because 5 seeds tell little about it" in told


@pytest.mark.slow
def test_more_examples_where_seeds_do_not_help() -> None:
    found = outlook("--settle", "0.05", "head=exclude,lora", "seed=0,1,2")
    assert found["settle"]["seeds"] == 8
    needed = found["settle"]["examples"]
    of = found["spreads"]["of"]
    assert share_found(of, 8, needed, 0.05, 0.05) == pytest.approx(0.8, abs=0.05)
    told = say("plan", "-m", *SMALL, "--settle", "0.001", "head=exclude,lora", "seed=0,1").out
    assert "settle    0.001 nll is found with no number of seeds or test examples" in told


@pytest.mark.slow
def test_one_seed_or_one_setting_settles_nothing() -> None:
    assert outlook("head=exclude,lora")["smallest"] is None
    told = say("plan", "-m", *SMALL, "head=exclude,lora").out
    assert "one seed settles none" in told
    assert outlook("seed=0,1") is None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--pilot"], "argument --pilot: expected one argument"),
        (["--settle", "-1"], "must be a number above 0; got '-1'"),
        (["--pilot", "nowhere"], "'nowhere' does not exist"),
    ],
)
def test_options_of_plan_are_refused_in_a_line(words: list[str], text: str) -> None:
    said = say("plan", *words)
    assert said.code == 2 and text in said.err, said.err


def test_what_an_experiment_asks_is_in_sweep_json_and_compare_asks_it(tmp_path: Path) -> None:
    words = [
        "compare.vary=[lora.r]", "compare.baseline={lora.r: 4}", "head=exclude,lora", "lora.r=2,4",
        "seed=0", "trainer.num_threads=1", f"output_dir={tmp_path}", "sweep=s",
    ]  # fmt: skip
    done = say("train", "-m", *[word for word in SMALL if word != "lora.r=2"], *words)
    assert done.code == 0, done.err
    (asked,) = {
        json.dumps(run["config"]["compare"])
        for run in json.loads((tmp_path / "s" / "sweep.json").read_text())["runs"].values()
    }
    assert json.loads(asked)["vary"] == ["lora.r"]
    found = json.loads(say("compare", tmp_path / "s", "--json").out)["verdicts"]
    assert [one["factor"] for one in found] == ["r"] * 3
    found = json.loads(say("compare", tmp_path / "s", "--vary", "head", "--json").out)["verdicts"]
    assert {one["factor"] for one in found} == {"head"}, "an option goes before the experiment"


@pytest.mark.parametrize(
    ("word", "text"),
    [
        (
            "compare.vary=[lora.rank]",
            "compare.vary: must name a key of the config; got 'lora.rank'",
        ),
        ("compare.select=lr_", "compare.select: must name a key of the config; got 'lr_'"),
        ("compare.baseline=[1]", "compare.baseline: must be {key: value}"),
    ],
)
def test_an_experiment_that_asks_nonsense_is_refused(word: str, text: str) -> None:
    said = say("plan", *SMALL, word)
    assert said.code == 2 and text in said.err, said.err
