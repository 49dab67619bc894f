"""LoRA+ against stock PEFT's create_loraplus_optimizer with torch.optim.AdamW."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import composed
from equality import compare_training, differences
from stock import TINY, Stock, copy_of, mixture, packed, tokens_of, train_pack
from torch import nn

from lorabench import adapters, plan
from lorabench import model as base_model
from lorabench.config import Config
from lorabench.pack import ModulePack, StackedPack
from lorabench.train import learning_rate, train

DOUBLE = ["model.dtype=float64", "trainer.steps=12", "trainer.batch_size=3"]


def alone(config: Config) -> ModulePack:
    base = base_model.load(config.model, "cpu")
    return ModulePack(base, config, plan.make(config).lora_modules, "cpu")


# --- against stock PEFT ----------------------------------------------------------------------


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize("kind", ["gpt2", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_runs_of_other_ratios_in_a_pack_equal_pefts_loraplus(
    kind: str, tiny_folder: Callable[[str], Path]
) -> None:
    """Adapters, biases and a copy of the head; weight decay, warm-up, schedules and clipping."""
    _, *configs = mixture(kind, tiny_folder(kind), 0.1, *DOUBLE)
    for config, ratio in zip(configs, [None, 16, 0.5], strict=True):
        config.lora.loraplus_lr_ratio = ratio
    assert [(c.head.policy, c.lora.bias) for c in configs if c.lora.loraplus_lr_ratio] == [
        ("full", "lora_only" if kind == "gpt2" else "none"),
        ("lora", "all"),
    ]
    loss, (weights, name) = compare_training(configs)
    # Float64 rounding (1e-16) of sums in another order, grown by twelve AdamW steps.
    assert loss < 1e-10
    assert weights < 1e-9, name


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize(
    "words",
    [
        ["head=full", "target_modules=attention"],
        ["lora.use_dora=true", "target_modules=attention"],  # magnitudes have one dimension
        ["target_modules=custom", "target_modules.names=[embed_tokens,q_proj]"],
    ],
    ids=["head=full", "DoRA", "embeddings"],
)
def test_a_run_alone_equals_pefts_loraplus(
    words: list[str], tiny_folder: Callable[[str], Path]
) -> None:
    config = composed(
        *TINY, *DOUBLE, *words, "model=local", f"model.path={tiny_folder('gemma')}", "lora.r=4",
        "lora.loraplus_lr_ratio=8", "trainer.weight_decay=0.2",
    )  # fmt: skip
    pack = alone(config)
    initial = copy_of(pack.adapter_state(0))
    losses = train_pack(pack)
    stock = Stock(config, initial)
    loss, (weights, name) = differences(pack, [initial], losses, [(stock, stock.train())])
    # Float64 rounding (1e-16) of sums in another order, grown by twelve AdamW steps.
    assert loss < 1e-10
    assert weights < 1e-9, name


# --- stages, resume, mates -------------------------------------------------------------------

STAGES = [
    {"from_step": 0, "train": ["layers.1"], "lr_scale": 0.5},
    {"from_step": 6, "train": ["all"], "lr_scale": 2.0},
]


def make(kind: str, folder: Path, *common: str) -> tuple[StackedPack | ModulePack, list[Config]]:
    """A pack of two ratios, or the second run alone, under STAGES."""
    configs = [
        composed(
            *TINY, "model=local", f"model.path={folder}", "trainer.batch_size=3",
            "trainer.steps=12", "lora.r=4", "trainer.weight_decay=0.1", *words, *common,
        )
        for words in (["head=lora"], ["lora.loraplus_lr_ratio=16", "head=full", "seed=1"])
    ]  # fmt: skip
    for config in configs:
        config.stages = STAGES
    return (packed(configs), configs) if kind == "packed" else (alone(configs[1]), configs[1:])


def train_by_hand(stock: Stock) -> list[float]:
    """Freeze parameters and scale the groups that PEFT's LoRA+ formed, step by step."""
    trainer, optimizer, losses = stock.config.trainer, stock.optimizer(), []
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(trainer.steps):
        for name, parameter in stock.parameters.items():
            parameter.requires_grad = step >= 6 or re.search(r"layers\.1\.", name) is not None
        part = learning_rate(trainer, step) / trainer.lr * (2.0 if step >= 6 else 0.5)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * part
        losses.append(stock.loss(step))
        assert trainer.max_grad_norm is not None
        nn.utils.clip_grad_norm_(stock.parameters.values(), trainer.max_grad_norm)
        optimizer.step()
    return losses


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize("kind", ["packed", "alone"])
def test_a_stages_rate_multiplies_both(kind: str, tiny_folder: Callable[[str], Path]) -> None:
    pack, configs = make(kind, tiny_folder("llama"), "model.dtype=float64")
    initial = [copy_of(pack.adapter_state(run)) for run in range(pack.size)]
    losses = train_pack(pack)
    stocks = [Stock(*pair) for pair in zip(configs, initial, strict=True)]
    trained = [(stock, train_by_hand(stock)) for stock in stocks]
    loss, (weights, name) = differences(pack, initial, losses, trained)
    # Float64 rounding (1e-16) of sums in another order, grown by twelve AdamW steps.
    assert loss < 1e-10
    assert weights < 1e-9, name


@pytest.mark.parametrize("kind", ["packed", "alone"])
def test_a_resumed_run_ends_with_the_same_bits(
    kind: str, tiny_folder: Callable[[str], Path]
) -> None:
    whole, configs = make(kind, tiny_folder("llama"))
    tokens, pad_id = tokens_of(configs[0])
    kept = []
    for step in train(whole, tokens, pad_id):
        if step.step == 8:
            kept = [copy_of(whole.state(run)) for run in range(whole.size)]
    resumed, _ = make(kind, tiny_folder("llama"))
    for run, state in enumerate(kept):
        resumed.load_state(run, state)
    assert len(list(train(resumed, tokens, pad_id, 8))) == 4
    for run in range(whole.size):
        ends = [adapters.state_hash(pack.adapter_state(run)) for pack in (whole, resumed)]
        assert ends[0] == ends[1]


def test_a_mates_ratio_does_not_change_a_bit() -> None:
    def trained(ratio: str) -> list[str]:
        words = [
            "trainer.steps=3",
            "trainer.warmup_steps=0",
            "target_modules=attention",
            "lora.r=6",
        ]
        mate = ["seed=1", f"lora.loraplus_lr_ratio={ratio}"]
        pack = packed([composed(*TINY, *words, *own) for own in ([], mate)])
        train_pack(pack)
        return [adapters.state_hash(pack.adapter_state(run)) for run in range(2)]

    without, with_ratio = trained("null"), trained("16")
    assert without[0] == with_ratio[0] and without[1] != with_ratio[1]


# --- the run id and the plan -----------------------------------------------------------------


def test_the_run_id_follows_the_ratio_and_not_its_spelling() -> None:
    planner = plan.Planner()

    def run_id(*words: str) -> str:
        return planner.make(composed("tracker=none", *words)).run_id

    ratio = "lora.loraplus_lr_ratio="
    assert run_id() == run_id(f"{ratio}null")
    assert run_id(f"{ratio}16") == run_id(f"{ratio}16.0")
    assert len({run_id(), run_id(f"{ratio}16"), run_id(f"{ratio}4")}) == 3


def test_a_plan_says_that_embeddings_have_a_rate_of_their_own() -> None:
    words = ["target_modules=custom", "target_modules.names=[embed_tokens,q_proj]"]
    made = [
        plan.make(composed("tracker=none", *words, f"lora.loraplus_lr_ratio={ratio}"))
        for ratio in ("null", 16)
    ]
    notes = [[w for w in one.warnings if "loraplus" in w] for one in made]
    assert notes[0] == []
    (note,) = notes[1]
    assert "model.embed_tokens trains at lr 1e-06" in note
