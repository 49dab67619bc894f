"""Lints of settings: each confound is found once, named, and absent from a clean sweep."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
from typing import Any

import pandas as pd
import pytest
import torch
from linted import clean, ids, names, only, run, valley
from peft import LoraConfig, get_peft_model

from lorabench import compare
from lorabench.compare.lints import is_linted, lints
from lorabench.compare.selection import Chosen


def test_a_clean_sweep_has_none_and_unfinished_runs_are_not_looked_at():
    assert lints(clean()) == []
    assert lints([]) == []
    odd = [run(7, 5.0, "full", None, status=status, arithmetic_version=1) for status in
           ("failed", "interrupted", "planned", "running", "trained")]  # fmt: skip
    assert lints([*clean(), *odd]) == []


# --- scales -----------------------------------------------------------------------------------


def stock_scale(**lora: Any) -> float:
    """What stock PEFT multiplies an update by."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    wrapped = get_peft_model(base, LoraConfig(target_modules=["0"], **lora))
    return float(wrapped.base_model.model[0].scaling["default"])


@pytest.mark.parametrize(
    ("lora", "rslora", "remedy"),
    [
        ({"lora_alpha": 16}, False, r"lora\.alpha_ratio=4 in place of lora\.lora_alpha=16"),
        ({"alpha_ratio": 2}, True, r"lora\.lora_alpha=8 in place of lora\.alpha_ratio"),
        ({}, True, r"lora\.lora_alpha=8 in place of lora\.alpha_ratio"),
    ],
)
def test_a_scale_that_moves_with_the_rank_is_stock_pefts(lora, rslora, remedy):
    ranks = (4, 16, 64)
    runs = [run(seed, lora={"r": r, "use_rslora": rslora} | lora) for r in ranks for seed in (0, 1)]
    found = only(runs, "scale-with-rank")
    ends = []
    for r in (4, 64):
        alpha = lora.get("lora_alpha", 2 * r)
        ends.append(stock_scale(r=r, lora_alpha=alpha, use_rslora=rslora))
    low, high = map(float, re.search(r"from ([\d.]+) to ([\d.]+):", found.text).groups())
    assert [low, high] == ends  # all are exact in four digits
    assert "r=4, 16, 64" in found.text and re.search(remedy, found.remedy)
    assert set(found.runs) == ids(runs)


@pytest.mark.parametrize(
    "loras",
    [
        [{"r": r} for r in (4, 16)],  # twice r
        [{"r": r, "alpha_ratio": 1} for r in (4, 16)],
        [{"r": r, "lora_alpha": 2 * r} for r in (4, 16)],
        [{"r": r, "lora_alpha": 16, "use_rslora": True} for r in (4, 16)],  # what rsLoRA is for
        [{"r": 8, "lora_alpha": alpha} for alpha in (8, 16)],
    ],
)
def test_a_scale_that_is_meant_is_no_lint(loras):
    assert "scale-with-rank" not in names([run(s, lora=lora) for lora in loras for s in (0, 1)])


def test_rslora_beside_plain_is_found_where_peft_scales_them_differently():
    loras = [{"r": 16, "use_rslora": flag} for flag in (False, True)]
    runs = [run(seed, lora=lora) for lora in loras for seed in (0, 1)]
    found = only(runs, "rslora-beside-plain")
    plain, other = (stock_scale(r=16, lora_alpha=32, use_rslora=flag) for flag in (False, True))
    assert f"{other:g} and {plain:g} at r=16" in found.text and set(found.runs) == ids(runs)
    alpha = float(re.search(r"lora_alpha=(\S+) at", found.remedy)[1])
    assert stock_scale(r=16, lora_alpha=alpha, use_rslora=True) == plain
    loras[1] |= {"lora_alpha": alpha}
    assert "rslora-beside-plain" not in names([run(s, lora=lora) for lora in loras for s in (0, 1)])


def test_a_rank_above_a_modules_size_is_told_once_from_the_plans_warning():
    note = (
        "lora.r: 64 is more than the smaller side of 2 modules (such as model.layers.0.k_proj: 32)"
        ": ranks above that add parameters without adding capacity"
    )
    runs = [
        run(s, lora={"r": r}, notes=[note] if r == 64 else []) for r in (16, 64) for s in (0, 1)
    ]
    found = only(runs, "rank-above-module")
    assert found.text.startswith("r=64 is more than the smaller side of 2 modules")
    assert "up to 32" in found.remedy and set(found.runs) == ids(runs[2:])
    assert is_linted(note) and not is_linted("data.test: is read at its newest commit")


# --- learning rates ---------------------------------------------------------------------------


@pytest.mark.parametrize("draw", range(6))
def test_rates_at_the_edge_are_those_where_pandas_finds_the_best(draw):
    """Compared with idxmin of the means by group; draws have edges above, below and none."""
    number = random.Random(draw)
    grid = [1e-4, 1e-3, 1e-2, 1e-1]
    runs = [
        run(seed, lr, head, number.uniform(1, 2), lora={"r": r})
        for head, r, lr, seed in itertools.product(("exclude", "lora"), (4, 8), grid, range(3))
    ]
    frame = pd.DataFrame(
        [
            {
                "head": one.config["head"]["policy"], "r": one.config["lora"]["r"],
                "lr": one.config["trainer"]["lr"], "id": one.run_id,
                "nll": one.metrics["validation"]["nll"].value,
            }
            for _, one in runs
        ]
    )  # fmt: skip
    means = frame.groupby(["head", "r", "lr"]).nll.mean()
    wanted: dict[float, set[str]] = {}
    for (head, r), of in means.groupby(level=["head", "r"]):
        best = of.idxmin()[2]
        if best in (grid[0], grid[-1]):
            mine = frame[(frame["head"] == head) & (frame.r == r) & (frame.lr == best)]
            wanted.setdefault(best, set()).update(mine.id)
    found = [one for one in lints(runs) if one.name == "lr-edge"]
    assert {frozenset(one.runs) for one in found} == {frozenset(of) for of in wanted.values()}
    for one in found:
        (best,) = (rate for rate, of in wanted.items() if of == set(one.runs))
        added = float(re.search(r"trainer\.lr=(\S+)", one.remedy)[1])
        assert added == pytest.approx(best * 10 if best == grid[-1] else best / 10)


def test_the_edge_says_where_and_a_rate_that_diverged_bounds_the_grid():
    values = {"exclude": valley, "lora": lambda lr: -lr}
    rates = (1e-4, 1e-3, 1e-2)
    runs = [run(s, lr, head, of(lr)) for head, of in values.items() for lr in rates for s in (0, 1)]
    found = only(runs, "lr-edge")
    assert "the largest that was tried, 0.01, for head=lora: a larger one" in found.text
    assert found.remedy == "extend the grid: add trainer.lr=0.1"
    diverged = run(0, 1e-1, "lora", None, status="stopped")
    assert "lr-edge" not in names([*runs, diverged])
    assert "lr-edge" in names([*runs, run(0, 1e-1, "exclude", None, status="stopped")])
    # A rate whose validation is not finite for one seed is not the best, however good the others.
    runs = [run(s, lr, validation=None if (s, lr) == (0, 1e-2) else -lr)
            for lr in (1e-4, 1e-3, 1e-2) for s in (0, 1)]  # fmt: skip
    assert "lr-edge" not in names(runs)


def test_one_rate_is_told_where_something_moves_the_best_one():
    runs = [run(seed, head=head) for head in ("exclude", "lora") for seed in (0, 1)]
    found = only(runs, "one-lr")
    assert "learning rate 0.001 alone was tried for all settings, and head may" in found.text
    assert "trainer.lr=0.0003,0.001,0.003" in found.remedy and "--select trainer.lr" in found.remedy
    # Only r=16 was not swept.
    mixed = [run(s, lr, validation=valley(lr)) for lr in (1e-4, 1e-3, 1e-2) for s in (0, 1)]
    mixed += [run(s, lora={"r": 16}) for s in (0, 1)]
    found = only(mixed, "one-lr")
    assert "r=16" in found.text and set(found.runs) == ids(mixed[-2:])
    # Other data, or what only moves rounding, are no reason to tune anew.
    for key, values in (("data", ({"a": 1}, {"a": 2})),):
        assert "one-lr" not in names([run(s, config={key: v}) for v in values for s in (0, 1)])
    threads = [run(s, trainer={"micro_batch_size": m}) for m in (1, 2) for s in (0, 1)]
    assert "one-lr" not in names(threads)


def test_selection_on_validation_answers_the_rate_and_the_scale():
    loras = [{"r": 16, "use_rslora": flag} for flag in (False, True)]
    runs = [run(s, lr, validation=valley(lr), lora=lora)
            for lora in loras for lr in (1e-4, 1e-3, 1e-2) for s in (0, 1)]  # fmt: skip
    assert names(runs) == ["rslora-beside-plain"]
    chosen = Chosen("lr", {}, "0.001", {}, 0.0, 2, {})
    assert names(runs, compare.Answers("nll", chosen=[chosen])) == []


# --- budgets ----------------------------------------------------------------------------------


def test_training_that_is_not_alike_is_found_unless_it_is_what_is_asked():
    budgets = {"exclude": (4, 1000), "lora": (8, 2000)}
    runs = [run(s, head=head, trainer={"steps": steps}, tokens=tokens)
            for head, (steps, tokens) in budgets.items() for s in (0, 1)]  # fmt: skip
    found = only(runs, "unequal-training")
    assert "differ in head" in found.text and "same trainer.steps" in found.remedy
    assert "trainer.steps 4 to 8" in found.text and "training tokens 1,000 to 2,000" in found.text
    crossed = [run(s, head=head, trainer={"steps": steps}, tokens=250 * steps)
               for head in budgets for steps in (4, 8) for s in (0, 1)]  # fmt: skip
    assert "unequal-training" not in names(crossed)


def test_tokens_are_compared_at_the_same_order_of_examples():
    """Seeds see other examples: their tokens differ, and that is no confound."""
    tokens = {0: 1000, 1: 1500}
    alike = [run(s, head=head, tokens=tokens[s]) for head in ("exclude", "lora") for s in (0, 1)]
    assert "unequal-training" not in names(alike)
    templates = [run(s, config={"data": {"chat_template": flag}}, tokens=tokens[s] + 400 * flag)
                 for flag in (False, True) for s in (0, 1)]  # fmt: skip
    found = only(templates, "unequal-training")
    assert (
        "training tokens 1,250 to 1,650" in found.text and "trainer.steps for each" in found.remedy
    )


def test_parameters_are_told_in_one_line_and_not_where_r_is_the_question():
    sizes = {("exclude", 4): 1000, ("lora", 4): 1500, ("exclude", 8): 2000, ("lora", 8): 3000}
    runs = [run(s, head=head, lora={"r": r}, parameters=size)
            for (head, r), size in sizes.items() for s in (0, 1)]  # fmt: skip
    found = only(runs, "unequal-parameters")
    assert "differ in head train up to 1.5 times" in found.text and "1,000 to 3,000" in found.text
    ranks = [run(s, lora={"r": r}, parameters=100 * r) for r in (4, 8) for s in (0, 1)]
    assert "unequal-parameters" not in names(ranks)
    sizes = {"exclude": 1000, "lora": 1080}
    close = [run(s, head=head, parameters=sizes[head]) for head in sizes for s in (0, 1)]
    assert "unequal-parameters" not in names(close)


def test_lints_are_read_without_torch():
    """`lorabench compare` would take seconds longer to start."""
    code = "import sys, lorabench.compare.lints; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
