"""Which modules a choice means: against PEFT's own rules, on dense, routed and multimodal bases."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from peft import LoraConfig, get_peft_model
from tiny import SMALL

from lorabench import adapters, cli, plan
from lorabench.adapters import anatomy
from lorabench.config import Config, ConfigErrors

VOCABULARY = 280  # the embedded tokenizer's, rounded up
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def transformers_config(kind: str) -> Any:
    import transformers as t

    common = SMALL | {"vocab_size": VOCABULARY}
    if kind == "gemma3 with vision":
        vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        return t.Gemma3Config(text_config=common, vision_config=vision, mm_tokens_per_image=4)
    if kind == "llama4":
        return t.Llama4TextConfig(**common, num_local_experts=4, intermediate_size_mlp=64)
    if kind == "mixtral":
        return t.MixtralConfig(**common, num_local_experts=4)
    if kind == "granitemoe":
        return t.GraniteMoeConfig(**common, num_local_experts=4, num_experts_per_tok=2)
    if kind == "qwen2_moe":
        return t.Qwen2MoeConfig(**common, **ROUTED, shared_expert_intermediate_size=16)
    if kind == "qwen3_moe with a dense layer":
        return t.Qwen3MoeConfig(**common, **ROUTED, mlp_only_layers=[0])
    assert kind == "mamba2"  # a convolution has three dimensions too
    return t.Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8,
        state_size=8, n_groups=1,
    )  # fmt: skip


def skeleton(kind: str) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(transformers_config(kind))


def peft_wraps(base: Any, **settings: Any) -> Any:
    """Stock PEFT on a copy, its warnings aside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(base), LoraConfig(**settings), low_cpu_mem_usage=True)


def resolved(kind: str, *overrides: str) -> list[str]:
    return adapters.resolve_modules(skeleton(kind), composed(*overrides))


def custom(names: str, *more: str) -> list[str]:
    return ["target_modules=custom", f"target_modules.names={names}", *more]


# --- parts of a base -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "routers"),
    [
        ("mixtral", {"gate"}),
        ("qwen2_moe", {"gate", "shared_expert_gate"}),
        ("qwen3_moe with a dense layer", {"gate"}),
        ("granitemoe", {"router"}),
        ("llama4", {"router"}),
        ("gemma3 with vision", set()),
        ("mamba2", set()),
    ],
)
def test_experts_and_routers_are_told_by_shape_and_place(kind: str, routers: set[str]) -> None:
    base = skeleton(kind)
    found = anatomy.experts(base)
    assert set(found.values()) == ({4} if routers else set())
    assert all(name.endswith(".experts") for name in found)
    assert {name.rpartition(".")[2] for name in anatomy.routers(base)} == routers
    assert not anatomy.towers(base) or "vision" in kind


def test_experts_that_are_modules_are_found_too() -> None:
    """As before transformers 5, and in models that bring code of their own."""
    base = skeleton("mixtral")
    for layer in base.model.layers:
        layer.mlp.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(4))
        layer.mlp.gate = torch.nn.Linear(32, 4, bias=False)
    assert set(anatomy.experts(base).values()) == {4}
    found = adapters.resolve_modules(base, composed("target_modules=all-linear"))
    assert {name.split(".")[-1] for name in found} >= {"q_proj", "0", "3"}
    assert not any(name.endswith("gate") for name in found)


# --- routers and experts ---------------------------------------------------------------------


@pytest.mark.parametrize("select", ["attention", "mlp", "all-linear"])
def test_a_linear_router_is_left_out_and_the_plan_says_so(select: str) -> None:
    base = skeleton("llama4")
    linear_router = "model.layers.0.feed_forward.router"
    assert isinstance(base.get_submodule(linear_router), torch.nn.Linear)
    modules = adapters.resolve_modules(base, composed(f"target_modules={select}"))
    assert modules and linear_router not in modules
    said = adapters.notes(base, modules)
    assert any(f"2 routers (such as {linear_router}): left out unless asked" in s for s in said)
    assert any("4 expert parameters" in s and "no linear layers" in s for s in said)


@pytest.mark.parametrize("names", ["[q_proj,router]", "[q_proj,feed_forward.router]"])
def test_a_router_asked_for_by_name_is_taken(names: str) -> None:
    base = skeleton("llama4")
    modules = adapters.resolve_modules(base, composed(*custom(names)))
    assert sorted(n for n in modules if n.endswith("router")) == [
        f"model.layers.{i}.feed_forward.router" for i in (0, 1)
    ]
    assert not any("router" in said for said in adapters.notes(base, modules))


def test_all_linear_on_routed_experts_is_a_list_that_peft_leaves_as_it_is() -> None:
    """PEFT makes target_parameters of its own all-linear, router included; of ours it does not."""
    base = skeleton("mixtral")
    with contextlib.suppress(ValueError):  # PEFT 0.19 reads the letters of the word
        theirs = peft_wraps(base, target_modules="all-linear")
        assert theirs.peft_config["default"].target_parameters
    config = composed("target_modules=all-linear")
    modules = adapters.resolve_modules(base, config)
    assert {n.rpartition(".")[2] for n in modules} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    wrapped = adapters.attach_skeleton(base, config, modules)
    assert wrapped.targeted_module_names == modules
    assert not wrapped.peft_config["default"].target_parameters


def test_auto_on_routed_experts_is_pefts_map_or_a_clean_line() -> None:
    assert {n.rpartition(".")[2] for n in resolved("mixtral", "target_modules=auto")} == {
        "q_proj",
        "v_proj",
    }
    with pytest.raises(ConfigErrors) as refused:
        resolved("qwen3_moe with a dense layer", "target_modules=auto")
    (line,) = refused.value.errors
    assert "'qwen3_moe' is not among them" in line and "out of: k_proj, o_proj, q_proj, v_p" in line


def test_names_that_peft_reads_as_the_experts_are_left_out_and_refused() -> None:
    """A dense layer beside routed ones: PEFT would adapt every expert in its place."""
    base = skeleton("qwen3_moe with a dense layer")
    dense = "model.layers.0.mlp.gate_proj"
    assert isinstance(base.get_submodule(dense), torch.nn.Linear)
    modules = adapters.resolve_modules(base, composed("target_modules=all-linear"))
    assert dense not in modules and len(modules) == 8
    assert any(
        f"3 linear layers (such as {dense})" in said for said in adapters.notes(base, modules)
    )
    for names in ("[q_proj,gate_proj]", "[q_proj,down_proj]", "[gate]"):
        with pytest.raises(ConfigErrors, match="for the experts of base model"):
            adapters.resolve_modules(base, composed(*custom(names)))


# --- what lies outside the text model --------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["target_modules=attention"],
        ["target_modules=mlp"],
        ["target_modules=all-linear"],
        custom("[q_proj,v_proj]"),
        custom(r"'.*\.(q|v)_proj'"),
    ],
)
def test_the_vision_tower_stays_out(overrides: list[str]) -> None:
    base = skeleton("gemma3 with vision")
    modules = adapters.resolve_modules(base, composed(*overrides))
    assert modules
    assert all(name.startswith("model.language_model.layers.") for name in modules)
    # PEFT alone goes there.
    wrapped = peft_wraps(base, target_modules=["q_proj"])
    assert any("vision_tower" in name for name in wrapped.targeted_module_names)


@pytest.mark.parametrize(
    ("names", "count"),
    [
        ("[vision_tower.encoder.layers.0.self_attn.q_proj]", 1),
        ("[model.vision_tower.encoder.layers.1.self_attn.q_proj]", 1),
        (r"'.*vision_tower\.encoder.*q_proj'", 2),
        (r"'.*vision.*layers.*q_proj'", 2),  # names the tower by a part, and matches nothing else
        (r"'.*(vision_tower|language_model).*q_proj'", 4),
    ],
)
def test_a_name_or_regex_that_says_so_reaches_the_tower(names: str, count: int) -> None:
    base = skeleton("gemma3 with vision")
    modules = adapters.resolve_modules(base, composed(*custom(names)))
    assert len(modules) == count and all(name.endswith("q_proj") for name in modules)
    assert sum("vision_tower" in name for name in modules) == min(count, 2)


def test_a_bare_ending_that_only_the_tower_has_is_refused() -> None:
    with pytest.raises(ConfigErrors) as refused:
        resolved("gemma3 with vision", *custom("[q_proj,fc1]"))
    (line,) = refused.value.errors
    assert line.startswith("target_modules.names: 'fc1' matches only 'model.vision_tower.")
    assert "writing 'vision_tower' into it" in line


def test_the_plan_of_a_multimodal_base_counts_what_is_outside(tmp_path: Path) -> None:
    made = plan.make(saved_with_vision(tmp_path))
    (said,) = [line for line in made.warnings if "outside the text model" in line]
    linear = [
        name
        for name, module in skeleton("gemma3 with vision").named_modules()
        if isinstance(module, torch.nn.Linear) and "vision_tower" in name
    ]
    assert said.startswith(f"no adapter on {len(linear)} linear layers (such as {linear[0]})")
    assert not any("expert" in line for line in made.warnings)


def saved_with_vision(folder: Path) -> Config:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorabench import model as base_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(transformers_config("gemma3 with vision"))
    base.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model.ZOO / "tiny-gemma").save_pretrained(folder)
    return composed("model=local", f"model.path={folder}")


def test_a_multimodal_base_trains_its_text_side(tmp_path: Path, jsonl: Path) -> None:
    saved_with_vision(tmp_path / "base")
    words = ["model=local", f"model.path={tmp_path / 'base'}", "data=jsonl", "trainer=smoke"]
    words += [f"data.train.path={jsonl}", "data.max_length=64", "tracker=none"]
    code = cli.main(["train", "-m", *words, "head=exclude,lora", f"output_dir={tmp_path / 'out'}"])
    assert code == 0
    records = [json.loads(p.read_text()) for p in tmp_path.glob("out/default/*/record.json")]
    assert [r["status"] for r in records] == ["finished", "finished"]
    assert all("outside the text model" in " ".join(r["notes"]) for r in records)


# --- names, regexes, patterns ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "begins", "holds"),
    [
        (
            custom("[q_porj]"),
            "target_modules.names",
            "unmatched: 'q_porj' (did you mean 'q_proj'?)",
        ),
        (custom("[q_proj,nope_x]"), "target_modules.names", "unmatched: 'nope_x'"),
        (custom(r"'.*\.q_porj'"), "target_modules.names", r"did you mean '.*\.q_proj', or a list"),
        (custom("'(q_proj'"), "target_modules.names", "must be a regular expression"),
        (custom("[mlp]"), "target_modules", "PEFT refuses ['mlp']"),
        (["target_modules.exclude=[k_porj]"], "target_modules.exclude", "(did you mean 'k_proj'?)"),
        (["lora.rank_pattern={q_porj:4}"], "lora.rank_pattern", "(did you mean 'q_proj'?)"),
        (["lora.alpha_pattern={q_porj:4}"], "lora.alpha_pattern", "(did you mean 'q_proj'?)"),
        (["lora.alpha_pattern={lm_head:4}"], "lora.alpha_pattern", "unmatched: 'lm_head'"),
        (["lora.rank_pattern={*q_proj:4}"], "lora.rank_pattern", "must be a regular expression"),
        (
            ["lora.rank_pattern={q_proj:4,layers.0.self_attn.q_proj:8}"],
            "lora.rank_pattern",
            "behind 'q_proj', which takes all of its modules; put it in front",
        ),
    ],
)
def test_what_matches_nothing_is_one_line_with_the_models_label(
    overrides: list[str], begins: str, holds: str
) -> None:
    with pytest.raises(ConfigErrors) as refused:
        plan.make(composed(*overrides))
    (line,) = refused.value.errors
    assert line.startswith(f"{begins}: ") and holds in line
    assert "'gemma'" not in line
    if "regular expression" not in line and "put it in front" not in line:
        assert "base model 'tiny-gemma'" in line


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 4},
        {"layers.0.self_attn.q_proj": 4},
        {"self_attn.q_proj|k_proj": 4},  # a group of its own in PEFT's match
        {".*mlp.*": 4, "up_proj": 8, "q_proj": 2},  # up_proj comes too late in PEFT
        {"up_proj": 8, ".*mlp.*": 4},
        {"proj": 4},
    ],
)
def test_patterns_are_refused_exactly_where_peft_uses_none_of_their_ranks(
    pattern: dict[str, int],
) -> None:
    config = composed("lora.r=16")
    config.lora.rank_pattern = pattern  # in this order
    base = plan.skeleton(config.model)
    modules = adapters.resolve_modules(base, composed("lora.r=16"))
    wrapped = peft_wraps(base, r=16, target_modules=modules, rank_pattern=pattern)
    ranks = {layer.r["default"] for layer in adapters.lora_layers(wrapped).values()}
    if ranks >= set(pattern.values()):
        assert adapters.resolve_modules(base, config) == modules
    else:
        with pytest.raises(ConfigErrors, match=r"lora\.rank_pattern"):
            adapters.resolve_modules(base, config)


@pytest.mark.parametrize("num_layers", [2, 3])
def test_what_peft_condenses_of_the_list_does_not_reach_the_tower(num_layers: int) -> None:
    """From 20 targets on PEFT keeps endings of names alone, and saves those."""
    from transformers import AutoModelForCausalLM

    config = transformers_config("gemma3 with vision")
    config.text_config.num_hidden_layers = num_layers
    config.text_config.layer_types = ["full_attention"] * num_layers
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    modules = adapters.resolve_modules(base, composed("target_modules=all-linear"))
    assert len(modules) == 7 * num_layers
    wrapped = adapters.attach_skeleton(base, composed("target_modules=all-linear"), modules)
    settings = wrapped.peft_config["default"]
    again = peft_wraps(base, target_modules=settings.target_modules)
    assert set(again.targeted_module_names) == set(modules)
