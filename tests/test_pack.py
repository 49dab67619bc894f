"""Packed = solo: packs of several runs against stock PEFT, autograd and torch.optim.

The reference is in stock.py, never another pack. BERT is a decoder here; test_classify.py has the
encoder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from equality import compare_gradients, compare_training
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stock import TINY, mixture, packed, train_pack

from lorabench import adapters, plan
from lorabench.config import Config

KINDS = ["gemma", "llama", "qwen2", "gpt2", "bert"]
MORE_KINDS = ["gemma2", "gemma3", "opt"]  # masks a layer, soft-capping, another body; slow

# Without dropout the batch is shared; one such case stays in the quick suite.
CASES = [
    pytest.param(kind, dropout, marks=[] if dropout or kind == "gpt2" else pytest.mark.slow)
    for kind in KINDS
    for dropout in (0.0, 0.1)
]
CASES += [
    pytest.param(kind, dropout, marks=pytest.mark.slow)
    for kind in MORE_KINDS
    for dropout in (0.0, 0.1)
]


# --- training and gradients ------------------------------------------------------------------


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize(("kind", "dropout"), CASES)
def test_fifty_float64_steps_equal_stock_peft(
    kind: str, dropout: float, tiny_folder: Callable[[str], Path]
) -> None:
    common = ["model.dtype=float64", "trainer.steps=50", "trainer.batch_size=3"]
    loss, (weights, name) = compare_training(mixture(kind, tiny_folder(kind), dropout, *common))
    # Float64 rounding (1e-16) of sums in another order, grown by 50 AdamW steps.
    assert loss < 1e-10
    assert weights < 1e-9, name


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [
        pytest.param(
            kind,
            dropout,
            marks=[] if (kind, dropout) in (("gemma", 0.1), ("gpt2", 0.0)) else pytest.mark.slow,
        )
        for kind in KINDS
        for dropout in (0.0, 0.1)
    ],
)
def test_twelve_float32_steps_equal_stock_peft(
    kind: str, dropout: float, tiny_folder: Callable[[str], Path]
) -> None:
    configs = mixture(kind, tiny_folder(kind), dropout, "trainer.steps=12")
    loss, (weights, name) = compare_training(configs)
    # Float32 rounding (6e-8) of GEMMs of other shapes; AdamW divides small gradients by their own
    # size, which turns rounding into steps.
    assert weights < 1e-4, name
    assert loss < 1e-4


@pytest.mark.parametrize(("kind", "dropout"), CASES)
def test_float32_gradients_equal_stock_peft(
    kind: str, dropout: float, tiny_folder: Callable[[str], Path]
) -> None:
    configs = mixture(kind, tiny_folder(kind), dropout, "trainer.steps=51")
    worst, name = compare_gradients(configs, [0, 10, 50])
    # The bound: a few hundred float32 roundings (6e-8) behind one another.
    assert worst <= 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_gradients_equal_stock_peft_at_step_200(
    kind: str, dropout: float, tiny_folder: Callable[[str], Path]
) -> None:
    configs = mixture(kind, tiny_folder(kind), dropout, "trainer.steps=201")
    worst, name = compare_gradients(configs, [0, 10, 50, 200])
    assert worst <= 1e-5, name


# --- mates -----------------------------------------------------------------------------------


def mates(*differences: list[str], head: str, shared: bool) -> list[Config]:
    """Runs of one shape; the first is the one looked at."""
    common = [
        *TINY,
        "trainer.steps=6",
        "trainer.batch_size=3",
        "lora.r=8",
        f"head={head}",
        "lora.lora_dropout=0.1",
        "trainer.warmup_steps=0",
    ]
    return [
        composed(*common, *words, *(["seeds.data=0"] if shared else []))
        for words in ([], *differences)
    ]


@pytest.mark.parametrize(
    ("head", "shared"),
    [
        ("lora", False),
        ("full", True),
        pytest.param("lora", True, marks=pytest.mark.slow),
        pytest.param("full", False, marks=pytest.mark.slow),
    ],
)
def test_mates_and_slots_do_not_change_a_bit(head: str, shared: bool) -> None:
    plainly = mates(["seed=1"], ["seed=2"], head=head, shared=shared)
    others = mates(
        ["seed=7", "lora.lora_alpha=3", "trainer.lr=5e-2", "lora.lora_dropout=0.4"],
        ["seed=8", "trainer.weight_decay=0.3", "trainer.schedule=cosine"],
        head=head,
        shared=shared,
    )
    broken = mates(["seed=1", "trainer.lr=1e30"], ["seed=2"], head=head, shared=shared)
    first, *rest = plainly
    planner = plan.Planner()

    def hash_and_losses(configs: list[Config], slot: int) -> tuple[str, list[float]]:
        pack = packed(configs, planner=planner)
        losses = train_pack(pack)
        if configs is broken:
            assert pack.alive == [True, False, True]
            assert not all(map(torch.isfinite, torch.tensor(losses[1])))
        return adapters.state_hash(pack.adapter_state(slot)), losses[slot]

    expected = hash_and_losses(plainly, 0)
    assert hash_and_losses(others, 0) == expected
    assert hash_and_losses(broken, 0) == expected
    assert hash_and_losses([rest[0], rest[1], first], 2) == expected


@pytest.mark.parametrize("words", [["trainer.dtype=bfloat16"], ["lora.r=512"]])
def test_a_mates_dropout_does_not_change_a_bit(words: list[str]) -> None:
    """A run without dropout, beside one without and one with: two ways through a layer."""

    def trained(dropout: float) -> str:
        pack = packed(
            [
                composed(*TINY, "trainer.steps=3", "trainer.warmup_steps=0", *words, *own)
                for own in ([], ["seed=1", f"lora.lora_dropout={dropout}"])
            ]
        )
        train_pack(pack)
        return adapters.state_hash(pack.adapter_state(0))

    assert trained(0) == trained(0.1)


# --- any mixture -----------------------------------------------------------------------------

TARGETS = ["all-linear", "attention", "mlp", "auto"]
runs = st.fixed_dictionaries(
    {
        "r": st.integers(1, 9),
        "alpha": st.floats(0.5, 64),
        "targets": st.sampled_from(TARGETS),
        "head": st.sampled_from(["exclude", "lora", "full"]),
        "lr": st.floats(1e-5, 1e-2),
        "seed": st.integers(0, 2),
        "rslora": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.2]),
    }
)


@pytest.mark.usefixtures("float64_inside")
@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(drawn=st.lists(runs, min_size=2, max_size=5), kind=st.sampled_from(["llama", "gemma"]))
def test_any_mixture_equals_stock_peft(
    drawn: list[dict[str, Any]], kind: str, tiny_folder: Callable[[str], Path]
) -> None:
    common = ["model.dtype=float64", "trainer.steps=3"]
    start = composed(*TINY, *common, "model=local", f"model.path={tiny_folder(kind)}")
    configs = []
    for one in drawn:
        config = copy.deepcopy(start)
        config.lora.r, config.lora.lora_alpha = one["r"], one["alpha"]
        config.lora.use_rslora, config.lora.lora_dropout = one["rslora"], one["dropout"]
        config.target_modules.select = one["targets"]
        config.head.policy = one["head"]
        config.trainer.lr = one["lr"]
        config.seeds.init = config.seeds.data = config.seeds.dropout = one["seed"]
        configs.append(config)
    loss, (weights, name) = compare_training(configs)
    assert loss < 1e-12 and weights < 1e-9, name  # float64 sums in another order
