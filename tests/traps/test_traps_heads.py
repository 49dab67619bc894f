"""Section 2 of docs/traps.md: all-linear, heads and experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from tiny import SMALL

from lorabench import cli, versions
from lorabench import model as base_model
from lorabench.config import ConfigErrors
from traps.halves import (
    VOCAB,
    built,
    causal,
    config_of,
    experts,
    folder_of,
    gap,
    leaves,
    logits,
    lora,
    moved,
    planned,
    refusal,
    reloaded,
    said,
    saved,
    trains,
    wrapped,
)

Falls = Callable[..., None]


def classifier(head_seed: int = 0) -> Any:
    """One body, and a head drawn by its own seed: what from_pretrained makes of a base model."""
    config = transformers.LlamaConfig(**SMALL, vocab_size=VOCAB, num_labels=3, pad_token_id=0)
    model = built("AutoModelForSequenceClassification", config)
    torch.manual_seed(head_seed)
    torch.nn.init.normal_(model.score.weight, std=0.02)
    return model


@pytest.mark.parametrize("kind", ["gemma", "llama"])
def test_all_linear_and_the_head(kind: str, falls_in: Falls, tmp_path: Path) -> None:
    """T2.1"""
    model = causal(kind)
    assert model.config.tie_word_embeddings == (kind == "gemma")
    folder = folder_of(model, tmp_path)
    plain, warned = said(lambda: get_peft_model(model, lora(target_modules="all-linear")))
    falls_in("lm_head" not in plain.targeted_module_names and not warned, warned)

    made = {policy: planned(folder, f"head={policy}") for policy in ("exclude", "lora", "full")}
    assert sorted(made["exclude"].lora_modules) == sorted(plain.targeted_module_names)
    assert set(made["lora"].lora_modules) - set(made["exclude"].lora_modules) == {"lm_head"}
    assert [made[policy].head.policy for policy in made] == list(made)
    assert all(one.head.consequence for one in made.values())


def test_gpt2s_conv1d_is_a_linear_layer(falls_in: Falls, tmp_path: Path) -> None:
    """T2.2"""
    linear = {n for n, m in causal("gpt2").named_modules() if isinstance(m, torch.nn.Linear)}
    assert linear == {"lm_head"}
    plain = wrapped(causal("gpt2"), target_modules="all-linear")
    falls_in(leaves(plain.targeted_module_names) == {"c_attn", "c_proj", "c_fc"})

    folder = folder_of(causal("gpt2"), tmp_path)
    assert sorted(planned(folder).lora_modules) == sorted(plain.targeted_module_names)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
def test_a_classifier_without_its_task(
    task: str | None, targets: Any, falls_in: Falls, tmp_path: Path
) -> None:
    """T2.3 T2.4"""
    model = moved(wrapped(classifier(), task_type=task, target_modules=targets))
    falls_in(("score" in model.targeted_module_names) == (targets == "all-linear"))
    folder = saved(model, tmp_path)
    again, warned = said(lambda: reloaded(classifier(head_seed=7), folder))
    moves = gap(logits(again), logits(model))
    falls_in(moves > 0.05 and not warned, f"logits move by {moves}, {warned}")


def test_a_classifier_with_its_task(tmp_path: Path) -> None:
    """T2.3 T2.4"""
    for targets in ("all-linear", ["q_proj"]):
        model = moved(wrapped(classifier(), task_type="SEQ_CLS", target_modules=targets))
        assert "score" not in model.targeted_module_names
        folder = saved(model, tmp_path)
        assert logits(reloaded(classifier(head_seed=7), folder)).equal(logits(model))


def test_a_classifiers_head_is_trained_and_saved(tmp_path: Path) -> None:
    """T2.3 T2.4"""
    folder = folder_of(classifier(), tmp_path)
    for targets in (["target_modules=all-linear"],
                    ["target_modules=custom", "target_modules.names=[q_proj]"]):  # fmt: skip
        made = planned(folder, "task=seq_cls", "head=full", "data=classes", *targets)
        assert made.saved_modules == ["score"] and "score" not in made.lora_modules


@pytest.mark.parametrize(
    ("task", "auto"),
    [
        ("TOKEN_CLS", "AutoModelForTokenClassification"),
        ("QUESTION_ANS", "AutoModelForQuestionAnswering"),
    ],
)
def test_all_linear_for_other_tasks(
    task: str, auto: str, falls_in: Falls, capsys: pytest.CaptureFixture[str]
) -> None:
    """T2.5"""
    model = built(auto, transformers.LlamaConfig(**SMALL, vocab_size=VOCAB))
    settings = lora(task_type=task, target_modules="all-linear")
    error, _ = said(lambda: get_peft_model(model, settings))
    falls_in(isinstance(error, TypeError) and "modules_to_save cannot" in str(error), error)

    assert refusal(None, f"task={task.lower()}").startswith("task: must be one of causal_lm")
    assert cli.main(["plan", "tracker=none", f"task={task.lower()}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("task: must be one of causal_lm")


def test_a_language_model_taken_for_a_classifier(
    falls_in: Falls, capsys: pytest.CaptureFixture[str]
) -> None:
    """T2.6"""
    model, warned = said(lambda: get_peft_model(causal(), lora(task_type="SEQ_CLS")))
    falls_in(type(model).__name__ == "PeftModelForSequenceClassification" and not warned, warned)
    falls_in(not any("score" in name or "classifier" in name for name in trains(model)))

    # The task is said once, for the model and the adapter; PEFT's name for it is no key.
    assert cli.main(["plan", "tracker=none", "+lora.task_type=SEQ_CLS"]) == 2
    assert "task_type" in capsys.readouterr().err


def test_a_classifier_taken_for_a_language_model(falls_in: Falls, tmp_path: Path) -> None:
    """T2.7"""
    error, _ = said(lambda: get_peft_model(classifier(), lora()))
    falls_in(isinstance(error, AttributeError) and "prepare_inputs" in str(error), error)

    # Loaded as a language model its lm_head would be random: transformers says so and goes on.
    folder = folder_of(classifier(), tmp_path)
    with pytest.raises(ConfigErrors, match=r"lacks lm_head\.weight, which would be random"):
        base_model.load(config_of(folder).model, "cpu")


def too_old(folder: Path, *overrides: str) -> bool:
    """Whether this PEFT is refused on experts; then the refusal has been seen."""
    reason = versions.too_old_for_experts()
    return reason is not None and reason in refusal(folder, *overrides)


def test_all_linear_trains_the_router(falls_in: Falls, tmp_path: Path) -> None:
    """T2.8"""
    folder = folder_of(experts("qwen3_moe"), tmp_path)
    settings = lora(target_modules="all-linear")
    model, _ = said(lambda: get_peft_model(experts("qwen3_moe"), settings))
    written = settings.target_parameters or []
    falls_in({"gate.weight", "gate_up_proj", "down_proj"} == set(written), written, since="0.20")
    trained = [] if isinstance(model, Exception) else trains(model)
    falls_in(any(".mlp.gate.lora_A" in name for name in trained), trained, since="0.20")

    if too_old(folder):
        return
    made = planned(folder)
    assert leaves(made.lora_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert any("expert" in warning for warning in made.warnings)


def test_all_linear_doubles_the_rank_of_experts(falls_in: Falls, tmp_path: Path) -> None:
    """T2.9"""
    settings = lora(target_modules="all-linear")
    model, warned = said(lambda: get_peft_model(experts("qwen3_moe"), settings))
    falls_in(settings.rank_pattern == {r".*\.gate_up_proj": 8}, settings, since="0.20")
    if isinstance(model, torch.nn.Module):
        (shape,) = {tuple(p.shape) for name, p in model.named_parameters()
                    if "experts.base_layer.lora_A" in name}  # fmt: skip
        falls_in(shape == (4 * 8, 32), f"A of 4 experts, fused gate and up: {shape}")
    false = "rank_pattern keys did not match any targeted module and were ignored"
    falls_in(any(false in text for text in warned), warned, since="0.21")

    folder = folder_of(experts("qwen3_moe"), tmp_path)
    if too_old(folder):
        return
    line = refusal(folder, "lora.rank_pattern={gate_up_proj:8}")
    assert line.startswith("lora.rank_pattern: every entry must match an adapted module")


def test_dropout_on_experts(falls_in: Falls, tmp_path: Path) -> None:
    """T2.10"""
    settings = lora(target_modules="all-linear", lora_dropout=0.1)
    error, _ = said(lambda: get_peft_model(experts("qwen3_moe"), settings))
    falls_in("lora_dropout != 0" in str(error), error, since="0.20")

    folder = folder_of(experts("qwen3_moe"), tmp_path)
    if too_old(folder):
        return
    assert len(planned(folder, "lora.lora_dropout=0.1").lora_modules) == 2 * 4


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_a_router_in_a_list(kind: str, falls_in: Falls, tmp_path: Path) -> None:
    """T2.11"""
    folder = folder_of(experts(kind), tmp_path)
    settings = lora(target_modules=["q_proj", "gate"])
    model, warned = said(lambda: get_peft_model(experts(kind), settings))
    falls_in(any(".mlp.gate.lora_A" in name for name in trains(model)) and not warned, warned)
    falls_in(set(settings.target_modules or ()) == {"q_proj"}, settings)

    names = ["target_modules=custom", "target_modules.names=[q_proj,gate]"]
    if too_old(folder, *names):
        return
    line = refusal(folder, *names)
    assert "mlp.gate' and 1 more for the experts" in line and "get no adapter" in line


def multimodal() -> Any:
    """A tiny Gemma 3 that sees."""
    text = transformers.Gemma3TextConfig(**SMALL, vocab_size=300)
    vision = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=290,
        boi_token_index=291, eoi_token_index=292,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_a_vision_tower(targets: Any, falls_in: Falls) -> None:
    """T2.12"""
    model, warned = said(lambda: get_peft_model(multimodal(), lora(target_modules=targets)))
    seeing = [name for name in model.targeted_module_names if "vision_tower" in name]
    falls_in(len(seeing) == (9 if targets == "all-linear" else 2) and not warned, seeing)


def test_a_vision_tower_is_left_out(tmp_path: Path) -> None:
    """T2.12"""
    folder = folder_of(multimodal(), tmp_path)
    for targets in (["target_modules=all-linear"],
                    ["target_modules=custom", "target_modules.names=[q_proj,v_proj]"]):  # fmt: skip
        adapted = planned(folder, *targets).lora_modules
        assert adapted and not any("vision" in name for name in adapted)
