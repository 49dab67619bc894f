"""Section 3 of docs/traps.md: an lm_head tied to the embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from peft import get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lorabench import adapters, cli, plan
from lorabench import model as base_model
from lorabench.config import ConfigErrors
from lorabench.pack import ModulePack
from traps.halves import (
    VOCAB,
    causal,
    config_of,
    folder_of,
    gap,
    logits,
    lora,
    moved,
    planned,
    quiet,
    reloaded,
    said,
    saved,
    wrapped,
)

Falls = Callable[..., None]
QV = ["q_proj", "v_proj"]
# Float32 sums of 32 products in another order, two layers deep, on logits of about 1.
ROUNDING = 5e-6


def tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def untied(model: Any, say_so: bool = True) -> Any:
    """The same function, its head a Parameter of its own."""
    model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    if say_so:
        model.config.tie_word_embeddings = False
    return model


def again(model: Any, folder: Path) -> tuple[Any, list[str]]:
    """Saved and loaded, and the keys of the file that belong to head and embeddings."""
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        keys = sorted(key for key in file.keys() if "head" in key or "embed" in key)  # noqa: SIM118
    torch.manual_seed(5)
    return quiet(lambda: AutoModelForCausalLM.from_pretrained(folder)).eval(), keys


def embeddings(model: Any) -> Tensor:
    return model.get_input_embeddings().weight.detach().clone()


# --- what is tied ----------------------------------------------------------------------------


def test_which_heads_are_tied(falls_in: Falls, tmp_path: Path) -> None:
    """T3.1"""
    default = {kind: CONFIG_MAPPING[kind]().tie_word_embeddings
               for kind in ("gemma", "gemma2", "gemma3_text", "gpt2", "opt",
                            "llama", "qwen2", "qwen3", "phi3", "mistral")}  # fmt: skip
    falls_in([kind for kind, is_tied in default.items() if is_tied] == list(default)[:5], default)

    for kind in ("gemma", "gpt2", "llama", "qwen2"):
        made = planned(folder_of(causal(kind), tmp_path / kind), "head=lora")
        assert made.head.tied == default[kind] == tied(causal(kind))


def test_a_cloned_head_is_still_tied(falls_in: Falls) -> None:
    """T3.2"""
    model = causal("gemma")
    model.lm_head.weight.data = model.get_input_embeddings().weight.data.clone()
    falls_in(tied(model))

    assert base_model.is_tied(model)  # by the Parameter, not by the config or the values
    assert not base_model.is_tied(untied(model))


def test_a_head_untied_in_the_config_alone(falls_in: Falls, tmp_path: Path) -> None:
    """T3.3"""
    model = causal("gemma")
    model.lm_head.weight.data = model.get_input_embeddings().weight.data.clone()
    model.config.tie_word_embeddings = False
    loaded, keys = again(model, tmp_path)
    falls_in(keys == ["model.embed_tokens.weight"], keys)
    moves = gap(logits(loaded), logits(model))
    falls_in(moves > 0.5, f"logits move by {moves}")

    with pytest.raises(ConfigErrors, match=r"lacks lm_head\.weight.*correct tie_word_embeddings"):
        base_model.load(config_of(tmp_path).model, "cpu")


@pytest.mark.parametrize("say_so", [True, False])
def test_an_untied_head_is_tied_again(say_so: bool, falls_in: Falls, tmp_path: Path) -> None:
    """T3.4"""
    by_call, resized, kept = (untied(causal("gemma"), say_so) for _ in range(3))
    by_call.tie_weights()
    quiet(lambda: resized.resize_token_embeddings(VOCAB + 6))
    loaded, keys = again(kept, tmp_path)
    found = [tied(by_call), tied(resized), tied(loaded)]
    falls_in(found == [not say_so] * 3, found)
    assert keys == ["lm_head.weight", "model.embed_tokens.weight"]

    # What lorabench reads is what it gets: such a folder is planned as it will be loaded.
    config = config_of(tmp_path)
    base = base_model.load(config.model, "cpu")
    assert base_model.is_tied(base) == plan.make(config).head.tied == tied(loaded)


# --- policies on a tied head -----------------------------------------------------------------


def adapted(base: Any = None, **settings: Any) -> Any:
    """An adapter on tiny Gemma that has trained."""
    base = causal("gemma") if base is None else base
    return moved(wrapped(base, **({"target_modules": QV} | settings)))


def merged(model: Any) -> Any:
    return quiet(model.merge_and_unload).eval()


HEAD = {"target_modules": [*QV, "lm_head"]}


@pytest.mark.parametrize(
    "settings", [{}, {"modules_to_save": ["lm_head"]}], ids=["exclude", "full"]
)
def test_policies_that_merge(settings: dict, tmp_path: Path) -> None:
    """T3.5 T3.9"""
    model = adapted(**settings)
    before, drift = logits(model), embeddings(causal("gemma"))
    folder = saved(model, tmp_path)
    assert gap(logits(reloaded(causal("gemma"), folder)), before) == 0
    whole = merged(model)
    assert gap(logits(whole), before) < ROUNDING
    assert gap(embeddings(whole), drift) == 0
    assert whole.config.tie_word_embeddings == tied(whole) == ("modules_to_save" not in settings)


def test_a_merge_into_a_tied_head(falls_in: Falls, tmp_path: Path) -> None:
    """T3.6"""
    model = adapted(**HEAD)
    before = logits(model)
    folder = saved(model, tmp_path)
    assert gap(logits(reloaded(causal("gemma"), folder)), before) == 0
    whole = merged(model)
    off, drift = gap(logits(whole), before), gap(embeddings(whole), embeddings(causal("gemma")))
    falls_in(off > 1 and drift > 0.1, f"logits off by {off}, embeddings drift by {drift}")

    made = planned(None, "head=lora")
    assert made.head.tied and "an adapter on a tied head" in made.head.consequence


def test_tied_adapters_merge_twice(falls_in: Falls) -> None:
    """T3.7"""
    model = adapted(**HEAD, ensure_weight_tying=True)
    before, start = logits(model), embeddings(causal("gemma"))
    layer = model.get_base_model().lm_head
    delta = layer.get_delta_weight("default").detach()
    twin = model.get_base_model().model.embed_tokens.get_delta_weight("default").detach()
    whole = merged(model)
    off = gap(logits(whole), before)
    falls_in(off > 1, f"logits off by {off}")
    # Once by the head and once by the embeddings, into the one Parameter they share.
    falls_in(tied(whole) and gap(delta, twin) == 0)
    falls_in(gap(embeddings(whole), start + 2 * delta) < ROUNDING)


def test_a_merge_into_an_untied_head(tmp_path: Path) -> None:
    """T3.8"""
    model = adapted(untied(causal("gemma")), **HEAD)
    before = logits(model)
    folder = saved(model, tmp_path)
    assert gap(logits(reloaded(untied(causal("gemma")), folder)), before) == 0
    assert gap(logits(merged(model)), before) < ROUNDING


def test_an_adapter_of_a_tied_head_merges_into_an_untied_one(tmp_path: Path) -> None:
    """T3.10"""
    model = adapted(**HEAD)
    before, folder = logits(model), saved(model, tmp_path)
    moved_over = reloaded(untied(causal("gemma")), folder)
    assert gap(logits(moved_over), before) == 0
    assert gap(logits(merged(moved_over)), before) < ROUNDING


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of trained runs on the embedded base, whose head is tied, by head policy."""
    folder = tmp_path_factory.mktemp("outputs")
    words = ["tracker=none", "data.num_train=32", "data.num_validation=4", "data.num_test=4",
             "trainer.steps=4", "trainer.batch_size=2", "trainer.lr=1e-2", "lora.r=4",
             "trainer.num_threads=1", f"output_dir={folder}"]  # fmt: skip
    assert cli.main(["train", "-m", *words, "head=exclude,lora,full"]) == 0
    return {policy: plan.folder(composed(*words, f"head={policy}"))
            for policy in ("exclude", "lora", "full")}  # fmt: skip


def embedded() -> Any:
    return base_model.load(config_of(None).model, "cpu")


@pytest.mark.parametrize("policy", ["exclude", "lora", "full"])
def test_every_policy_exports_to_a_merged_model(
    policy: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    """T3.5 T3.6 T3.7 T3.8 T3.9 T3.10"""
    before = logits(reloaded(embedded(), runs[policy] / "adapter"))
    assert cli.main(["export", str(runs[policy]), "--to", "merged", str(tmp_path / "whole")]) == 0
    whole = quiet(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "whole")).eval()
    scale = float(before.abs().max())
    assert gap(logits(whole), before) < ROUNDING * max(1.0, scale)
    assert gap(embeddings(whole), embeddings(embedded())) == 0
    assert tied(whole) == (policy == "exclude")


# --- warnings and files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "targets", "warns"),
    [
        ("gemma", ["q_proj", "lm_head"], True),
        ("gpt2", ["c_attn", "wte"], False),
        ("gemma", r".*q_proj|model\.embed_tokens", False),
    ],
)
def test_the_warning_knows_two_names(
    kind: str, targets: Any, warns: bool, falls_in: Falls, tmp_path: Path
) -> None:
    """T3.11"""
    settings = lora(target_modules=targets)
    model, warned = said(lambda: get_peft_model(causal(kind), settings))
    falls_in(any("tied" in text for text in warned) == warns, warned)
    before = logits(moved(model.eval()))
    off = gap(logits(merged(model)), before)
    falls_in(off > 0.05, f"and the merge moves logits by {off}")

    # Known by the tensors, whatever the names.
    made = planned(folder_of(causal(kind), tmp_path), "head=lora")
    assert made.head.tied and "an adapter on a tied head" in made.head.consequence


def keys_of(adapter: Path) -> set[str]:
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


def test_the_base_weight_is_saved_with_the_adapter(
    falls_in: Falls, runs: dict[str, Path], tmp_path: Path
) -> None:
    """T3.12"""
    model = adapted(**HEAD)
    plain = keys_of(saved(model, tmp_path / "plain"))
    falls_in("base_model.model.lm_head.base_layer.weight" in plain, plain)
    quiet(lambda: model.save_pretrained(str(tmp_path / "lean"), save_embedding_layers=False))
    assert keys_of(tmp_path / "lean") == {key for key in plain if "lora_" in key}

    ours = keys_of(runs["lora"] / "adapter")
    assert all("lora_" in key for key in ours) and any("lm_head" in key for key in ours)


def test_an_adapter_that_overwrites_the_embeddings(
    falls_in: Falls, runs: dict[str, Path], tmp_path: Path
) -> None:
    """T3.13"""
    folder = saved(adapted(**HEAD), tmp_path)
    other = causal("gemma", seed=8)
    before = embeddings(other)
    _, warned = said(lambda: reloaded(other, folder))
    drift = gap(embeddings(other), before)
    falls_in(drift > 0.01 and not warned, f"embeddings move by {drift}, {warned}")

    for policy in ("lora", "full"):
        base = embedded()
        with torch.no_grad():
            base.get_input_embeddings().weight.add_(0.5)
        start = embeddings(base)
        reloaded(base, runs[policy] / "adapter")
        assert gap(embeddings(base), start) == 0


@pytest.mark.parametrize("policy", ["exclude", "lora", "full"])
def test_stock_peft_reloads_what_was_trained(policy: str, tmp_path: Path) -> None:
    """T3.5 T3.6 T3.9"""
    config = config_of(None, f"head={policy}", "lora.r=4", "target_modules=attention")
    pack = ModulePack(embedded(), config, plan.make(config).lora_modules, "cpu")
    moved(pack.tree)
    adapters.save(pack.adapter_state(0), pack.settings(0), tmp_path)
    trained = logits(pack.tree.eval())
    assert gap(logits(reloaded(embedded(), tmp_path)), trained) == 0
    assert gap(logits(embedded()), trained) > 0.1
