"""Section 5 of docs/traps.md: freezing and unfreezing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from lorabench import adapters, cli, plan
from lorabench import model as base_model
from lorabench.pack import ModulePack
from traps.halves import (
    IDS,
    batch,
    causal,
    config_of,
    folder_of,
    gap,
    logits,
    lora,
    moved,
    planned,
    quiet,
    refusal,
    reloaded,
    saved,
    trains,
    wrapped,
)

Falls = Callable[..., None]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Q1 = "base_model.model.model.layers.1.self_attn.q_proj"


def frozen_below() -> Any:
    """An adapter on both layers, the first one frozen by hand."""
    model = wrapped()
    for name, parameter in model.named_parameters():
        if "layers.0." in name:
            parameter.requires_grad_(False)
    return model


def loss_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def attached(*overrides: str) -> tuple[Any, Any, Any]:
    """Config, base and the pack of one that lorabench trains."""
    config = config_of(None, "lora.r=4", *overrides)
    base = base_model.load(config.model, "cpu")
    return config, base, ModulePack(base, config, plan.make(config).lora_modules, "cpu")


def test_thawing_a_wrapped_module_thaws_the_base(falls_in: Falls) -> None:
    """T5.1"""
    model = wrapped()
    model.requires_grad_(False)
    model.get_submodule(Q1).requires_grad_(True)
    falls_in(f"{Q1}.base_layer.weight" in trains(model), trains(model))

    _, base, pack = attached()
    shared = {id(parameter) for parameter in base.parameters()}
    assert pack.parameters and not any(id(p) in shared for p in pack.parameters.values())
    assert all("lora_" in name for name in trains(pack.wrapped)) and not trains(base)


def test_layer_0_is_also_10_and_20(falls_in: Falls, tmp_path: Path) -> None:
    """T5.2"""
    model = wrapped(causal(num_hidden_layers=21))
    taken = {name.split(".")[4] for name, _ in model.named_parameters()
             if "lora_A" in name and "0." in name}  # fmt: skip
    falls_in(taken == {"0", "10", "20"}, taken)

    folder = folder_of(causal(num_hidden_layers=21), tmp_path)
    names = ["target_modules=custom", "target_modules.names=[q_proj]"]
    left = planned(folder, *names, "target_modules.exclude=[0.self_attn.q_proj]").lora_modules
    assert len(left) == 20 and "model.layers.0.self_attn.q_proj" not in left
    assert "unmatched: '0.'" in refusal(folder, *names, "target_modules.exclude=['0.']")


def test_thawed_after_the_optimizer_was_built(falls_in: Falls, tmp_path: Path) -> None:
    """T5.3"""

    class Thaw(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
            if state.global_step == 2:
                found["model"].get_submodule(Q0).lora_B.requires_grad_(True)

    model = frozen_below()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    quiet(Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Thaw()]).train)
    late, early = (model.get_submodule(q).lora_B.default.weight for q in (Q0, Q1))
    assert late.requires_grad
    falls_in(not late.any() and bool(early.any()), late)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_an_optimizer_of_all_parameters(weight_decay: float, falls_in: Falls) -> None:
    """T5.4"""
    model = frozen_below()
    both = [p for name, p in model.named_parameters() if "lora_" in name]
    late = model.get_submodule(Q0).lora_A.default.weight
    start = late.detach().clone()
    optimizer = torch.optim.AdamW(both, lr=1e-2, weight_decay=weight_decay)
    loss_of(model).backward()
    optimizer.step()
    falls_in(late not in optimizer.state and late.equal(start))  # no moments, and no decay
    thawed = model.get_submodule(Q0).lora_B.default.weight.requires_grad_(True)
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    falls_in(bool(thawed.any()))


def test_frozen_while_gradients_stay(falls_in: Falls) -> None:
    """T5.5"""
    moves = {}
    for to_none in (False, True):
        model = wrapped()
        weight = model.get_submodule(Q0).lora_B.default.weight
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loss_of(model).backward()
        optimizer.step()
        weight.requires_grad_(False)
        start = weight.detach().clone()
        optimizer.zero_grad(set_to_none=to_none)
        loss_of(model).backward()
        optimizer.step()
        moves[to_none] = gap(weight.detach(), start)
    falls_in(moves[False] > 1e-3 and moves[True] == 0, moves)


def stage_run(folder: Path, steps: int, *stages: str) -> dict[str, torch.Tensor]:
    """The adapter of a run on the embedded base, q_proj and v_proj adapted.

    Args:
        stages: the modules that train from step 0 on, from step 2 on, ...
    """
    lines = [f"  - {{from_step: {2 * i}, train: {names}}}" for i, names in enumerate(stages)]
    conf = folder / "conf" / "stages"
    conf.mkdir(parents=True, exist_ok=True)
    (conf / "mine.yaml").write_text("\n".join(["# @package _global_", "stages:", *lines, ""]))
    words = ["tracker=none", "data.num_train=32", "data.num_validation=4", "data.num_test=4",
             "target_modules=custom", "target_modules.names=[q_proj,v_proj]", "lora.r=4",
             f"trainer.steps={steps}", "trainer.batch_size=2", "trainer.schedule=constant",
             "trainer.lr=1e-2", "trainer.num_threads=1", f"output_dir={folder}/{steps}",
             f"hydra.searchpath=[file://{conf.parent}]", "stages=mine"]  # fmt: skip
    assert cli.main(["train", *words]) == 0
    (file,) = (folder / str(steps)).glob("*/*/adapter/adapter_model.safetensors")
    return load_file(file)


ONE, BOTH = "[q_proj]", "[q_proj, v_proj]"


def test_a_module_joins_later(tmp_path: Path) -> None:
    """T5.3 T5.4"""
    before, after = (stage_run(tmp_path, steps, ONE, BOTH) for steps in (3, 5))
    one_step = 1.01e-2  # AdamW's first step is the learning rate
    for name in (name for name in before if "lora_B" in name):
        assert (float(before[name].abs().max()) < one_step) == ("v_proj" in name), name
        assert float(after[name].abs().max()) > one_step, name


def test_a_module_that_leaves_stays_where_it_is(tmp_path: Path) -> None:
    """T5.5"""
    before, after = (stage_run(tmp_path, steps, BOTH, ONE) for steps in (3, 5))
    for name, tensor in before.items():
        assert after[name].equal(tensor) == ("v_proj" in name), name


def thaw_by_context(model: PeftModel) -> None:
    with model.disable_adapter():
        pass


UNDO: dict[str, Callable[[Any], Any]] = {
    "disable_adapter": thaw_by_context,
    "set_adapter": lambda model: model.set_adapter("default"),
    "enable_adapter_layers": lambda model: model.base_model.enable_adapter_layers(),
    "disable_adapter_layers": lambda model: (
        model.base_model.disable_adapter_layers(),
        model.base_model.enable_adapter_layers(),
    ),
}


@pytest.mark.parametrize("undo", UNDO)
def test_calls_that_thaw(undo: str, falls_in: Falls) -> None:
    """T5.6"""
    model = frozen_below()
    before = trains(model)
    UNDO[undo](model)
    falls_in((len(before), len(trains(model))) == (2, 4), trains(model))


def test_a_reload_that_thaws(falls_in: Falls, tmp_path: Path) -> None:
    """T5.6"""
    model = frozen_below()
    folder = saved(model, tmp_path)
    again = quiet(lambda: PeftModel.from_pretrained(causal(), str(folder), is_trainable=True))
    falls_in((len(trains(model)), len(trains(again))) == (2, 4), trains(again))


def test_what_trains_stays_what_trains() -> None:
    """T5.6"""
    _, _, pack = attached("head=full")
    before = trains(pack.wrapped)
    assert before == list(pack.parameters)
    pack.forward_backward(0, 0, batch(1), [IDS[:, 1:].numel()])
    pack.update([1e-3])
    pack.score(batch(1))
    pack.generate(IDS, torch.ones_like(IDS), max_new_tokens=2, do_sample=False)
    pack.load_state(0, {name: t.clone() for name, t in pack.state(0).items()})
    assert trains(pack.wrapped) == before
    optimised = {id(p) for group in pack.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in pack.parameters.values()}


def test_modules_injected_later(falls_in: Falls, tmp_path: Path) -> None:
    """T5.7"""
    model = moved(wrapped())
    later = lora(target_modules=["v_proj"])
    quiet(lambda: inject_adapter_in_model(later, model.get_base_model()))
    model.peft_config["default"] = later
    moved(model, seed=4)
    assert len(trains(model)) == 8
    again = reloaded(causal(), saved(model, tmp_path))
    falls_in(set(again.peft_config["default"].target_modules) == {"v_proj"})
    off = gap(logits(again), logits(model))
    falls_in(off > 0.01, f"logits off by {off}")

    config, base, pack = attached("head=lora")
    adapters.save(pack.adapter_state(0), pack.settings(0), tmp_path / "ours")
    mine = reloaded(base_model.share(base), tmp_path / "ours")
    assert sorted(mine.targeted_module_names) == sorted(plan.make(config).lora_modules)


def test_another_module_changes_the_first_ones_init(falls_in: Falls) -> None:
    """T5.8"""
    few, more = (wrapped(target_modules=names) for names in (["q_proj"], ["q_proj", "v_proj"]))
    shared = [m.get_submodule(Q1).lora_A.default.weight.detach() for m in (few, more)]
    falls_in(not shared[0].equal(shared[1]))

    names = ["target_modules=custom", "target_modules.names=[q_proj]"]
    torch.manual_seed(5)
    untouched = torch.get_rng_state()
    _, _, pack = attached(*names)
    mine = {k: v.clone() for k, v in adapters.adapter_state(pack.wrapped).items()}
    _, _, wider = attached("target_modules=custom", "target_modules.names=[q_proj,v_proj]")
    assert torch.get_rng_state().equal(untouched)
    theirs = adapters.adapter_state(wider.wrapped)
    assert mine and all(tensor.equal(theirs[name]) for name, tensor in mine.items())
