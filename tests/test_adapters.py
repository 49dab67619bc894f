"""Seeded weights, PEFT files, and what injection leaves alone."""

from __future__ import annotations

import gc
import json
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import compositions
import pytest
import torch
from conftest import composed
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Elsewhere

from lorabench import adapters, plan
from lorabench import model as base_model
from lorabench.adapters import inject
from lorabench.config import ConfigErrors

TINY = ["tracker=none"]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    r=st.integers(1, 64),
    more=st.integers(0, 64),
    width=st.integers(1, 200),
    init=st.sampled_from(["default", "gaussian"]),
)
def test_smaller_ranks_are_the_first_rows_of_larger_ones(
    seed: int, r: int, more: int, width: int, init: str
) -> None:
    small = adapters.initial_a(seed, "layer", r, width, init)
    large = adapters.initial_a(seed, "layer", r + more, width, init)
    scale = (r + more) / r if init == "gaussian" else 1.0  # N(0, 1/r^2), PEFT's scheme
    # One float32 multiplication's rounding.
    torch.testing.assert_close(small, large[:r] * scale, rtol=1e-6, atol=0)


def test_initial_a_has_pefts_distribution() -> None:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    torch.manual_seed(0)
    layer = Linear(torch.nn.Linear(256, 8), "default", LoraConfig(), r=64, lora_alpha=8)
    theirs = layer.lora_A["default"].weight.detach().flatten()
    mine = adapters.initial_a(0, "layer", 64, 256).flatten()
    # 16,384 uniform draws each: extremes within 1% of the bound, standard deviations within 3%.
    assert float(mine.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=0.01)
    assert float(mine.std()) == pytest.approx(float(theirs.std()), rel=0.03)
    assert abs(float(mine.mean())) < 0.002


def test_adding_a_target_or_raising_r_leaves_shared_weights_unchanged() -> None:
    base = base_model.load(composed(*TINY).model, "cpu")

    def initial(*overrides: str) -> dict[str, torch.Tensor]:
        config = composed(*TINY, *overrides)
        wrapped = adapters.attach(base, config, plan.make(config).lora_modules)
        return adapters.adapter_state(wrapped)

    attention = initial("target_modules=attention")
    more = initial("target_modules=all-linear", "head=lora", "lora.r=64")
    assert len(attention) < len(more)
    for name, tensor in attention.items():
        if "lora_A" in name:
            assert torch.equal(tensor, more[name][:16]), name
    other = initial("target_modules=attention", "seeds.init=1")
    assert all(not torch.equal(attention[n], other[n]) for n in attention if "lora_A" in n)
    again = initial("target_modules=attention", "seeds.data=1", "seeds.dropout=1")
    assert all(torch.equal(attention[n], again[n]) for n in attention)


@pytest.mark.parametrize(
    "overrides", [["head=lora"], ["head=full"], ["head=exclude", "lora.bias=none"]]
)
def test_injection_leaves_the_base_as_it_was(overrides: list[str]) -> None:
    config = composed(*TINY, *overrides)
    base = base_model.load(config.model, "cpu")
    before = base_model.checksum(base), str(base), base.config.to_dict(), base_model.is_tied(base)
    wrapped = adapters.attach(base, config, plan.make(config).lora_modules)
    shared = {p.data_ptr() for p in base.parameters()}
    trained = adapters.trainable(wrapped)
    assert trained and not any(p.data_ptr() in shared for p in trained.values())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(1)
    assert before == (
        base_model.checksum(base),
        str(base),
        base.config.to_dict(),
        base_model.is_tied(base),
    )
    assert not any(p.requires_grad for p in base.parameters())


def test_checksum_sees_one_flipped_bit_and_swapped_rows() -> None:
    base = base_model.load(composed(*TINY).model, "cpu")
    before = base_model.checksum(base)
    weight = next(base.parameters()).data
    original = weight.clone()
    weight.view(torch.int32)[3, 5] ^= 1
    assert base_model.checksum(base) != before
    weight.copy_(original)
    assert base_model.checksum(base) == before
    weight[[0, 1]] = weight[[1, 0]]
    assert base_model.checksum(base) != before


SAVE = """
import sys
from pathlib import Path
from lorabench import adapters, cli, config, model, plan
cfg = config.typed(cli.compose(["tracker=none", "head=lora", "lora.r=4"]).configs[0])
wrapped = adapters.attach(model.load(cfg.model, "cpu"), cfg, plan.make(cfg).lora_modules)
state = adapters.adapter_state(wrapped)
print(adapters.save(state, wrapped.peft_config["default"], Path(sys.argv[1])))
print(hash("lora_A"))
"""


def test_saved_folder_is_plain_peft_and_the_same_under_any_hash_seed(
    elsewhere: Elsewhere,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.setattr(sys, "argv", ["-c", str(here)])
    exec(SAVE, {})
    printed = [capfd.readouterr().out]
    printed.append(elsewhere.run(SAVE, there))
    hashes, seeds = zip(*(lines.splitlines()[-2:] for lines in printed), strict=True)
    assert seeds[0] != seeds[1], "two hash seeds"
    contents = [
        (saved, {p.name: p.read_bytes() for p in folder.iterdir()})
        for saved, folder in zip(hashes, (here, there), strict=True)
    ]
    assert contents[0] == contents[1]
    assert set(contents[0][1]) == {"adapter_config.json", "adapter_model.safetensors"}
    settings = json.loads(contents[0][1]["adapter_config.json"])
    assert Path(settings["base_model_name_or_path"]).is_dir()
    from safetensors.torch import load

    keys = set(load(contents[0][1]["adapter_model.safetensors"]))
    assert not any("base_layer" in key or "embed_tokens" in key for key in keys)
    assert {k for k in keys if "lm_head" in k} == {
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.lm_head.lora_B.weight",
    }


@pytest.mark.parametrize(
    "overrides", [["lora.init=pissa"], ["lora.init=olora", "lora.use_rslora=true"]]
)
def test_an_init_that_changes_the_base_is_saved_as_plain_lora(
    overrides: list[str], tmp_path: Path
) -> None:
    """Reloaded by stock PEFT on the untouched base it gives the trained model's logits."""
    from peft import PeftModel

    from lorabench.pack import ModulePack

    config = composed(*TINY, *overrides, "lora.r=4", "target_modules=attention")
    base = base_model.load(config.model, "cpu")
    before = base_model.checksum(base)
    pack = ModulePack(base, config, plan.make(config).lora_modules, "cpu")
    with torch.no_grad():
        for parameter in pack.parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.randint(3, 100, (2, 12))
    with torch.no_grad():
        trained, untouched = pack.tree.eval()(input_ids=ids).logits, base(input_ids=ids).logits
    adapters.save(pack.adapter_state(0), pack.settings(0), tmp_path)
    assert base_model.checksum(base) == before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own, of transformers' renaming
        fresh = base_model.load(config.model, "cpu")
        reloaded = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    with torch.no_grad():
        logits = reloaded(input_ids=ids).logits
    assert float((trained - untouched).abs().max()) > 0.1
    # Float32: W_res is W - s B0 A0 rounded once, four layers deep.
    torch.testing.assert_close(logits, trained, rtol=1e-4, atol=1e-4)


def test_pissa_on_a_tied_head_is_refused() -> None:
    with pytest.raises(ConfigErrors, match="tied to its embeddings"):
        plan.make(composed(*TINY, "lora.init=pissa", "head=lora"))


def test_a_skeletons_adapters_are_kept_by_the_caller_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this module would keep the modules of every base that was ever planned."""
    monkeypatch.setattr(
        inject, "_attach_skeleton", compositions.attached
    )  # the one that keeps none
    config = composed()
    skeleton = compositions.built(config.model)
    known: dict[str, Any] = {}
    asked = skeleton, config, ["model.layers.0.mlp.up_proj"]
    kept = adapters.attach_skeleton(*asked, known)
    assert adapters.attach_skeleton(*asked, known) is kept
    assert adapters.attach_skeleton(*asked) is not kept and len(known) == 1
    gc.collect()
    gc.disable()
    try:
        watched = [weakref.ref(skeleton), *map(weakref.ref, known.values())]
        known.clear()
        del skeleton, asked, kept
        assert [one() for one in watched] == [None, None]
    finally:
        gc.enable()
