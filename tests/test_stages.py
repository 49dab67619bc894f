"""Stages: what trains when, against stock PEFT and torch.optim with parameters frozen by hand."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed, tiny_config
from test_pack import Stock, copy_of, float64_inside, packed, relative, tokens_of
from torch import Tensor, nn

from lorabench import adapters, checkpoint, cli, config, plan, show, stages
from lorabench import model as base_model
from lorabench.config import Config, ConfigErrors
from lorabench.pack import ModulePack, StackedPack
from lorabench.train import train

__all__ = ["float64_inside"]  # a fixture

TINY = ["tracker=none", "data.num_train=64", "data.num_validation=8", "data.num_test=8"]

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
BY_USER = {"bert": BERT, "gemma": GEMMA, "gpt2": GPT2}
BY_HAND = {"bert": BERT_BY_HAND, "gemma": GEMMA_BY_HAND, "gpt2": GPT2_BY_HAND}


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of twelve layers, as a decoder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "bert12"
    tokenizer = AutoTokenizer.from_pretrained(base_model.ZOO / "tiny-gemma")
    architecture = tiny_config("bert", len(tokenizer))
    architecture.num_hidden_layers = 12
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(architecture).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
            "trainer.steps=12", f"seed={i}",
        )
        for i, words in enumerate(own)
    ]  # fmt: skip
    for one in found:
        one.stages = BY_USER[kind]
    return found


def alone(one: Config) -> ModulePack:
    base = base_model.load(one.model, "cpu")
    return ModulePack(base, one, plan.make(one).lora_modules, "cpu")


@pytest.fixture
def make(
    bert_folder: Path, tiny_folder: Callable[[str], Path]
) -> Callable[..., tuple[ModulePack | StackedPack, list[Config]]]:
    def made(kind: str, pack: str, *common: str) -> tuple[ModulePack | StackedPack, list[Config]]:
        folder = bert_folder if kind == "bert" else tiny_folder(kind)
        configs = runs_of(kind, folder, *common)
        return (packed(configs), configs) if pack == "packed" else (alone(configs[2]), configs[2:])

    return made


def states(pack: ModulePack | StackedPack) -> list[dict[str, Tensor]]:
    return [copy_of(pack.adapter_state(run)) for run in range(pack.size)]


# --- against stock PEFT ----------------------------------------------------------------------


def train_by_hand(stock: Stock, table: dict[int, dict[str, float]]) -> list[float]:
    """A user's own loop: requires_grad and param groups by name, one AdamW over all of them."""
    from transformers import get_scheduler

    trainer = stock.config.trainer
    optimizer = torch.optim.AdamW(
        [{"params": [p], "name": name} for name, p in stock.parameters.items()],
        betas=(trainer.beta1, trainer.beta2),
        eps=trainer.eps,
        weight_decay=trainer.weight_decay,
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
    kind: str, pack_kind: str, make: Callable[..., Any]
) -> None:
    pack, configs = make(kind, pack_kind, "trainer.warmup_steps=1")
    initial = states(pack)
    tokens, pad_id = tokens_of(configs[0])
    losses = list(zip(*(step.loss for step in train(pack, tokens, pad_id)), strict=True))
    for run, one in enumerate(configs):
        stock = Stock(one, copy_of(initial[run]))
        expected = train_by_hand(stock, BY_HAND[kind])
        # Float64 rounding (1e-16) of sums in another order, grown by twelve AdamW steps.
        assert losses[run] == pytest.approx(expected, rel=0, abs=1e-10)
        mine, theirs = pack.adapter_state(run), stock.state()
        assert set(mine) == set(theirs)
        for name, tensor in mine.items():
            assert not torch.equal(tensor, initial[run][name]), f"run {run}: {name} did not train"
            assert relative(tensor, theirs[name]) < 1e-9, f"run {run}: {name}"


# --- frozen is frozen ------------------------------------------------------------------------


@pytest.mark.parametrize("pack_kind", ["packed", "alone"])
def test_frozen_modules_do_not_move_by_a_bit(pack_kind: str, make: Callable[..., Any]) -> None:
    """Decay and moments would move them: layer 11 has both when it is frozen at step 6."""
    pack, configs = make("bert", pack_kind, "trainer.weight_decay=0.3")
    tokens, pad_id = tokens_of(configs[0])
    before, table = states(pack), BERT_BY_HAND
    for step in train(pack, tokens, pad_id):
        done = step.step - 1
        assert (step.stage is not None) == (done in table)
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


@pytest.mark.parametrize("pack_kind", ["packed", "alone"])
def test_resumed_across_a_change_is_bitwise_the_uninterrupted_run(
    pack_kind: str, make: Callable[..., Any], tmp_path: Path
) -> None:
    whole, configs = make("bert", pack_kind)
    tokens, pad_id = tokens_of(configs[0])
    stops = [2, 3, 8]  # before a change, at one, with some at rest
    steps = []
    for step in train(whole, tokens, pad_id):
        steps.append(step)
        for run in range(whole.size) if step.step in stops else ():
            folder = tmp_path / f"{step.step}-{run}"
            checkpoint.write(folder, whole.state(run), step.step, {})
            checkpoint.commit(folder)
    expected = [adapters.state_hash(state) for state in states(whole)]
    for stop in stops:
        resumed, _ = make("bert", pack_kind)
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
    kind: str, bert_folder: Path, tiny_folder: Callable[[str], Path]
) -> None:
    """Plan, packed and alone agree on what a run trains, biases and copies of the head included."""
    configs = runs_of(kind, bert_folder if kind == "bert" else tiny_folder(kind))
    pack = packed(configs)
    for run, one in enumerate(configs):
        modules = pack.modules(run)
        assert (
            modules == alone(one).modules(0) == plan._resolve(one, plan.skeleton(one.model)).trained
        )
        tree = dict(pack.tree.named_modules())
        assert set(plan.make(one).lora_modules) <= set(modules) <= set(tree)
    extra = {"gemma": "lm_head", "gpt2": "transformer.h.0.ln_1", "bert": None}[kind]
    assert extra is None or extra in set(pack.modules(0)) - set(plan.make(configs[0]).lora_modules)


# --- refusals --------------------------------------------------------------------------------

OUT_OF_RANGE = [  # stages, how the errors begin, what the first must also hold
    ("[late]", ["stages[0]: must be a mapping"], "'late'"),
    ("[{from_step: 1, train: [all]}]", ["stages[0].from_step: must be 0"], "got 1"),
    ("[{train: [all]}]", ["stages[0].from_step: must be 0"], "got None"),
    ("[{from_step: true, train: [all]}]", ["stages[0].from_step: must be 0"], "got True"),
    ("[{from_step: 0}]", ["stages[0].train: must be a list"], "[layer.11]"),
    ("[{from_step: 0, train: []}]", ["stages[0].train: must be a list"], "at least one"),
    ("[{from_step: 0, train: layer.1}]", ["stages[0].train: must be a list"], "'layer.1'"),
    ("[{from_step: 0, train: [11]}]", ["stages[0].train: must be a list"], "[11]"),
    (
        "[{from_step: 0, train: [all], lr_scale: 0}]",
        ["stages[0].lr_scale: must be above 0"],
        "got 0",
    ),
    (
        "[{from_step: 0, train: [all], lr_scale: .inf}]",
        ["stages[0].lr_scale: must be above 0"],
        "got inf",
    ),
    (
        "[{from_step: 0, train: [all], lrscale: 1}]",
        ["stages[0].lrscale: no such key"],
        "(did you mean 'lr_scale'?)",
    ),
    (
        "[{from_step: 0, train: [a]}, {from_step: 9, train: [b]}, {from_step: 8, train: [c]}]",
        ["stages[2].from_step: must be a whole number, at least 9"],
        "got 8",
    ),
    (
        "[{from_step: 0, train: [a]}, {from_step: 300, train: [b], lr_scale: -1}]",
        [
            "stages[1].from_step: must be below trainer.steps=300",
            "stages[1].lr_scale: must be above 0",
        ],
        "below trainer.steps=300",
    ),
]


@pytest.mark.parametrize(("value", "begins", "holds"), OUT_OF_RANGE)
def test_stages_out_of_range_are_refused_on_the_command_line(
    value: str,
    begins: list[str],
    holds: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a model was read before the errors were shown")

    for module, name in ((base_model, "skeleton"), (base_model, "load"), (plan, "skeleton")):
        monkeypatch.setattr(module, name, refuse)
    arguments = [f"stages={written(tmp_path, value)}", f"hydra.searchpath=[file://{tmp_path}]"]
    assert cli.main(["train", "tracker=none", f"output_dir={tmp_path / 'out'}", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[: len(law)] for line, law in zip(lines, begins, strict=True)] == begins
    assert holds in lines[0]
    assert not (tmp_path / "out").exists()


def written(folder: Path, value: str) -> str:
    """The name of a file of the group `stages`."""
    (folder / "stages").mkdir(exist_ok=True)
    (folder / "stages" / "mine.yaml").write_text(f"# @package _global_\nstages: {value}\n")
    return "mine"


def entry(step: int, *names: str) -> dict[str, Any]:
    return {"from_step": step, "train": list(names)}


@pytest.mark.parametrize(
    ("entries", "holds"),
    [
        (
            [entry(0, "layers.4", "all")],
            ["stages[0].train: every name", "unmatched: 'layers.4'; nearest: layers.3"],
        ),
        ([entry(0, "layer"), entry(1, "all")], ["unmatched: 'layer'", "nearest: layers"]),
        (
            [entry(0, "all"), entry(5, "layers.1"), entry(5, "layers.0", "layers.1.mlp")],
            [
                "stages[2].train: a module must be in one entry of from_step=5; "
                "model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj and 1 more are already "
                "in stages[1]"
            ],
        ),
        (
            [entry(0, "layers.0", "layers.1"), entry(7, "layers.3")],
            [
                "stages: every trained module must train in some stage; "
                "model.layers.2.self_attn.q_proj, model.layers.2.self_attn.k_proj and 6 more are "
                "in none"
            ],
        ),
        ([entry(0, *(f"layers.{i}" for i in range(4)))], ["lm_head is in none"]),
    ],
)
def test_names_that_do_not_fit_the_model_are_refused_before_weights_load(
    entries: list[dict[str, Any]], holds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(base_model, "load", refuse)
    for head in ("lora", "full"):
        wrong = composed("tracker=none", f"head={head}")
        wrong.stages = entries
        assert config.range_errors(wrong) == []
        with pytest.raises(ConfigErrors) as refused:
            plan.make(wrong)
        (error,) = refused.value.errors
        assert all(text in error for text in holds), error


def test_every_run_of_a_sweep_is_checked_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = written(tmp_path, "[{from_step: 0, train: [lm_head]}, {from_step: 1, train: [all]}]")
    sweep = [f"stages={name}", f"hydra.searchpath=[file://{tmp_path}]", "head=exclude,lora"]
    assert cli.main(["plan", "-m", "tracker=none", *sweep]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "unmatched: 'lm_head'" in line and line.endswith("[head=exclude]")


def test_a_list_on_the_command_line_is_told_where_it_belongs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for verb in ("plan", "train"):
        assert cli.main([verb, "tracker=none", "stages=[{from_step: 0, train: [all]}]"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("stages: must name a file of its group (") and "searchpath" in line


def test_the_run_id_follows_the_stages_and_not_their_spelling() -> None:
    plain, spelt, other = (composed("tracker=none") for _ in range(3))
    plain.stages = [entry(0, "all")]
    spelt.stages = [entry(0, "all") | {"lr_scale": 1}]
    other.stages = [entry(0, "all") | {"lr_scale": 0.5}]
    assert plan.run_id(plain) == plan.run_id(spelt)
    assert len({plan.run_id(one) for one in (plain, other, composed("tracker=none"))}) == 3


# --- the command line ------------------------------------------------------------------------


def test_the_experiment_plans_both_ways_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-m", "experiment=bert_stages", "tracker=none"]
    assert cli.main(["plan", "--json", *arguments]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert sorted(len(pack) for pack in planned["packs"]) == [2, 2]  # never one with the other
    layers = {m.split(".")[3] for run in planned["runs"] for m in run["lora_modules"]}
    assert layers == {"1", "11"}
    assert cli.main(["plan", *arguments]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.startswith("stages")] == [
        "stages    from step 0 layer.11, classifier; "
        "from step 100 layer.11, classifier + layer.1 at 0.5 lr"
    ]


SHORT = (
    "[{from_step: 0, train: [layer.11]}, {from_step: 3, train: [layer.11]}, "
    "{from_step: 3, train: [layer.1], lr_scale: 0.5}]"
)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/*/record.json")}


@pytest.mark.parametrize("dora", [False, True])  # packed and alone
def test_a_killed_sweep_ends_with_the_same_bits_and_the_whole_history(
    dora: bool, bert_folder: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorabench.progress import Display

    command = [
        "train", "-m", "experiment=bert_stages", f"stages={written(tmp_path, SHORT)}",
        f"hydra.searchpath=[file://{tmp_path}]", "model=local", f"model.path={bert_folder}",
        "task=causal_lm", "head=exclude",
        "data=jsonl", f"data.train.path={jsonl}", "data.max_length=64", "tracker=none",
        "trainer.steps=6", "trainer.lr=1e-2", "lora.r=4", f"lora.use_dora={dora}",
        "trainer.num_threads=1",
    ]  # fmt: skip
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert cli.main([*command, f"output_dir={whole}"]) == 0

    def kill(self: Any, step: int, *rest: Any) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Display, "step", kill)
    assert cli.main([*command, f"output_dir={killed}"]) == 130
    monkeypatch.undo()
    saved = next(iter(killed.glob("*/*/checkpoint/checkpoint.json")))
    assert json.loads(saved.read_text())["fingerprint"]["config"]["stages"][2]["lr_scale"] == 0.5
    assert cli.main([*command, f"output_dir={killed}"]) == 0
    found, expected = records(killed), records(whole)
    assert len(found) == 2 and set(found) == set(expected)
    for run_id, one in found.items():
        assert one["status"] == "finished"
        assert one["plan"]["pack"]["size"] == (1 if dora else 2)
        for key in ("hashes", "metrics", "stages"):
            assert one[key] == expected[run_id][key], key
        by_layer = {
            index: [m for m in one["plan"]["lora_modules"] if m.split(".")[3] == index]
            for index in ("1", "11")
        }
        assert [len(modules) for modules in by_layer.values()] == [6, 6]
        # linear from 1e-2 over 6 steps: half of it is left at step 3
        assert one["stages"] == [
            {"step": 0, "modules": by_layer["11"], "lr_scale": 1.0, "lr": 1e-2},
            {"step": 3, "modules": by_layer["11"], "lr_scale": 1.0, "lr": 5e-3},
            {"step": 3, "modules": by_layer["1"], "lr_scale": 0.5, "lr": 2.5e-3},
        ]


def test_a_table_tells_stages_apart_in_a_line() -> None:
    assert show._value(BERT[:3]) == (
        "from step 0 layer.11; from step 3 layer.11.attention, layer.11.output + layer.1 at 0.5 lr"
    )


def test_an_unstaged_run_has_a_history_of_one_entry(tmp_path: Path) -> None:
    small = [*TINY, "trainer=smoke", "trainer.num_threads=1", "head=full"]
    assert cli.main(["train", *small, f"output_dir={tmp_path}"]) == 0
    (one,) = records(tmp_path).values()
    (only,) = one["stages"]
    assert (only["step"], only["lr_scale"], only["lr"]) == (0, 1.0, 1e-4)
    assert only["modules"] == [*one["plan"]["lora_modules"], "lm_head"]
