"""Section 8 of docs/traps.md: the same run again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from lorabench import cli, data, plan
from lorabench import model as base_model
from lorabench.pack import ModulePack
from lorabench.train import train
from traps.halves import IDS, batch, causal, config_of, quiet, wrapped

Falls = Callable[..., None]
TINY = ["data.num_train=32", "data.num_validation=4", "data.num_test=4",
        "lora.r=4", "trainer.steps=4", "trainer.batch_size=4"]  # fmt: skip


def state(model: Any) -> dict[str, torch.Tensor]:
    """What a model trains, copied."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    assert one.keys() == other.keys()
    return all(tensor.equal(other[name]) for name, tensor in one.items())


def hugging_face(folder: Path, steps: int = 4, resume: bool = False, **changes: Any) -> Any:
    """A wrapped model after training by the HF Trainer with seed 7."""
    model = changes.pop("model", None) or wrapped()
    arguments: dict[str, Any] = {"per_device_train_batch_size": 4} | changes
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, seed=7, learning_rate=1e-2,
        lr_scheduler_type="constant", report_to="none", use_cpu=True, disable_tqdm=True,
        **arguments,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    quiet(lambda: trainer.train(str(folder / "checkpoint-2") if resume else None))
    return model


def lorabench(
    *overrides: str, each: Callable[[ModulePack], Any] = lambda pack: None, stop: int | None = None,
    resume: dict[str, torch.Tensor] | None = None, start: int = 0,
) -> ModulePack:  # fmt: skip
    """A run alone on the embedded base, trained to the end or to a step."""
    config = config_of(None, *TINY, *overrides)
    base = base_model.load(config.model, "cpu")
    pack = ModulePack(base, config, plan.make(config).lora_modules, "cpu")
    if resume is not None:
        pack.load_state(0, resume)
    tokenizer = base_model.tokenizer(config.model)
    tokens = data.tokenise(data.load(config.data).train, tokenizer, config.data)
    for step in train(pack, tokens, data.pad_id(tokenizer), start):
        each(pack)
        if step.step == stop:
            break
    return pack


def test_the_seed_of_the_trainer_comes_after_the_init(falls_in: Falls, tmp_path: Path) -> None:
    """T8.1"""
    models = [wrapped(seed=seed) for seed in (1, 2)]  # as the global stream happens to be
    falls_in(not same(*map(state, models)))
    trained = [hugging_face(tmp_path / str(i), model=model) for i, model in enumerate(models)]
    falls_in(not same(*map(state, trained)), "with TrainingArguments(seed=7) both")

    ours = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ours.append(state(lorabench().wrapped))
    assert same(*ours)
    assert not same(ours[0], state(lorabench("seeds.init=1").wrapped))


@pytest.mark.parametrize("disturbance", ["evaluation", "draw"])
def test_one_more_evaluation_or_draw(disturbance: str, falls_in: Falls) -> None:
    """T8.2"""

    def plain(disturbed: bool) -> dict[str, torch.Tensor]:
        model = wrapped(causal(), lora_dropout=0.3).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loader = torch.utils.data.DataLoader(IDS, batch_size=4)
        torch.manual_seed(0)
        for _ in range(3):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if disturbed and disturbance == "draw":
                torch.rand(1)
            elif disturbed:
                with torch.no_grad():  # a loader draws a seed, shuffled or not
                    [model.eval()(input_ids=ids) for ids in loader]
                model.train()
        return state(model)

    assert same(plain(False), plain(False))
    falls_in(not same(plain(False), plain(True)))

    def disturb(pack: ModulePack) -> None:
        pack.score(batch(1)) if disturbance == "evaluation" else torch.rand(1)

    calm, disturbed = lorabench("lora.lora_dropout=0.3"), lorabench(
        "lora.lora_dropout=0.3", each=disturb
    )  # fmt: skip
    assert same(state(calm.wrapped), state(disturbed.wrapped))
    assert not same(state(calm.wrapped), state(lorabench().wrapped)), "dropout acts"


def test_what_is_not_the_same_bits(falls_in: Falls, tmp_path: Path) -> None:
    """T8.3"""
    whole = state(hugging_face(tmp_path / "whole"))
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for name, changes in {"2 x 2": halves, "unfused": {"optim": "adamw_torch"}}.items():
        other = state(hugging_face(tmp_path / name, **changes))
        falls_in(not same(whole, other), name)
        worst = max(float((whole[n] - other[n]).abs().max()) for n in whole)
        assert worst < 1e-3, f"{name} is the same training but for rounding: {worst}"

    ids = {plan.run_id(config_of(None, *TINY, f"trainer.micro_batch_size={n}")) for n in (2, 4)}
    assert len(ids) == 2  # another run; and there is no key for another AdamW
    assert cli.main(["plan", "tracker=none", "trainer.fused=false"]) == 2


def test_what_is_the_same_bits(tmp_path: Path) -> None:
    """T8.4"""
    whole = state(hugging_face(tmp_path / "whole"))
    assert same(whole, state(hugging_face(tmp_path / "again")))
    hugging_face(tmp_path / "half", steps=2)
    resumed = hugging_face(tmp_path / "half", model=wrapped(seed=5), resume=True)
    assert same(whole, state(resumed))

    words = ["lora.lora_dropout=0.3", "head=full"]
    ours = state(lorabench(*words).wrapped)
    assert same(ours, state(lorabench(*words).wrapped))
    half = lorabench(*words, stop=2)
    resumed_pack = lorabench(*words, resume=half.state(0), start=2)
    assert same(ours, state(resumed_pack.wrapped))


def test_tokenizers_that_fork(falls_in: Falls, tmp_path: Path) -> None:
    """T8.5"""
    script = """
import os, signal, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
tokenizer.encode_batch(["hello world"] * 500)
child = os.fork()
if child == 0:
    tokenizer.encode_batch(["hello world"] * 500)
    os._exit(0)
for _ in range(int(sys.argv[2])):
    time.sleep(0.1)
    if os.waitpid(child, os.WNOHANG)[0]:
        sys.exit(0)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
sys.exit(3)
"""
    file = str(base_model.ZOO / "tiny-gemma" / "tokenizer.json")
    codes = {}
    for parallel in ("true", "false"):
        environment = {"TOKENIZERS_PARALLELISM": parallel, "RAYON_NUM_THREADS": "2"}
        patience = "20" if parallel == "true" else "300"  # tenths of a second
        command = [sys.executable, "-c", script, file, patience]
        codes[parallel] = subprocess.run(command, env=environment, timeout=60).returncode
    falls_in(codes == {"true": 3, "false": 0}, codes)

    # lorabench forks nothing: it tokenises before it trains, in its own process.
    words = ["tracker=none", *TINY, "trainer=smoke", f"output_dir={tmp_path}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "true")
        patch.setattr("os.fork", None)
        assert cli.main(["train", *words]) == 0
