"""Section 6 of docs/traps.md: several adapters on one base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MistralConfig

from lorabench import adapters, checkpoint, cli, plan
from lorabench import model as base_model
from lorabench.pack import StackedPack
from traps.halves import (
    IDS,
    batch,
    built,
    causal,
    config_of,
    folder_of,
    gap,
    logits,
    lora,
    moved,
    quiet,
    reloaded,
    said,
    saved,
    wrapped,
)

Falls = Callable[..., None]
QV = ["q_proj", "v_proj"]


def packed(folder: Path, *runs: list[str]) -> StackedPack:
    """Runs on one base of a folder, trained together by lorabench."""
    common = ["lora.r=4", "target_modules=custom", "target_modules.names=[q_proj,v_proj]"]
    configs = [config_of(folder, *common, *words) for words in runs]
    plans = [plan.make(config) for config in configs]
    assert [one.alone for one in plans] == [None] * len(plans)
    base = base_model.load(configs[0].model, "cpu")
    skeleton = plan.skeleton(configs[0].model)
    return StackedPack(base, skeleton, configs, [one.lora_modules for one in plans], "cpu")


def steps(pack: StackedPack, count: int = 3) -> Tensor:
    """Trains on one batch, every token a target; each run's last loss, (R,)."""
    loss = torch.zeros(pack.size)
    targets = IDS[:, 1:].numel()
    for step in range(count):
        loss = pack.forward_backward(step, 0, batch(pack.size), [targets] * pack.size)
        pack.update([1e-2] * pack.size)
    return loss


def stock_nll(folder: Path, adapter: Path) -> Tensor:
    """nll of every predicted token by stock PEFT, from a run's saved adapter."""
    model = reloaded(AutoModelForCausalLM.from_pretrained(folder), adapter)
    found = logits(model)[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(found, IDS[:, 1:].flatten(), reduction="none")


def saves(model: Any, name: str) -> dict[str, Tensor]:
    """What plain PEFT writes of one adapter, warnings dropped."""
    return quiet(lambda: get_peft_model_state_dict(model, adapter_name=name))


def test_each_adapter_saves_its_own_head(tmp_path: Path) -> None:
    """T6.1"""
    settings = {"target_modules": QV, "modules_to_save": ["lm_head"]}
    model = wrapped(causal(), **settings)
    quiet(lambda: model.add_adapter("second", lora(**settings)))
    for seed, name in enumerate(("default", "second")):
        model.set_adapter(name)
        moved(model, seed=seed)
    copies = model.get_base_model().lm_head.modules_to_save
    key = "base_model.model.lm_head.weight"
    heads = {name: saves(model, name)[key] for name in copies}
    assert not heads["default"].equal(heads["second"])  # old versions saved one for both
    assert all(heads[name].equal(copies[name].weight) for name in copies)

    folder = folder_of(causal(), tmp_path)
    pack = packed(folder, ["head=full", "seed=0"], ["head=full", "seed=1"])
    steps(pack)
    ours = [pack.adapter_state(run)[key] for run in (0, 1)]
    assert not ours[0].equal(ours[1])


BAD = ["0", "1", "q_proj", "self_attn", "layers", "lora_A", "model", "weight"]


@pytest.mark.parametrize("name", BAD)
def test_names_that_take_from_others(name: str, falls_in: Falls) -> None:
    """T6.2"""
    model = wrapped(causal(), target_modules=QV)  # "default": 2 layers x 2 modules x A and B
    _, warned = said(lambda: model.add_adapter(name, lora(target_modules=QV)))
    counts = [len(saves(model, one)) for one in ("default", name)]
    falls_in(counts != [8, 8] and not warned, (counts, warned))


def test_a_dotted_name(falls_in: Falls) -> None:
    """T6.3"""
    error, _ = said(lambda: get_peft_model(causal(), lora(), adapter_name="lr.0.1"))
    falls_in(isinstance(error, KeyError), error)


def test_lorabench_names_every_adapter_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """T6.2 T6.3"""
    folder = folder_of(causal(), tmp_path)
    pack = packed(folder, ["seed=0"], ["seed=1", "lora.r=8"])
    assert [len(pack.adapter_state(run)) for run in (0, 1)] == [8, 8]
    names = {part for name, _ in causal().named_modules() for part in name.split(".")}
    assert adapters.ADAPTER not in names | {"lora_A", "lora_B", "weight", "bias"}
    assert cli.main(["plan", "tracker=none", "+lora.adapter_name=q_proj"]) == 2
    assert "adapter_name" in capsys.readouterr().err


def test_a_base_wrapped_twice(falls_in: Falls) -> None:
    """T6.4"""
    base = causal()
    first = moved(wrapped(base))
    before = logits(first)
    second, _ = said(lambda: get_peft_model(base, lora(target_modules=["v_proj"])))
    moved(second)
    off = gap(logits(first), before)
    falls_in(off > 0.01, f"the first adapter's logits move by {off}")

    config = config_of(None, "lora.r=4")
    ours = base_model.load(config.model, "cpu")
    modules = plan.make(config).lora_modules
    start, one = logits(ours), moved(adapters.attach(ours, config, modules))
    kept = logits(one)
    moved(adapters.attach(ours, config, modules[:3]), seed=9)
    assert gap(logits(one), kept) == 0 == gap(logits(ours), start)
    assert gap(kept, start) > 0.01


def test_keys_that_do_not_fit(falls_in: Falls, tmp_path: Path) -> None:
    """T6.5"""
    folder = saved(moved(wrapped(causal(num_hidden_layers=2))), tmp_path)

    def warned(layers: int) -> list[str]:
        from peft import PeftModel

        base = causal(num_hidden_layers=layers)
        return said(lambda: PeftModel.from_pretrained(base, str(folder)))[1]

    falls_in(len(warned(3)) == 1 and "missing adapter keys" in warned(3)[0], warned(3))
    falls_in(warned(1) == [], "half of the adapter is dropped in silence")

    parameters = [[f"layers.{i}.q_proj", [4, 32]] for i in range(3)]
    place = tmp_path / "checkpoint"
    checkpoint.write(place, {"w": torch.zeros(1)}, 1, {"parameters": parameters[:2]})
    checkpoint.commit(place)
    for other in (parameters[:1], parameters):
        with pytest.raises(checkpoint.Mismatch, match="parameters: "):
            checkpoint.load(place, 1, {"parameters": other})


def test_another_base(falls_in: Falls, tmp_path: Path) -> None:
    """T6.6"""
    adapter = saved(moved(wrapped()), tmp_path / "adapter")
    mistral = built("AutoModelForCausalLM", MistralConfig(**causal().config.to_dict()))
    for base in (causal(seed=9), mistral):
        model, warned = said(lambda base=base: reloaded(base, adapter))
        falls_in(not isinstance(model, Exception) and not warned, (model, warned))

    ids, checksums = set(), set()
    for seed in (0, 9):
        folder = folder_of(causal(seed=seed), tmp_path / str(seed))
        config = config_of(folder, "lora.r=4")
        ids.add(plan.run_id(config))
        checksums.add(base_model.checksum(base_model.load(config.model, "cpu")))
    assert len(ids) == len(checksums) == 2  # another run, and no checkpoint of it fits


def test_adapters_in_one_batch(falls_in: Falls, tmp_path: Path) -> None:
    """T6.7"""
    model = wrapped(causal(), target_modules=QV)
    quiet(lambda: model.add_adapter("second", lora(target_modules=QV)))
    mixed = {"input_ids": IDS, "adapter_names": ["default", "second"] * 2}
    error, _ = said(lambda: model.train()(**mixed))
    falls_in(isinstance(error, ValueError) and "training mode" in str(error), error)

    folder = folder_of(causal(), tmp_path / "base")
    pack = packed(folder, ["seed=0"], ["seed=1", "head=lora"])
    steps(pack)
    nll_RN, _ = pack.score(batch(2))
    for run in (0, 1):
        adapters.save(pack.adapter_state(run), pack.settings(run), tmp_path / str(run))
        theirs = stock_nll(folder, tmp_path / str(run))
        # Float32: batched products of other shapes, on nll of about 4.
        assert gap(nll_RN[run], theirs) < 1e-5
        start = stock_nll(folder, saved(wrapped(causal()), tmp_path / f"start{run}"))
        assert float(theirs.mean()) < float(start.mean()) - 1e-3, "trained"


def biased(seed: int = 0) -> Any:
    """Qwen2, whose q, k and v have biases; transformers draws them as zeros."""
    model = causal("qwen2", seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def test_one_bias_adapter_a_model(falls_in: Falls, tmp_path: Path) -> None:
    """T6.8"""
    model = wrapped(biased(), bias="all")
    error, _ = said(lambda: model.add_adapter("second", lora(bias="all")))
    falls_in(isinstance(error, ValueError) and "only 1 adapter with bias" in str(error), error)

    model = wrapped(biased(), bias="all")
    quiet(lambda: model.add_adapter("second", lora(bias="none")))
    model.set_adapter("second")
    before = logits(model)
    model.set_adapter("default")
    moved(model)
    model.set_adapter("second")
    leak = gap(logits(model), before)
    falls_in(leak > 0.01, f"the other adapter's logits move by {leak}")

    folder = folder_of(biased(), tmp_path / "base")
    pack = packed(folder, ["lora.bias=none"], ["lora.bias=all"], ["lora.bias=all", "seed=1"])
    steps(pack)
    nll_RN, _ = pack.score(batch(3))
    for run in range(3):
        adapters.save(pack.adapter_state(run), pack.settings(run), tmp_path / str(run))
        # Float32, as above: each run alone on a fresh base, by stock PEFT.
        assert gap(nll_RN[run], stock_nll(folder, tmp_path / str(run))) < 1e-5
    assert len(pack.adapter_state(0)) < len(pack.adapter_state(1)) == len(pack.adapter_state(2))
