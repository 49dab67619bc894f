"""The training loop against a plain `get_peft_model` + `torch.optim.AdamW` loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import composed, stock_state
from equality import relative
from peft import LoraConfig, get_peft_model
from stock import TINY, decay_groups, tokens_of
from torch import nn

from lorabench import adapters, data, plan
from lorabench import model as base_model
from lorabench.config import Config, lora_alpha
from lorabench.pack import Batch, ModulePack
from lorabench.train import learning_rate, train


def ours(config: Config) -> tuple[ModulePack, dict[str, torch.Tensor], list[float]]:
    """Pack after training, its initial adapter, its losses."""
    base = base_model.load(config.model, "cpu")
    pack = ModulePack(base, config, plan.make(config).lora_modules, "cpu")
    initial = {k: v.clone() for k, v in adapters.adapter_state(pack.wrapped).items()}
    tokens, pad_id = tokens_of(config)
    losses = [step.loss[0] for step in train(pack, tokens, pad_id)]
    return pack, initial, losses


def plain(config: Config, initial: dict[str, torch.Tensor]) -> tuple[nn.Module, list[float]]:
    """What a user of PEFT writes by hand, from the same initial adapter and the same batches."""
    from peft import set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, config.model.dtype)
    model = AutoModelForCausalLM.from_pretrained(base_model.location(config.model), dtype=dtype)
    head = config.head.policy
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora.r,
            lora_alpha=lora_alpha(config.lora),
            use_rslora=config.lora.use_rslora,
            target_modules=plan.make(config).lora_modules,
            modules_to_save=["lm_head"] if head == "full" else None,
            bias=config.lora.bias,
        )
        wrapped = get_peft_model(model, settings)
        set_peft_model_state_dict(wrapped, dict(initial))  # some versions empty it
    wrapped.eval()  # the base's own dropouts (GPT-2) are off, as in lorabench
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    trainer = config.trainer
    optimizer = torch.optim.AdamW(
        decay_groups(wrapped, trainer.weight_decay),
        lr=trainer.lr,
        betas=(trainer.beta1, trainer.beta2),
        eps=trainer.eps,
    )
    from transformers import get_scheduler

    scheduler = get_scheduler(trainer.schedule, optimizer, trainer.warmup_steps, trainer.steps)
    tokens, pad_id = tokens_of(config)
    length = max(map(len, tokens.input_ids))
    losses = []
    for indices in data.order(len(tokens), trainer.batch_size, config.seeds.data, trainer.steps):
        input_ids, labels = (
            torch.from_numpy(a) for a in data.batch(tokens, indices, length, pad_id)
        )
        # The model's own loss upcasts logits to float32: spelt out, in the dtype of the model.
        logits = wrapped(input_ids=input_ids).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if trainer.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, trainer.max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return wrapped, losses


@pytest.mark.parametrize("head", ["exclude", "lora", "full"])
def test_twelve_float32_steps_equal_a_plain_peft_loop(head: str) -> None:
    config = composed(
        *TINY, f"head={head}", "trainer.steps=12", "lora.r=8", "trainer.weight_decay=0.1"
    )
    pack, initial, losses = ours(config)
    reference, expected = plain(config, initial)
    theirs = stock_state(reference)
    assert set(theirs) == set(adapters.adapter_state(pack.wrapped))
    for name, tensor in adapters.adapter_state(pack.wrapped).items():
        assert not torch.equal(tensor, initial[name]), f"{name} did not train"
        # Logits for fewer rows are other GEMM shapes: rounding, grown by 12 AdamW steps.
        assert relative(tensor, theirs[name]) < 1e-4, name
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["gemma", "llama", "qwen2", "qwen3", "gpt2"])
def test_fifty_float64_steps_equal_a_plain_peft_loop(
    kind: str, tiny_folder: Callable[[str], Path]
) -> None:
    bias = ["lora.bias=all", "trainer.weight_decay=0.2"] if kind in ("qwen2", "gpt2") else []
    config = composed(
        *TINY,
        "model=local",
        f"model.path={tiny_folder(kind)}",
        "model.dtype=float64",
        "lora.r=4",
        "trainer.steps=50",
        "trainer.batch_size=3",
        "head=lora",
        "lora.use_rslora=true",
        *bias,
    )
    pack, initial, losses = ours(config)
    reference, expected = plain(config, initial)
    theirs = stock_state(reference)
    mine = adapters.adapter_state(pack.wrapped)
    assert set(theirs) == set(mine)
    # Float64 rounding (1e-16) times 50 steps; models cast to float32 in norms (2e-7 relative,
    # the same on both sides as long as their inputs agree).
    worst = max((relative(mine[name], theirs[name]), name) for name in mine)
    assert worst[0] < 1e-9, worst
    assert losses == pytest.approx(expected, rel=1e-10)


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    whole = composed(*TINY, "trainer.steps=1", "trainer.batch_size=8", "model.dtype=float64")
    parts = composed(
        *TINY,
        "trainer.steps=1",
        "trainer.batch_size=8",
        "model.dtype=float64",
        "trainer.micro_batch_size=2",
    )
    (pack_a, _, loss_a), (pack_b, _, loss_b) = ours(whole), ours(parts)
    assert loss_a == pytest.approx(loss_b, rel=1e-12)  # float64 sums in another order
    for name, tensor in adapters.adapter_state(pack_a.wrapped).items():
        assert relative(tensor, adapters.adapter_state(pack_b.wrapped)[name]) < 1e-7, name


def test_gradient_checkpointing_changes_nothing_even_with_dropout() -> None:
    common = [*TINY, "trainer.steps=4", "lora.lora_dropout=0.2", "model.dtype=float64"]
    _, _, plain_losses = ours(composed(*common))
    _, _, losses = ours(composed(*common, "trainer.gradient_checkpointing=true"))
    assert losses == pytest.approx(plain_losses, rel=1e-12)  # the same masks, recomputed


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_transformers_schedules(schedule: str, warmup: int) -> None:
    from transformers import get_scheduler

    trainer = composed(
        *TINY, f"trainer.schedule={schedule}", f"trainer.warmup_steps={warmup}", "trainer.steps=40"
    ).trainer
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=trainer.lr)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, warmup, trainer.steps)
    for step in range(trainer.steps):
        # The same formula in float64; cosine differs by the order of two products.
        assert learning_rate(trainer, step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_dropout_masks_survive_an_extra_evaluation_and_follow_their_seed() -> None:
    config = composed(*TINY, "trainer.steps=6", "lora.lora_dropout=0.3")
    _, _, losses = ours(config)
    base = base_model.load(config.model, "cpu")
    pack = ModulePack(base, config, plan.make(config).lora_modules, "cpu")
    tokens, pad_id = tokens_of(config)
    disturbed = []
    for step in train(pack, tokens, pad_id):
        disturbed.append(step.loss[0])
        torch.rand(17)  # a stray draw from the global stream
        ids, labels = data.batch(tokens, [0, 1], 24, pad_id)
        pack.score(Batch.make([ids], [labels], [1]))
    assert disturbed == losses
    other = composed(*TINY, "trainer.steps=6", "lora.lora_dropout=0.3", "seeds.dropout=5")
    assert ours(other)[2][1:] != losses[1:]
    assert ours(composed(*TINY, "trainer.steps=6"))[2] != losses


def test_keyed_dropout_keeps_the_stated_share_and_the_mean() -> None:
    clock = adapters.Clock([0])
    dropout = adapters.KeyedDropout(0.25, clock, "layer")
    clock.training = True
    clock.at(0, 0)
    out = dropout(torch.ones(400, 500))
    kept = float((out != 0).float().mean())
    # 200,000 Bernoulli draws: standard error 0.001.
    assert kept == pytest.approx(0.75, abs=0.005)
    assert torch.equal(out[out != 0], torch.full_like(out[out != 0], 1 / 0.75))
    clock.at(1, 0)
    assert not torch.equal(dropout(torch.ones(400, 500)), out)
    clock.training = False
    assert torch.equal(dropout(out), out)


def test_a_run_that_diverges_keeps_its_last_good_weights() -> None:
    config = composed(
        *TINY,
        "trainer.steps=40",
        "trainer.lr=1e30",
        "trainer.warmup_steps=0",
        "trainer.schedule=constant",
    )
    base = base_model.load(config.model, "cpu")
    pack = ModulePack(base, config, plan.make(config).lora_modules, "cpu")
    tokens, pad_id = tokens_of(config)
    steps = list(train(pack, tokens, pad_id))
    assert steps[-1].ended == [0] and len(steps) < 40, "lr 1e30 must diverge"
    assert [step.ended for step in steps[:-1]] == [[]] * (len(steps) - 1)
    assert all(tensor.isfinite().all() for tensor in adapters.adapter_state(pack.wrapped).values())
