"""Section 1 of docs/traps.md: which modules get an adapter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import LoraConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
from processes import Elsewhere
from tiny import SMALL

from lorabench import adapters, cli, plan, versions
from traps.halves import (
    VOCAB,
    built,
    causal,
    config_of,
    experts,
    folder_of,
    leaves,
    logits,
    lora,
    planned,
    quiet,
    refusal,
    reloaded,
    said,
    saved,
    wrapped,
)

Falls = Callable[..., None]
LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def wrap(model: Any, **changes: Any) -> tuple[Any, list[str]]:
    """Plain PEFT's answer to these settings, and what it says."""
    from peft import get_peft_model

    return said(lambda: get_peft_model(model, lora(**changes)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(causal(), tmp_path_factory.mktemp("llama"))


def test_an_architecture_without_defaults(falls_in: Falls, tmp_path: Path) -> None:
    """T1.1"""
    mapped = {"llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"}
    unmapped = {"gemma3", "qwen2_moe", "qwen3_moe", "phi3", "gpt_oss", "olmo2", "granite", "cohere"}
    falls_in(mapped <= set(DEFAULTS) and not unmapped & set(DEFAULTS), sorted(DEFAULTS))
    sizes = SMALL | {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1}
    phi3 = built("AutoModelForCausalLM", transformers.Phi3Config(**sizes))
    error, _ = wrap(phi3, target_modules=None)
    falls_in(isinstance(error, ValueError) and "Please specify `target_modules`" in str(error))
    falls_in("qkv_proj" not in str(error), "the error names what there is")

    line = refusal(folder_of(phi3, tmp_path), "target_modules=auto")
    assert f"default modules for {len(DEFAULTS)} architectures, 'phi3' is not among" in line
    assert line.endswith("out of: down_proj, gate_up_proj, o_proj, qkv_proj")


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_defaults_of_a_mixture_of_experts(kind: str, falls_in: Falls, tmp_path: Path) -> None:
    """T1.2"""
    falls_in(("mixtral" in DEFAULTS, "qwen3_moe" in DEFAULTS) == (True, False))
    model = experts(kind)
    error, _ = wrap(model, target_modules=None)
    falls_in(isinstance(error, ValueError) and "no `target_parameters` found" in str(error), error)

    folder = folder_of(model, tmp_path)
    if too_old := versions.too_old_for_experts():
        assert too_old in refusal(folder, "target_modules=auto")
    elif kind in DEFAULTS:
        assert leaves(planned(folder, "target_modules=auto").lora_modules) == set(DEFAULTS[kind])
    else:
        line = refusal(folder, "target_modules=auto")
        assert "names out of: " in line and "q_proj" in line


def test_a_name_is_a_regex(falls_in: Falls, llama: Path) -> None:
    """T1.3"""
    error, _ = wrap(causal(), target_modules="q_proj")
    falls_in("Target modules q_proj not found" in str(error), error)
    assert len(wrapped(target_modules=".*q_proj").targeted_module_names) == 2

    custom = ["target_modules=custom", "target_modules.names=q_proj"]
    line = refusal(llama, *custom)
    assert "must match the whole name" in line and "did you mean '.*\\.q_proj'" in line


def test_a_list_that_matches_nothing(falls_in: Falls, llama: Path) -> None:
    """T1.4"""
    error, _ = wrap(causal(), target_modules=["q_porj"])
    falls_in("Target modules {'q_porj'} not found" in str(error) and "q_proj" not in str(error))

    line = refusal(llama, "target_modules=custom", "target_modules.names=[q_porj]")
    assert line.endswith("unmatched: 'q_porj' (did you mean 'q_proj'?)")


def test_a_list_that_matches_in_part(
    falls_in: Falls, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """T1.5"""
    model, warned = wrap(causal(), target_modules=["q_proj", "v_porj"])
    falls_in(not warned, warned)
    falls_in(leaves(model.targeted_module_names) == {"q_proj"})
    falls_in("v_porj" in model.peft_config["default"].target_modules)

    names = ["target_modules=custom", "target_modules.names=[q_proj,v_porj]"]
    line = refusal(llama, *names)
    assert line.endswith("unmatched: 'v_porj' (did you mean 'v_proj'?)")
    arguments = ["plan", "tracker=none", "model=local", f"model.path={llama}", *names]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.splitlines() == [line]


def test_modules_to_save_that_match_nothing(
    falls_in: Falls, capsys: pytest.CaptureFixture[str]
) -> None:
    """T1.6"""
    model, warned = wrap(causal(), modules_to_save=["zzz"])
    falls_in(not warned, warned)
    falls_in(not any("modules_to_save" in name for name, _ in model.named_parameters()))

    assert cli.main(["plan", "tracker=none", "+lora.modules_to_save=[zzz]"]) == 2
    assert "modules_to_save" in capsys.readouterr().err  # no such key
    assert planned(None, "head=full").saved_modules == ["lm_head"]


def test_modules_to_save_match_by_the_end_of_a_word(falls_in: Falls, llama: Path) -> None:
    """T1.7"""
    model, warned = wrap(causal(), modules_to_save=["norm"])
    copied = {n.split(".modules_to_save")[0] for n, p in model.named_parameters()
              if p.requires_grad and "modules_to_save" in n}  # fmt: skip
    falls_in(leaves(copied) == {"norm", "input_layernorm", "post_attention_layernorm"}, copied)
    falls_in(not warned, warned)

    without, full = (planned(llama, f"head={policy}") for policy in ("exclude", "full"))
    assert full.saved_modules == ["lm_head"]  # and nothing else is trained in full
    assert full.trainable_parameters - without.trainable_parameters == VOCAB * 32


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_match_nothing(key: str, falls_in: Falls, llama: Path) -> None:
    """T1.8"""
    model, warned = wrap(causal(), **{key: {"v_proj": 2}})
    falls_in(len(warned) <= 1, warned)  # none at all in peft 0.19
    layer = adapters.lora_layers(model)["model.layers.0.self_attn.q_proj"]
    falls_in((layer.r["default"], layer.scaling["default"]) == (4, 2.0))

    names = ["target_modules=custom", "target_modules.names=[q_proj]"]
    line = refusal(llama, *names, f"lora.{key}={{v_proj:2}}")
    assert line.startswith(f"lora.{key}: every entry must match") and "'v_proj'" in line


def test_exclusions_that_match_nothing(
    falls_in: Falls, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """T1.9"""
    for key in ("exclude_modules", "target_parameters"):
        model, warned = wrap(causal(), **{key: ["zzz"]})
        falls_in(len(warned) == 1 and key in warned[0], warned)
        falls_in(len(model.targeted_module_names) == 2)

    names = ["target_modules=custom", "target_modules.names=[q_proj]"]
    line = refusal(llama, *names, "target_modules.exclude=[k_proj]")
    assert "target_modules.exclude: every name must match" in line and "'k_proj'" in line
    assert cli.main(["plan", "tracker=none", "+lora.target_parameters=[zzz]"]) == 2
    assert "target_parameters" in capsys.readouterr().err


def test_a_config_used_twice(falls_in: Falls, tmp_path: Path) -> None:
    """T1.10"""
    from peft import get_peft_model

    shared = lora(target_modules="all-linear")
    quiet(lambda: get_peft_model(causal(), shared))
    falls_in(shared.target_modules != "all-linear", shared.target_modules)
    deeper, warned = said(lambda: get_peft_model(causal(num_hidden_layers=4), shared))
    falls_in(len(deeper.targeted_module_names) == 14 and not warned, warned)  # of 28

    config = config_of(None, "target_modules=all-linear")
    before, counts = dataclasses.asdict(config), []
    for layers in (2, 4):
        folder = folder_of(causal(num_hidden_layers=layers), tmp_path / str(layers))
        config.model.path = str(folder)
        counts.append(len(plan.make(config).lora_modules))
    assert counts == [14, 28]
    config.model.path = before["model"]["path"]
    assert dataclasses.asdict(config) == before


def test_the_order_of_saved_targets(falls_in: Falls, elsewhere: Elsewhere, tmp_path: Path) -> None:
    """T1.11"""
    names = [f"{leaf}_{i}" for leaf in LAYER[:6] for i in range(2)]  # a chance in 12! to agree
    script = f"""
import sys, pathlib
from peft import LoraConfig
from lorabench import adapters
settings = LoraConfig(target_modules={names})
settings.save_pretrained(sys.argv[1] + "/plain")
adapters.save({{}}, settings, pathlib.Path(sys.argv[1]) / "lorabench")
"""
    here, there = (tmp_path / name for name in ("here", "there"))
    (there / "plain").mkdir(parents=True)
    elsewhere.run(script, there)  # under another hash seed
    settings = LoraConfig(target_modules=names)
    settings.save_pretrained(str(here / "plain"))
    adapters.save({}, settings, here / "lorabench")

    def order(place: Path) -> list[str]:
        return json.loads((place / "adapter_config.json").read_text())["target_modules"]

    falls_in(order(here / "plain") != order(there / "plain"))
    assert order(here / "lorabench") == order(there / "lorabench") == sorted(names)


def test_twenty_targets_are_shortened(falls_in: Falls, tmp_path: Path) -> None:
    """T1.12"""
    names = [f"model.layers.{i}.self_attn.{leaf}" for i in range(5) for leaf in LAYER[:4]]
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=names)
    from peft import get_peft_model

    model = quiet(lambda: get_peft_model(causal(num_hidden_layers=5), settings))
    falls_in(set(settings.target_modules or ()) == set(LAYER[:4]), settings.target_modules)
    folder = saved(model, tmp_path / "adapter")
    deeper = reloaded(causal(num_hidden_layers=6), folder)
    falls_in(len(deeper.targeted_module_names) == 24)  # 20 were meant and trained

    # The plan, and so the record, keeps every name; on its own base the folder means the same.
    base = folder_of(causal(num_hidden_layers=5), tmp_path / "base")
    names_of_all = f"target_modules.names=[{','.join(LAYER[:4])}]"
    config = config_of(base, "target_modules=custom", names_of_all)
    made = plan.make(config)
    assert sorted(made.lora_modules) == sorted(names)
    from lorabench import model as base_model

    ours = adapters.attach(base_model.load(config.model, "cpu"), config, made.lora_modules)
    adapters.save(adapters.adapter_state(ours), ours.peft_config["default"], tmp_path / "ours")
    again = reloaded(causal(num_hidden_layers=5), tmp_path / "ours")
    assert sorted(again.targeted_module_names) == sorted(names)
    assert logits(again).equal(logits(ours.eval()))
