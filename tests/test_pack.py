"""Packed = solo: packs of several runs against stock PEFT, autograd and torch.optim.

The reference is `get_peft_model` on a freshly loaded base and a hand-written loop, never another
pack. BERT is a decoder here, with a bias on its head; tests/test_classify.py has the encoder.
"""

from __future__ import annotations

import copy
import json
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed, stock_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from lorabench import adapters, checkpoint, cli, data, plan, versions
from lorabench import model as base_model
from lorabench.config import Config, ConfigErrors, ModelConfig, TrainerConfig, lora_alpha
from lorabench.pack import Batch, StackedPack
from lorabench.pack.optimizer import StackedAdamW
from lorabench.pack.storage import Members, Stacked
from lorabench.train import train

TINY = ["tracker=none", "data.num_train=64", "data.num_validation=8", "data.num_test=8"]
KINDS = ["gemma", "llama", "qwen2", "gpt2", "bert"]
MORE_KINDS = ["gemma2", "gemma3", "opt"]  # masks a layer, soft-capping, another body; slow

OTHER_TRAINER = [
    "trainer.lr=2e-3",
    "trainer.weight_decay=0.1",
    "trainer.beta2=0.99",
    "trainer.max_grad_norm=null",
    "trainer.warmup_steps=3",
]
# Runs of one pack, mixed in everything a run has for itself.
MIXED = [
    ["lora.r=4", "head=exclude", "target_modules=all-linear"],
    ["lora.r=16", "head=lora", "target_modules=attention", "lora.use_rslora=true"],
    ["lora.r=64", "head=full", "target_modules=mlp", "lora.alpha_ratio=0.5", *OTHER_TRAINER],
    [
        "lora.r=8",
        "head=lora",
        "target_modules=custom",
        "target_modules.names=[{one},{two}]",
        "lora.rank_pattern={{{one}:12}}",
        "lora.alpha_pattern={{{two}:5}}",
        "trainer.schedule=constant",
    ],
]
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
NAMES = {"gpt2": ("c_attn", "c_fc"), "bert": ("query", "value")}
BIASES = {  # of the models that have some, run by run
    "qwen2": ["none", "lora_only", "none", "all"],
    "gpt2": ["all", "none", "lora_only", "all"],
    "bert": ["none", "none", "lora_only", "none"],
    # Not the keys': softmax undoes a bias of all keys, and its gradient is rounding alone.
    "opt": ["none", "none", "lora_only", "none"],
}


def mixture(kind: str, folder: Path, dropout: float, *common: str) -> list[Config]:
    """Four runs of different r, alpha, targets, head, bias and optimizer on one base.

    Without dropout all see the same batch; with it each has its own data and half have none.
    """
    one, two = NAMES.get(kind, ("q_proj", "v_proj"))
    biases = BIASES.get(kind, ["none"] * len(MIXED))
    return [
        composed(
            *TINY,
            *common,
            "model=local",
            f"model.path={folder}",
            *(["model.attn_implementation=eager"] if kind == "gemma2" else []),
            *(w.format(one=one, two=two) for w in words),
            f"lora.bias={bias}",
            f"lora.lora_dropout={dropout if i % 2 else 0}",
            f"seeds.init={i}",
            f"seeds.dropout={i}",
            f"seeds.data={i if dropout else 0}",
        )
        for i, (words, bias) in enumerate(zip(MIXED, biases, strict=True))
    ]


# --- ours ------------------------------------------------------------------------------------


def packed(configs: list[Config]) -> StackedPack:
    assert len(configs) > 1, "every case has a pack size above one"
    plans = [plan.make(config) for config in configs]
    assert [one.alone for one in plans] == [None] * len(plans)
    base = base_model.load(configs[0].model, "cpu")
    modules = [one.lora_modules for one in plans]
    return StackedPack(base, plan.skeleton(configs[0].model), configs, modules, "cpu")


def copy_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def gradients(pack: StackedPack, run: int) -> dict[str, Tensor]:
    """A run's gradients under the names of its saved adapter."""
    return {place.state_name: pack._view(run, place, "grad") for place in pack.places[run]}


def tokens_of(config: Config) -> tuple[data.Tokens, int]:
    # The embedded tokenizer for every architecture: AutoTokenizer rebuilds some classes by type.
    tokenizer = base_model.tokenizer(ModelConfig(path="lorabench:tiny-gemma"))
    tokens = data.tokenise(data.load(config.data).train, tokenizer, config.data)
    return tokens, data.pad_id(tokenizer)


def train_pack(pack: StackedPack) -> list[list[float]]:
    """Losses, one list a run."""
    tokens, pad_id = tokens_of(pack.configs[0])
    return list(zip(*(step.loss for step in train(pack, tokens, pad_id)), strict=True))


# --- theirs ----------------------------------------------------------------------------------


class Stock:
    """One run as a user of PEFT writes it by hand."""

    def __init__(self, config: Config, initial: dict[str, Tensor]):
        from transformers import AutoModelForCausalLM

        self.config = config
        model: Any = AutoModelForCausalLM.from_pretrained(
            base_model.location(config.model),
            dtype=getattr(torch, config.model.dtype),
            attn_implementation=config.model.attn_implementation,
        )
        lora = config.lora
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tied layers
            self.wrapped = get_peft_model(
                model,
                LoraConfig(
                    task_type="CAUSAL_LM",
                    r=lora.r,
                    lora_alpha=lora_alpha(lora),  # type: ignore[arg-type]
                    lora_dropout=lora.lora_dropout,
                    use_rslora=lora.use_rslora,
                    rank_pattern=dict(lora.rank_pattern or {}),
                    alpha_pattern=dict(lora.alpha_pattern or {}),
                    target_modules=plan.make(config).lora_modules,
                    modules_to_save=plan.make(config).saved_modules or None,
                    bias=lora.bias,  # type: ignore[arg-type]
                ),
            )
        self.load(initial)
        self.wrapped.eval()  # the base's own dropouts (GPT-2) are off, as in lorabench
        self.clock = adapters.Clock(config.seeds.dropout, training=True)
        adapters.key_dropout(self.wrapped, self.clock)
        self._key_head_dropout()
        self.parameters = {
            name.replace(".modules_to_save.default", "").replace(".default", ""): p
            for name, p in self.wrapped.named_parameters()
            if p.requires_grad
        }
        tokens, self.pad_id = tokens_of(config)
        self.tokens = tokens
        self.length = data.padded_length(tokens, config.data.max_length)
        trainer = config.trainer
        self.order = list(
            data.order(len(tokens), trainer.batch_size, config.seeds.data, trainer.steps)
        )

    def _key_head_dropout(self) -> None:
        """Lay the head's mask on the rows it is drawn for: those that predict a completion token.

        lorabench hands the head no other rows; stock PEFT does, and they carry no loss.
        """
        name, _ = base_model.output_head(self.wrapped.get_base_model()) or ("", None)
        head: Any = adapters.lora_layers(self.wrapped).get(name)
        keyed = head and head.lora_dropout["default"]
        if not isinstance(keyed, adapters.KeyedDropout):
            return
        stock = self

        class OnRows(nn.Module):
            def forward(self, x_BTD: Tensor) -> Tensor:
                size, _, inputs = x_BTD.shape
                width = data.longest_completion(stock.tokens)
                mask_BWD = keyed.mask(torch.Size((size * width, inputs)), x_BTD.device)
                mask_BWD = mask_BWD.reshape(size, width, inputs).to(x_BTD.dtype)
                spread_BTD = torch.ones_like(x_BTD)
                for row, there in enumerate(stock.labels != data.IGNORED):
                    places = there.nonzero().flatten()
                    spread_BTD[row, places - 1] = mask_BWD[row, : len(places)]
                return x_BTD * spread_BTD

        head.lora_dropout["default"] = OnRows()

    def load(self, state: dict[str, Tensor]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = set_peft_model_state_dict(self.wrapped, dict(state))  # 0.19 takes keys out
        assert not result.unexpected_keys

    def state(self) -> dict[str, Tensor]:
        return stock_state(self.wrapped)

    def loss(self, step: int) -> float:
        """Mean nll of the step's batch; its gradient is left in the parameters."""
        ids, labels = data.batch(self.tokens, self.order[step], self.length, self.pad_id)
        input_ids, targets = torch.from_numpy(ids), torch.from_numpy(labels)
        for parameter in self.parameters.values():
            parameter.grad = None
        micro = self.config.trainer.micro_batch_size or len(ids)
        count, total = int((targets != -100).sum()), 0.0
        self.clock.step = step
        for self.clock.micro_step, first in enumerate(range(0, len(ids), micro)):
            rows = slice(first, first + micro)
            self.labels = targets[rows]
            # The model's own loss upcasts to float32: spelt out, in the dtype of the model.
            logits = self.wrapped(input_ids=input_ids[rows]).logits[:, :-1]
            logits = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
            nll = nn.functional.cross_entropy(
                logits.flatten(0, 1), targets[rows, 1:].flatten(), reduction="sum"
            )
            (nll / count).backward()
            total += nll.item() / count
        return total

    def gradients(self, step: int) -> dict[str, Tensor]:
        self.loss(step)
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def train(self) -> list[float]:
        from transformers import get_scheduler

        trainer, parameters = self.config.trainer, list(self.parameters.values())
        optimizer = torch.optim.AdamW(
            parameters,
            lr=trainer.lr,
            betas=(trainer.beta1, trainer.beta2),
            eps=trainer.eps,
            weight_decay=trainer.weight_decay,
        )
        constant = trainer.schedule == "constant"
        schedule = "constant_with_warmup" if constant else trainer.schedule
        scheduler = get_scheduler(schedule, optimizer, trainer.warmup_steps, trainer.steps)
        losses = []
        for step in range(trainer.steps):
            losses.append(self.loss(step))
            if trainer.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, trainer.max_grad_norm)
            optimizer.step()
            scheduler.step()
        return losses


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def compare_training(configs: list[Config]) -> tuple[float, tuple[float, str]]:
    """Largest difference of a loss, and of a trained tensor in relative norm with its name."""
    pack = packed(configs)
    initial = [copy_of(pack.adapter_state(run)) for run in range(pack.size)]
    losses = train_pack(pack)
    worst_loss, worst = 0.0, (0.0, "")
    for run, config in enumerate(configs):
        stock = Stock(config, initial[run])
        for mine, theirs in zip(losses[run], stock.train(), strict=True):
            worst_loss = max(worst_loss, abs(mine - theirs))
        mine, theirs = pack.adapter_state(run), stock.state()
        assert set(mine) == set(theirs)
        for name, tensor in mine.items():
            assert not torch.equal(tensor, initial[run][name]), f"run {run}: {name} did not train"
            worst = max(worst, (relative(tensor, theirs[name]), f"run {run}: {name}"))
    print(f"\nlargest differences: loss {worst_loss:.2e}, weights {worst[0]:.2e} ({worst[1]})")
    return worst_loss, worst


class DoubleTorch:
    """`torch` as a modelling file sees it, float32 replaced by float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def float64_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift the casts to float32 in norms and rotary embeddings, for both sides."""
    from transformers.models.gemma import modeling_gemma
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.gemma3 import modeling_gemma3
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2

    for module in (
        modeling_gemma, modeling_gemma2, modeling_gemma3, modeling_llama, modeling_qwen2
    ):  # fmt: skip
        monkeypatch.setattr(module, "torch", DoubleTorch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


# --- 1 to 4: training and gradients ----------------------------------------------------------


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize(("kind", "dropout"), CASES)
def test_fifty_float64_steps_equal_stock_peft(
    kind: str, dropout: float, tiny_folder: Callable[[str], Path]
) -> None:
    common = ["model.dtype=float64", "trainer.steps=50"]
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


def compare_gradients(configs: list[Config], steps: list[int]) -> tuple[float, str]:
    """Largest relative difference of a gradient from the same weights at any of these steps."""
    pack = packed(configs)
    stocks = [Stock(config, pack.adapter_state(run)) for run, config in enumerate(configs)]
    worst, update, done, zeros = (0.0, ""), pack.update, iter(range(10**6)), 0

    def compare_then_update(lr: list[float]) -> Tensor:
        nonlocal worst, zeros
        step = next(done)
        if step in steps:
            for run, stock in enumerate(stocks):
                stock.load(copy_of(pack.adapter_state(run)))
                mine, theirs = gradients(pack, run), stock.gradients(step)
                assert set(mine) == set(theirs)
                for name, tensor in mine.items():
                    where = f"step {step}, run {run}: {name}"
                    if step == 0 and ".lora_A." in name:
                        # dL/dA = s B^T (...) is zero while B = 0: the first step's A
                        assert tensor.abs().max() <= 1e-12, where
                        assert theirs[name].abs().max() <= 1e-12, where
                        zeros += 1
                    else:
                        assert theirs[name].norm() > 1e-12, f"{where}: nothing to compare"
                        worst = max(worst, (relative(tensor, theirs[name]), where))
        return update(lr)

    pack.update = compare_then_update  # type: ignore[method-assign]
    train_pack(pack)
    assert zeros == sum(place.kind == "lora_A" for found in pack.places for place in found)
    print(f"\nlargest relative difference of a gradient {worst[0]:.2e} ({worst[1]})")
    return worst


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


# --- 5: mates --------------------------------------------------------------------------------


def mates(*differences: list[str], head: str, shared: bool) -> list[Config]:
    """Runs of one shape; the first is the one looked at."""
    common = [
        *TINY,
        "trainer.steps=6",
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

    def hash_and_losses(configs: list[Config], slot: int) -> tuple[str, list[float]]:
        pack = packed(configs)
        losses = train_pack(pack)
        if configs is broken:
            assert pack.alive == [True, False, True]
            assert not all(map(torch.isfinite, torch.tensor(losses[1])))
        return adapters.state_hash(pack.adapter_state(slot)), losses[slot]

    expected = hash_and_losses(plainly, 0)
    assert hash_and_losses(others, 0) == expected
    assert hash_and_losses(broken, 0) == expected
    assert hash_and_losses([rest[0], rest[1], first], 2) == expected


# --- 6: the optimizer ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bound"),
    # Rounding of 200 updates: 200 * 2^-53 and 200 * 2^-24, with room for other summing orders.
    [(torch.float64, 1e-13), (torch.float32, 2e-5)],
)
def test_the_optimizer_is_adamw_with_clipping_run_by_run(dtype: torch.dtype, bound: float) -> None:
    trainers = [
        TrainerConfig(lr=1e-3),
        TrainerConfig(lr=3e-2, weight_decay=0.1, beta1=0.8, beta2=0.95, max_grad_norm=0.1),
        TrainerConfig(lr=1e-2, weight_decay=0.3, eps=1e-4, max_grad_norm=None),
        TrainerConfig(lr=1e-3),  # as the first: moved by the same kernel
        TrainerConfig(lr=5e-3, max_grad_norm=1e3),
    ]
    # Runs 0..4 share a module; 1 and 3, 2 to 4, and 2 alone, train something more.
    groups = [Stacked(Members(runs, 5), shape, dtype, None, "cpu") for runs, shape in
              (([0, 1, 2, 3, 4], (5, 7)), ([1, 3], (12,)), ([2, 3, 4], (2, 3)), ([2], (5,)))
              ]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        group.value.copy_(torch.randn(group.value.shape, generator=generator))
    mine = [
        [g.value[g.members.runs.index(run)] for g in groups if run in g.members.runs]
        for run in range(len(trainers))
    ]
    theirs = [[nn.Parameter(row.clone()) for row in rows] for rows in mine]
    references = [
        torch.optim.AdamW(
            parameters, lr=t.lr, betas=(t.beta1, t.beta2), eps=t.eps, weight_decay=t.weight_decay
        )
        for parameters, t in zip(theirs, trainers, strict=True)
    ]
    packs_optimizer = StackedAdamW(groups, trainers)
    stopped_at = 120  # run 4
    kept = None
    for step in range(200):
        scale = 10 ** float(torch.empty(()).uniform_(-3, 2, generator=generator))
        rates = [t.lr * (1 - step / 200) for t in trainers]
        for group in groups:
            group.grad.fill_(float("nan"))  # what an earlier step left must not be seen
            whole = scale * torch.randn(group.grad.shape, generator=generator)
            group.add((0.25 * whole).to(dtype))
            group.add((0.75 * whole).to(dtype))
        expected = []
        for run, (parameters, reference, t) in enumerate(
            zip(theirs, references, trainers, strict=True)
        ):
            rows = [
                g.grad[g.members.runs.index(run)].clone() for g in groups if run in g.members.runs
            ]
            for parameter, row in zip(parameters, rows, strict=True):
                parameter.grad = row
            limit = float("inf") if t.max_grad_norm is None else t.max_grad_norm
            expected.append(nn.utils.clip_grad_norm_(parameters, limit).item())
            if run == 4 and step >= stopped_at:
                continue
            reference.param_groups[0]["lr"] = rates[run]
            reference.step()
        norm = packs_optimizer.step(rates, [run != 4 or step < stopped_at for run in range(5)])
        assert norm.tolist() == pytest.approx(expected, rel=1e-6)
        if step == stopped_at:
            kept = mine[4][0].clone()
        assert all(group.cleared for group in groups)
    assert kept is not None and torch.equal(kept, mine[4][0])
    worst = max(
        relative(row, parameter.detach())
        for rows, parameters in zip(mine, theirs, strict=True)
        for row, parameter in zip(rows, parameters, strict=True)
    )
    print(f"\nlargest relative difference {worst:.2e}")
    assert worst < bound


# --- 7: the saved adapters -------------------------------------------------------------------

FAST = [*TINY, "trainer.num_threads=1"]


def records(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    found = sorted(folder.glob("*/*/record.json"))
    return [(path.parent, json.loads(path.read_text())) for path in found]


def test_each_adapter_holds_its_own_keys_and_reloads_to_the_recorded_nll(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from safetensors.torch import load_file

    words = ["lora.r=4,8", "head=exclude,lora,full", "trainer.steps=20", "data.num_test=40"]
    assert cli.main(["train", "-m", *FAST, *words, f"output_dir={tmp_path}"]) == 0
    config = composed(*FAST, "data.num_test=40")
    tokenizer = base_model.tokenizer(config.model)
    tokens = data.tokenise(data.load(config.data).test, tokenizer, config.data)
    length = data.padded_length(tokens, config.data.max_length)
    ids, labels = map(
        torch.from_numpy, data.batch(tokens, range(40), length, data.pad_id(tokenizer))
    )
    found = records(tmp_path)
    assert len(found) == 6
    for folder, record in found:
        assert record["plan"]["pack"]["size"] == 6
        state = load_file(folder / "adapter" / "adapter_model.safetensors")
        # From the plan alone: two tensors a module, one a saved module; no mate's.
        modules, r = record["plan"]["lora_modules"], record["config"]["lora"]["r"]
        saved = record["plan"]["saved_modules"]
        assert ("lm_head" in modules, saved == ["lm_head"]) == (
            record["config"]["head"]["policy"] == "lora",
            record["config"]["head"]["policy"] == "full",
        )
        keys = {f"base_model.model.{m}.lora_{x}.weight" for m in modules for x in "AB"}
        keys |= {f"base_model.model.{m}.weight" for m in saved}
        assert set(state) == keys
        assert all(t.shape[0] == r for name, t in state.items() if ".lora_A." in name)
        assert sum(t.numel() for t in state.values()) == record["plan"]["trainable_parameters"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tied layers
            model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
        with torch.no_grad():
            logits = torch.cat([model(input_ids=part).logits[:, :-1] for part in ids.split(32)])
        nll = nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
        )
        value = float((nll.double().sum(1) / (labels[:, 1:] != -100).sum(1)).mean())
        # The bound: float32, the same examples, GEMMs of other shapes.
        assert abs(record["metrics"]["test"]["nll"]["value"] - value) < 1e-6


# --- 8: batches, precision, shared layers ----------------------------------------------------


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize(
    "words",
    [
        ["trainer.micro_batch_size=2", "lora.lora_dropout=0.1"],
        ["trainer.gradient_checkpointing=true", "lora.lora_dropout=0.1"],
    ],
)
@pytest.mark.parametrize("shared", [pytest.param(True, marks=pytest.mark.slow), False])
def test_micro_batches_and_checkpointing(
    words: list[str], shared: bool, tiny_folder: Callable[[str], Path]
) -> None:
    common = ["model.dtype=float64", "model=local", f"model.path={tiny_folder('llama')}"]
    configs = [
        composed(*TINY, *common, *words, "trainer.steps=4", f"seed={i}", *own)
        for i, own in enumerate((["head=lora", "lora.r=4"], ["head=full", "lora.r=6"]))
    ]
    for config in configs if shared else ():
        config.seeds.data = 0
    loss, (weights, name) = compare_training(configs)
    assert loss < 1e-12  # float64 sums in another order
    assert weights < 1e-11, name


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize(
    ("kind", "words", "repeated"),
    [
        # Adapters in the last layer and on the head: layer 0 runs once, layer 1 R times.
        ("llama", ["target_modules.names='.*layers[.]1[.].*_proj'"], True),
        ("gpt2", ["target_modules.names='.*[.]h[.]1[.].*c_(attn|fc)'"], True),
        # The head alone: every layer runs once.
        (
            "gemma",
            [
                "target_modules.names=[q_proj]",
                "target_modules.exclude=[q_proj]",
            ],
            False,
        ),
    ],
)
def test_layers_below_the_first_adapted_one_run_once(
    kind: str, words: list[str], repeated: bool, tiny_folder: Callable[[str], Path]
) -> None:
    configs = [
        composed(
            *TINY,
            "model.dtype=float64",
            "model=local",
            f"model.path={tiny_folder(kind)}",
            "target_modules=custom",
            *words,
            "head=lora",
            "trainer.steps=6",
            f"lora.r={r}",
            f"seeds.init={r}",
        )
        for r in (2, 5, 3)
    ]
    sizes: dict[str, set[int]] = {}
    pack = packed(configs)
    layers = pack.tree.transformer.h if kind == "gpt2" else pack.tree.model.layers
    for name, layer in (("first", layers[0]), ("last", layers[1])):
        # The module inside the layer sees what the layer's own hooks made of its input.
        inside = next(m for m in layer.children())
        inside.register_forward_hook(
            lambda m, args, out, name=name: sizes.setdefault(name, set()).add(
                (out[0] if isinstance(out, tuple) else out).shape[0]
            )
        )
    train_pack(pack)
    batch = configs[0].trainer.batch_size
    assert sizes == {"first": {batch}, "last": {3 * batch if repeated else batch}}
    loss, (weights, name) = compare_training(configs)
    assert loss < 1e-12 and weights < 1e-11, name  # float64 sums in another order


def test_bfloat16_autocast_equals_stock_peft_under_autocast(
    tiny_folder: Callable[[str], Path],
) -> None:
    """From the same weights, after some steps: neither side is exact, so the bound is loose."""
    configs = mixture("llama", tiny_folder("llama"), 0.1, "trainer.dtype=bfloat16")
    for config in configs:
        config.trainer.steps = 12
    pack = packed(configs)
    train_pack(pack)
    for stacked in pack.stacked.values():
        assert stacked.value.dtype == torch.float32, "trained weights stay in float32"
    tokens, pad_id = tokens_of(configs[0])
    stocks = [Stock(config, copy_of(pack.adapter_state(i))) for i, config in enumerate(configs)]
    pairs = [data.batch(tokens, stock.order[11], stock.length, pad_id) for stock in stocks]
    batch = Batch.make(
        [ids for ids, _ in pairs], [labels for _, labels in pairs],
        data.longest_completion(tokens), "cpu",
    )  # fmt: skip
    counts = [int((labels != data.IGNORED).sum()) for _, labels in pairs]
    losses = pack.forward_backward(11, 0, batch, counts).tolist()
    worst = (0.0, "")
    for run, stock in enumerate(stocks):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = stock.loss(11)
        assert losses[run] == pytest.approx(expected, rel=5e-3)  # bfloat16: 2^-9 a rounding
        for name, mine in gradients(pack, run).items():
            theirs = stock.parameters[name].grad
            assert theirs is not None
            worst = max(worst, (relative(mine, theirs), f"run {run}: {name}"))
    print(f"\nlargest relative difference of a bfloat16 gradient {worst[0]:.2e} ({worst[1]})")
    # A dozen bfloat16 roundings (2^-9 = 0.002) behind one another, cancelling in small gradients.
    assert worst[0] < 0.1, worst


# --- 9: what does not pack -------------------------------------------------------------------


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

    folder = tmp_path_factory.mktemp("models") / "mixtral"
    tokenizer = AutoTokenizer.from_pretrained(base_model.ZOO / "tiny-gemma")
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, head_dim=8,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["lora.use_dora=true"], "DoRA"),
        (["lora.init=pissa"], "pissa"),
        (["target_modules=custom", "target_modules.names=[embed_tokens,q_proj]"], "Embedding"),
        (["model=local", "model.path=MOE", "target_modules=attention"], "experts"),
        (["model=local", "model.path=BERT", "head=full", "lora.bias=all"], "saves untrained"),
    ],
)
def test_what_does_not_pack_trains_alone_and_says_why(
    words: list[str],
    reason: str,
    moe_folder: Path,
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folders = {"MOE": moe_folder, "BERT": tiny_folder("bert")}
    words = [re.sub("MOE|BERT", lambda found: str(folders[found[0]]), word) for word in words]
    arguments = [*FAST, *words, "trainer.steps=3", "lora.r=4"]
    if reason == "experts" and (too_old := versions.too_old_for_experts()):
        with pytest.raises(ConfigErrors, match=re.escape(too_old)):
            plan.make(composed(*arguments))
        return
    alone = plan.make(composed(*arguments)).alone
    assert alone is not None and reason in alone
    sweep = ["lora.lora_alpha=4,8", f"output_dir={tmp_path}"]
    assert cli.main(["train", "-m", *arguments, *sweep]) == 0
    found = records(tmp_path)
    assert [r["status"] for _, r in found] == ["finished"] * 2
    for _, record in found:
        assert record["plan"]["pack"]["size"] == 1 and record["plan"]["pack"]["alone"] == alone


# --- 10: any mixture -------------------------------------------------------------------------

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


# --- 11 and 12: resume, memory ---------------------------------------------------------------

TWO = ["head=exclude,lora", "lora.r=4", "lora.lora_dropout=0.1"]


def outcome(folder: Path) -> dict[str, Any]:
    """What must be the same of every run, by its id."""
    return {r["run_id"]: (r["status"], r["hashes"], r["metrics"]) for _, r in records(folder)}


def test_a_killed_pack_resumes_to_the_same_bits(tmp_path: Path) -> None:
    arguments = [*FAST, *TWO, "trainer.steps=40", "trainer.checkpoint_every=2"]
    command = [sys.executable, "-m", "lorabench", "train", "-m", *arguments]
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, f"output_dir={killed}"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(killed.glob("*/*/checkpoint/checkpoint.json"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [r["status"] for _, r in records(killed)] == ["running"] * 2
    assert cli.main(["train", "-m", *arguments, f"output_dir={killed}"]) == 0
    assert cli.main(["train", "-m", *arguments, f"output_dir={tmp_path / 'whole'}"]) == 0
    assert outcome(killed) == outcome(tmp_path / "whole")
    assert [r["plan"]["pack"]["size"] for _, r in records(killed)] == [2, 2]


def test_members_a_step_apart_resume_at_the_step_they_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", "-m", *FAST, *TWO, "trainer.steps=8", "trainer.checkpoint_every=1"]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert cli.main([*arguments, f"output_dir={whole}"]) == 0
    commit, calls = checkpoint.commit, iter(range(10**6))

    def die_between(folder: Path) -> None:
        if next(calls) == 2 * 4 + 1:  # the second member's fifth
            raise RuntimeError("power cut")
        commit(folder)

    monkeypatch.setattr(checkpoint, "commit", die_between)
    assert cli.main([*arguments, f"output_dir={torn}"]) != 0
    monkeypatch.undo()
    steps = sorted(sorted(checkpoint.steps(f / "checkpoint")) for f, _ in records(torn))
    assert steps == [[3, 4], [4, 5]]
    resumed: list[int] = []
    from lorabench.progress import Display

    monkeypatch.setattr(Display, "resumed", lambda self, steps: resumed.append(steps))
    assert cli.main([*arguments, f"output_dir={torn}"]) == 0
    assert resumed == [2 * 4]
    assert outcome(torn) == outcome(whole)


def test_out_of_memory_at_the_first_step_halves_the_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, sizes = StackedPack.forward_backward, []

    def forward_backward(self: StackedPack, step: int, *rest: Any) -> Tensor:
        if step == 0:
            sizes.append(self.size)
        if self.size > 2:
            raise torch.OutOfMemoryError("out of memory")
        return inner(self, step, *rest)

    monkeypatch.setattr(StackedPack, "forward_backward", forward_backward)
    words = ["lora.r=2,3,4,5,6", "trainer.steps=2", f"output_dir={tmp_path}"]
    assert cli.main(["train", "-m", *FAST, *words]) == 0
    assert sizes == [5, 3, 2, 1, 2]
    found = records(tmp_path)
    assert [r["status"] for _, r in found] == ["finished"] * 5
    assert sorted(r["plan"]["pack"]["size"] for _, r in found) == [1, 2, 2, 2, 2]
