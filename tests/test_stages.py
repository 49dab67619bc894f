"""Stages: what trains when, against stock PEFT and torch.optim with parameters frozen by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from equality import differences
from stock import TINY, Stock, copy_of, decayed, packed, tokens_of, train_pack
from torch import Tensor, nn

from lorabench import adapters, checkpoint, plan, stages
from lorabench import model as base_model
from lorabench.config import Config
from lorabench.pack import ModulePack, StackedPack
from lorabench.show import text
from lorabench.train import train

# Each once as a user writes it, and once by hand: from a step on, regular expressions over
# parameter names and their part of the learning rate. Layer 11 trains, rests and trains again.
BERT = [
    {"from_step": 0, "train": ["layer.11"]},
    {"from_step": 3, "train": ["layer.11.attention", "layer.11.output"]},
    {"from_step": 3, "train": ["layer.1"], "lr_scale": 0.5},
    {"from_step": 6, "train": ["layer.1"]},
    {"from_step": 9, "train": ["all"], "lr_scale": 0.25},
]
BERT_BY_HAND = {
    0: {r"\.11\.": 1.0},
    3: {r"\.11\.(attention|output)\.": 1.0, r"\.1\.": 0.5},
    6: {r"\.1\.": 1.0},
    9: {"": 0.25},
}
GEMMA = [  # the head alone in the middle: nothing below it has a gradient then
    {"from_step": 0, "train": ["layers.1"], "lr_scale": 2},
    {"from_step": 4, "train": ["lm_head"]},
    {"from_step": 8, "train": ["all"]},
]
GEMMA_BY_HAND = {0: {r"layers\.1\.": 2.0}, 4: {"lm_head": 1.0}, 8: {"": 1.0}}
GPT2 = [  # biases train with their module
    {"from_step": 0, "train": ["h.1"]},
    {"from_step": 6, "train": ["h.0"], "lr_scale": 0.5},
    {"from_step": 9, "train": ["all"]},
]
GPT2_BY_HAND = {0: {r"\.h\.1\.": 1.0}, 6: {r"\.h\.0\.": 0.5}, 9: {"": 1.0}}
DEEP = {"bert": "bert12"}  # for layers 1 and 11, whose names begin alike
BY_USER = {"bert": BERT, "gemma": GEMMA, "gpt2": GPT2}
BY_HAND = {"bert": BERT_BY_HAND, "gemma": GEMMA_BY_HAND, "gpt2": GPT2_BY_HAND}


def runs_of(kind: str, folder: Path, *common: str) -> list[Config]:
    """Runs of different r, targets, decay and seeds, under the same stages."""
    three = ["target_modules=custom", r"target_modules.names='.*[.](1|5|11)[.].*(query|dense)'"]
    own = {
        "bert": [
            [*three, "lora.r=4"],
            [*three, "lora.r=8", "lora.lora_dropout=0.1", "lora.bias=lora_only", "trainer.lr=3e-3"],
            [*three, "lora.r=2", "head=lora", "trainer.weight_decay=0.3"],
        ],
        "gpt2": [
            ["lora.r=4", "lora.bias=all", "target_modules=attention"],
            ["lora.r=6", "lora.bias=lora_only", "trainer.max_grad_norm=null"],
            ["lora.r=6", "lora.bias=all", "head=lora", "trainer.weight_decay=0.3"],
        ],
        "gemma": [
            ["lora.r=4", "head=full", "target_modules=attention"],
            ["lora.r=8", "head=lora", "lora.lora_dropout=0.1", "trainer.lr=3e-3"],
            ["lora.r=3", "head=full", "trainer.weight_decay=0.3", "trainer.max_grad_norm=0.1"],
        ],
    }[kind]
    found = [
        composed(
            *TINY, "model=local", f"model.path={folder}", "model.dtype=float64", *words, *common,
            "trainer.steps=12", "trainer.batch_size=3", f"seed={i}",
        )
        for i, words in enumerate(own)
    ]  # fmt: skip
    for one in found:
        one.stages = BY_USER[kind]
    return found


def alone(one: Config, planner: plan.Planner) -> ModulePack:
    base = base_model.load(one.model, "cpu")
    return ModulePack(base, one, planner.make(one).lora_modules, "cpu")


@pytest.fixture
def planner() -> plan.Planner:
    """Plans each run of a test once."""
    return plan.Planner()


@pytest.fixture
def make(
    tiny_folder: Callable[[str], Path], planner: plan.Planner
) -> Callable[..., tuple[ModulePack | StackedPack, list[Config]]]:
    def made(kind: str, pack: str, *common: str) -> tuple[ModulePack | StackedPack, list[Config]]:
        configs = runs_of(kind, tiny_folder(DEEP.get(kind, kind)), *common)
        if pack == "packed":
            return packed(configs, planner=planner), configs
        return alone(configs[2], planner), configs[2:]

    return made


def states(pack: ModulePack | StackedPack) -> list[dict[str, Tensor]]:
    return [copy_of(pack.adapter_state(run)) for run in range(pack.size)]


# --- against stock PEFT ----------------------------------------------------------------------


def train_by_hand(stock: Stock, table: dict[int, dict[str, float]]) -> list[float]:
    """A user's own loop: requires_grad and param groups by name, one AdamW over all of them."""
    from transformers import get_scheduler

    trainer, decay = stock.config.trainer, decayed(stock.wrapped)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p],
                "name": name,
                "weight_decay": trainer.weight_decay if id(p) in decay else 0.0,
            }
            for name, p in stock.parameters.items()
        ],
        betas=(trainer.beta1, trainer.beta2),
        eps=trainer.eps,
    )
    rate = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=trainer.lr)
    scheduler = get_scheduler(trainer.schedule, rate, trainer.warmup_steps, trainer.steps)
    losses = []
    for step in range(trainer.steps):
        now = table[max(first for first in table if first <= step)]
        for group in optimizer.param_groups:
            scale = [s for pattern, s in now.items() if re.search(pattern, group["name"])]
            group["params"][0].requires_grad = bool(scale)
            group["lr"] = scheduler.get_last_lr()[0] * (scale or [float("nan")])[0]
        losses.append(stock.loss(step))  # which sets every grad to None first
        limit = trainer.max_grad_norm or float("inf")
        nn.utils.clip_grad_norm_(stock.parameters.values(), limit)
        optimizer.step()
        rate.step()
        scheduler.step()
    return losses


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize("pack_kind", ["packed", "alone"])
@pytest.mark.parametrize("kind", ["bert", "gemma", "gpt2"])
def test_staged_training_equals_stock_peft_frozen_by_hand(
    kind: str, pack_kind: str, make: Callable[..., Any], planner: plan.Planner
) -> None:
    pack, configs = make(kind, pack_kind, "trainer.warmup_steps=1")
    initial = states(pack)
    stocks = (Stock(*pair, planner=planner) for pair in zip(configs, initial, strict=True))
    trained = ((stock, train_by_hand(stock, BY_HAND[kind])) for stock in stocks)
    loss, (weights, name) = differences(pack, initial, train_pack(pack), trained)
    # Float64 rounding (1e-16) of sums in another order, grown by twelve AdamW steps.
    assert loss < 1e-10
    assert weights < 1e-9, name


@pytest.mark.usefixtures("float64_inside")
def test_runs_of_different_stages_share_a_pack(
    make: Callable[..., Any], planner: plan.Planner, tiny_folder: Callable[[str], Path]
) -> None:
    """One is staged, one has other stages, one has none: each is stock PEFT's."""
    configs = runs_of("gemma", tiny_folder("gemma"))
    other = [{"from_step": 0, "train": ["lm_head", "layers.0"]}, {"from_step": 5, "train": ["all"]}]
    configs[1].stages, configs[2].stages = other, []
    tables = [GEMMA_BY_HAND, {0: {r"lm_head|layers\.0\.": 1.0}, 5: {"": 1.0}}, {0: {"": 1.0}}]
    pack = packed(configs, planner=planner)
    initial = states(pack)
    stocks = [Stock(*pair, planner=planner) for pair in zip(configs, initial, strict=True)]
    trained = ((s, train_by_hand(s, table)) for s, table in zip(stocks, tables, strict=True))
    tokens, pad_id = tokens_of(configs[0])
    steps, saved = [], []
    for step in train(pack, tokens, pad_id):
        steps.append(step)
        if step.step == 6:
            saved = [{n: t.clone() for n, t in pack.state(run).items()} for run in range(3)]
    losses = [list(of_run) for of_run in zip(*(step.loss for step in steps), strict=True)]
    loss, (weights, name) = differences(pack, initial, losses, trained)
    assert loss < 1e-10  # as above
    assert weights < 1e-9, name
    counts = [{int(t) for n, t in state.items() if n.endswith("|step")} for state in saved]
    # What rested has taken fewer steps; moments and counts continue as they were.
    assert counts == [{0, 2, 4}, {1, 6}, {6}]
    resumed = packed(configs, planner=planner)
    for run, state in enumerate(saved):
        resumed.load_state(run, state)
    assert list(train(resumed, tokens, pad_id, 6)) == steps[6:]
    hashes = [[adapters.state_hash(s) for s in states(one)] for one in (resumed, pack)]
    assert hashes[0] == hashes[1]


REWARMED = [  # what joins at 3 alone, then all again; the stage at 9 ends the latter's third step
    {"from_step": 0, "train": ["layer.11"]},
    {"from_step": 3, "train": ["layer.11"]},
    {"from_step": 3, "train": ["layer.1"], "lr_scale": 0.5, "rewarm_steps": 2},
    {"from_step": 6, "train": ["all"], "rewarm_steps": 4},
    {"from_step": 9, "train": ["layer.1", "layer.11", "layer.5"]},
]


def warmed_up(scale: float, steps: int) -> list[float]:
    """The first rates of transformers' warm-up to `scale`."""
    from transformers import get_constant_schedule_with_warmup

    rate = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=scale)
    scheduler, found = get_constant_schedule_with_warmup(rate, steps), []
    for _ in range(3):
        found += scheduler.get_last_lr()
        rate.step()
        scheduler.step()
    return found


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize("pack_kind", ["packed", "alone"])
def test_rewarming_is_a_warm_up_of_an_entrys_modules(
    pack_kind: str,
    make: Callable[..., Any],
    planner: plan.Planner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BY_USER, "bert", REWARMED)
    table = {0: {r"\.11\.": 1.0}, 9: {r"\.(1|5|11)\.": 1.0}}
    table |= {3 + i: {r"\.11\.": 1.0, r"\.1\.": x} for i, x in enumerate(warmed_up(0.5, 2))}
    table |= {6 + i: {"": x} for i, x in enumerate(warmed_up(1.0, 4))}
    pack, configs = make("bert", pack_kind, "head=exclude")
    initial = states(pack)
    stocks = (Stock(*pair, planner=planner) for pair in zip(configs, initial, strict=True))
    trained = ((stock, train_by_hand(stock, table)) for stock in stocks)
    loss, (weights, name) = differences(pack, initial, train_pack(pack), trained)
    # As above: float64 rounding, grown by twelve AdamW steps.
    assert loss < 1e-10
    assert weights < 1e-9, name


# --- frozen is frozen ------------------------------------------------------------------------


@pytest.mark.parametrize("pack_kind", ["packed", "alone"])
def test_frozen_modules_do_not_move_by_a_bit(pack_kind: str, make: Callable[..., Any]) -> None:
    """Decay and moments would move them: layer 11 has both when it is frozen at step 6."""
    pack, configs = make("bert", pack_kind, "trainer.weight_decay=0.3")
    tokens, pad_id = tokens_of(configs[0])
    before, table = states(pack), BERT_BY_HAND
    for step in train(pack, tokens, pad_id):
        done = step.step - 1
        assert (step.stages[0] is not None) == (done in table)
        patterns = table[max(first for first in table if first <= done)]
        after = states(pack)
        for run in range(pack.size):
            moved = {n for n, t in after[run].items() if not torch.equal(t, before[run][n])}
            assert moved == {n for n in after[run] if any(re.search(p, n) for p in patterns)}
        before = after


@pytest.mark.parametrize("pack_kind", ["packed", "alone"])
def test_a_staged_and_an_unstaged_run_begin_with_the_same_weights(
    pack_kind: str, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {}
    for name in ("staged", "unstaged"):
        monkeypatch.setitem(BY_USER, "bert", BERT if name == "staged" else [])
        pack, configs = make("bert", pack_kind)
        hashes = [adapters.state_hash(state) for state in states(pack)]
        tokens, pad_id = tokens_of(configs[0])
        first[name] = hashes, next(train(pack, tokens, pad_id)).loss
        assert bool(configs[0].stages) == (name == "staged")
    assert first["staged"] == first["unstaged"]


def test_a_thawed_base_weight_is_caught(make: Callable[..., Any]) -> None:
    for pack_kind in ("packed", "alone"):
        pack, configs = make("bert", pack_kind)
        pack.tree.get_parameter("bert.encoder.layer.1.attention.self.key.weight").requires_grad_()
        with pytest.raises(AssertionError, match=r"key\.weight"):
            next(train(pack, *tokens_of(configs[0])))


def test_frozen_layers_below_run_no_backward(make: Callable[..., Any]) -> None:
    pack, configs = make("bert", "packed")
    asked: dict[int, set[bool]] = {}
    for index, layer in enumerate(pack.tree.bert.encoder.layer):
        layer.register_forward_hook(
            lambda m, args, out, index=index: asked.setdefault(index, set()).add(
                (out[0] if isinstance(out, tuple) else out).requires_grad
            )
        )
    steps = train(pack, *tokens_of(configs[0]))
    next(steps)
    assert asked == {index: {index == 11} for index in range(12)}


# --- resume ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pack_kind", ["packed", "alone"])
@pytest.mark.parametrize("entries", [BERT, REWARMED], ids=["plain", "rewarmed"])
def test_resumed_across_a_change_is_bitwise_the_uninterrupted_run(
    entries: list[Any],
    pack_kind: str,
    make: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BY_USER, "bert", entries)
    common = ["head=exclude"] if entries is REWARMED else []
    whole, configs = make("bert", pack_kind, *common)
    tokens, pad_id = tokens_of(configs[0])
    stops = [2, 3, 8]  # before a change, at one, with some at rest or re-warming
    steps = []
    for step in train(whole, tokens, pad_id):
        steps.append(step)
        for run in range(whole.size) if step.step in stops else ():
            folder = tmp_path / f"{step.step}-{run}"
            checkpoint.write(folder, whole.state(run), step.step, {})
            checkpoint.commit(folder)
    expected = [adapters.state_hash(state) for state in states(whole)]
    for stop in stops:
        resumed, _ = make("bert", pack_kind, *common)
        for run in range(resumed.size):
            resumed.load_state(run, checkpoint.load(tmp_path / f"{stop}-{run}", stop, {}))
        assert list(train(resumed, tokens, pad_id, stop)) == steps[stop:]
        assert [adapters.state_hash(state) for state in states(resumed)] == expected


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module", "is_match"),
    [
        ("layer.1", "bert.encoder.layer.1.attention.self.query", True),
        ("layer.1", "bert.encoder.layer.11.attention.self.query", False),
        ("layer.11", "bert.encoder.layer.11.attention.self.query", True),
        ("layer.1", "bert.encoder.mylayer.1.output", False),
        ("1", "h.1.mlp", True),
        ("1", "h.11.mlp", False),
        ("layer.query", "layer.1.query", False),
        ("lm_head", "lm_head", True),
        ("l.m", "l_m", False),  # a dot is a dot
        ("all", "anything", True),
    ],
)
def test_names_match_whole_parts_side_by_side(name: str, module: str, is_match: bool) -> None:
    assert stages.matches(name, module) == is_match


@pytest.mark.parametrize("kind", ["bert", "gemma", "gpt2"])
def test_trained_modules_are_the_owners_of_pefts_parameters(
    kind: str, tiny_folder: Callable[[str], Path], planner: plan.Planner
) -> None:
    """Plan, packed and alone agree on what a run trains, biases and copies of the head included."""
    configs = runs_of(kind, tiny_folder(DEEP.get(kind, kind)))
    pack = packed(configs, planner=planner)
    skeleton, known = planner.skeleton(configs[0].model), planner.wrapped(configs[0].model)
    for run, one in enumerate(configs):
        modules = pack.modules(run)
        assert modules == alone(one, planner).modules(0)
        assert modules == planner._resolve(one, skeleton, known).trained
        tree = dict(pack.tree.named_modules())
        assert set(planner.make(one).lora_modules) <= set(modules) <= set(tree)
    extra = {"gemma": "lm_head", "gpt2": "transformer.h.0.ln_1", "bert": None}[kind]
    assert extra is None or extra in set(pack.modules(0)) - set(
        planner.make(configs[0]).lora_modules
    )


def test_a_table_tells_stages_apart_in_a_line() -> None:
    assert text.setting(REWARMED[2:3]) == "from step 3 layer.1 at 0.5 lr re-warmed over 2 steps"
    assert text.setting(BERT[:3]) == (
        "from step 0 layer.11; from step 3 layer.11.attention, layer.11.output + layer.1 at 0.5 lr"
    )
