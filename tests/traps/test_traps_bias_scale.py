"""Section 7 of docs/traps.md: bias, scale and dropout."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import composed
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from lorabench import adapters, cli, config, plan
from lorabench import model as base_model
from lorabench.pack import ModulePack
from traps.conftest import parts
from traps.halves import (
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
    said,
    trains,
    wrapped,
)

Falls = Callable[..., None]
Q = "model.layers.0.self_attn.q_proj"


def test_a_larger_r_scales_less(falls_in: Falls) -> None:
    """T7.1"""
    falls_in((LoraConfig().r, LoraConfig().lora_alpha) == (8, 8))
    scales = {}
    for r in (8, 16, 64):
        model = said(
            lambda r=r: get_peft_model(causal(), LoraConfig(r=r, target_modules=["q_proj"]))
        )
        scales[r] = adapters.lora_layers(model[0])[Q].scaling["default"]
    falls_in(scales == {8: 1.0, 16: 0.5, 64: 0.125}, scales)

    assert [planned(None, f"lora.r={r}").scale for r in (8, 16, 64)] == [2.0] * 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_alpha": 0}, "lora.lora_alpha=0"),
        ({"lora_alpha": -8}, "lora.lora_alpha=-8"),
        ({"lora_dropout": 1.0}, "lora.lora_dropout=1.0"),
        ({"lora_dropout": -0.1}, "lora.lora_dropout=-0.1"),
    ],
)
def test_values_out_of_range(
    settings: dict, words: str, falls_in: Falls, capsys: pytest.CaptureFixture[str]
) -> None:
    """T7.2"""
    model, warned = said(lambda: get_peft_model(causal(), lora(**settings)))
    falls_in(not isinstance(model, Exception) and not warned, (model, warned))

    with pytest.raises(config.ConfigErrors) as refused:
        composed(words)
    (line,) = refused.value.errors
    assert line.startswith(f"{words.partition('=')[0]}: must be ")
    if words == "lora.lora_dropout=1.0":
        assert cli.main(["train", "tracker=none", words]) == 2
        assert capsys.readouterr().err.splitlines() == [line]


def test_an_r_larger_than_the_layer(falls_in: Falls, tmp_path: Path) -> None:
    """T7.3"""
    model, warned = said(lambda: get_peft_model(causal(), lora(r=256)))
    layer = adapters.lora_layers(model)[Q]
    falls_in(tuple(layer.lora_A["default"].weight.shape) == (256, 32) and not warned, warned)

    folder = folder_of(causal(), tmp_path)
    (said_so,) = [w for w in planned(folder, "lora.r=17").warnings if w.startswith("lora.r: ")]
    assert "17 is more than the smaller side of 4 modules" in said_so and "k_proj: 16" in said_so
    assert not [w for w in planned(folder, "lora.r=16").warnings if w.startswith("lora.r: ")]
    patterned = planned(folder, "lora.r=16", "lora.rank_pattern={q_proj:40}").warnings
    (said_so,) = [w for w in patterned if w.startswith("lora.r: ")]
    assert "40 is more than the smaller side of 2 modules" in said_so and "q_proj: 32" in said_so


@pytest.mark.parametrize("policy", ["all", "lora_only"])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_bias_policy_without_biases(
    kind: str, policy: str, falls_in: Falls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """T7.4"""
    model, warned = said(lambda: get_peft_model(causal(kind), lora(bias=policy)))
    falls_in(not warned and all(".lora_" in name for name in trains(model)), trains(model))

    folder = folder_of(causal(kind), tmp_path)
    line = refusal(folder, f"lora.bias={policy}")
    assert line.startswith(f"lora.bias: {policy} must find a bias to train; ")
    words = ["tracker=none", "model=local", f"model.path={folder}", f"lora.bias={policy}"]
    assert cli.main(["plan", *words]) == 2
    assert capsys.readouterr().err.splitlines() == [line]


def test_biases_that_are_trained_are_saved(falls_in: Falls, tmp_path: Path) -> None:
    """T7.5"""
    model = wrapped(causal("qwen2"), bias="lora_only")
    trained = {name for name in trains(model) if name.endswith("bias")}
    kept = {name for name in quiet(lambda: get_peft_model_state_dict(model)) if "bias" in name}
    assert len(trained) == 2
    if parts(version("peft")) < (0, 21):
        falls_in(kept == set(), kept)
    else:
        assert kept == trained, "mended in peft 0.21"

    folder = folder_of(causal("qwen2"), tmp_path / "base")
    names = ["target_modules=custom", "target_modules.names=[q_proj]", "lora.bias=lora_only"]
    settings = config_of(folder, *names, "lora.r=4")
    pack = ModulePack(base_model.load(settings.model, "cpu"), settings,
                      plan.make(settings).lora_modules, "cpu")  # fmt: skip
    moved(pack.tree)
    assert trained <= set(pack.adapter_state(0))
    adapters.save(pack.adapter_state(0), pack.settings(0), tmp_path / "ours")
    again = reloaded(causal("qwen2"), tmp_path / "ours")
    assert gap(logits(again), logits(pack.tree.eval())) == 0


def test_a_copied_head_in_half_precision(falls_in: Falls, tmp_path: Path) -> None:
    """T7.6"""
    folder = folder_of(causal().bfloat16(), tmp_path)
    model = wrapped(causal().bfloat16(), modules_to_save=["lm_head"])
    kinds = {name.split(".")[-3] if "lora_" in name else "copy": p.dtype
             for name, p in model.named_parameters() if p.requires_grad}  # fmt: skip
    falls_in(kinds == {"lora_A": torch.float32, "lora_B": torch.float32, "copy": torch.bfloat16})

    settings = config_of(folder, "model.dtype=bfloat16", "head=full")
    base = base_model.load(settings.model, "cpu")
    ours = adapters.attach(base, settings, plan.make(settings).lora_modules)
    dtypes = {name: p.dtype for name, p in adapters.trainable(ours).items()}
    assert any("lm_head" in name for name in dtypes)
    assert set(dtypes.values()) == {torch.float32}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_change_the_base(init: str, falls_in: Falls, tmp_path: Path) -> None:
    """T7.7"""
    base = causal()
    before = base.get_submodule(Q).weight.detach().clone(), logits(base)
    model = wrapped(base, init_lora_weights=init, target_modules="all-linear")
    drift = gap(model.get_submodule(f"base_model.model.{Q}").base_layer.weight, before[0])
    with model.disable_adapter():
        off = gap(logits(model), before[1])
    falls_in(drift > 1e-3 and off > 1e-3, f"weights drift by {drift}, logits by {off}")

    checkpoint = folder_of(causal(), tmp_path / "base")
    settings = config_of(checkpoint, f"lora.init={init}", "lora.r=4")
    ours = base_model.load(settings.model, "cpu")
    checksum = base_model.checksum(ours)
    pack = ModulePack(ours, settings, plan.make(settings).lora_modules, "cpu")
    moved(pack.tree)
    adapters.save(pack.adapter_state(0), pack.settings(0), tmp_path / "ours")
    assert base_model.checksum(ours) == checksum
    again = reloaded(causal(), tmp_path / "ours")
    # Float32: W_res is W - s B0 A0 rounded once, in seven modules of two layers.
    assert gap(logits(again), logits(pack.tree.eval())) < 1e-5
