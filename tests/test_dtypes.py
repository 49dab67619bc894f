"""model.dtype=auto is what transformers' own `dtype="auto"` gives, float16 aside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import records, say

from lorabench import cli, config, identity, plan
from lorabench import model as base_model
from lorabench.evaluate import DEFINITIONS

TINY = [
    "trainer=smoke", "trainer.steps=1", "tracker=none", "lora.r=1", "target_modules=attention",
    "data.num_train=8", "data.num_validation=2", "data.num_test=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def stored(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Makes a checkpoint whose weights are in one dtype and whose config.json names another."""
    from transformers import AutoModelForCausalLM

    place = tmp_path_factory.mktemp("dtypes")

    def make(weights: str, **named: Any) -> Path:
        folder = place / "-".join([weights, *named, *map(str, named.values())])
        if not folder.exists():
            shutil.copytree(tiny_folder("llama"), folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, weights))
            model.save_pretrained(folder)
            content = json.loads((folder / "config.json").read_text())
            content = {k: v for k, v in content.items() if k not in ("dtype", "torch_dtype")}
            (folder / "config.json").write_text(json.dumps(content | named))
        return folder

    return make


CASES = {
    "by config.json": ("float32", {"dtype": "bfloat16"}, "bfloat16"),
    "float32 stays": ("bfloat16", {"dtype": "float32"}, "float32"),
    "as transformers 4 wrote it": ("float32", {"torch_dtype": "bfloat16"}, "bfloat16"),
    "by the weights": ("bfloat16", {}, "bfloat16"),
    "float32 by the weights": ("float32", {}, "float32"),
    "float16": ("float16", {"dtype": "float16"}, "bfloat16"),
    "float16 by the weights": ("float16", {"dtype": None}, "bfloat16"),
}


@pytest.mark.parametrize("case", CASES)
def test_auto_is_the_dtype_of_the_checkpoint(case: str, stored: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    weights, named, expected = CASES[case]
    folder = stored(weights, **named)
    model = config.ModelConfig(path=str(folder), dtype="auto")
    assert base_model.resolved(model).dtype == expected
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype
    assert theirs == getattr(torch, "float16" if "float16" in case else expected)
    assert base_model.load(model, "cpu").dtype == getattr(torch, expected)
    (note,) = base_model.dtype_notes(model) or [""]
    assert note.startswith("model.dtype: the checkpoint is in float16") == ("float16" in case)


def unresolved(*words: str) -> config.Config:
    (cfg,), *_ = cli.compose([*words, "tracker=none", "target_modules=attention"])
    return config.typed(cfg)


def test_auto_and_the_word_are_one_run(stored: Callable[..., Path], tmp_path: Path) -> None:
    folder = stored("float32", dtype="bfloat16")
    planner, words = plan.Planner(), [f"model={folder}"]
    auto = planner.make(unresolved(*words))
    word = planner.make(unresolved(*words, "model.dtype=bfloat16"))
    assert auto.run_id == word.run_id
    assert planner.make(unresolved(*words, "model.dtype=float32")).run_id != word.run_id
    words += [*TINY, f"output_dir={tmp_path}"]
    assert say("train", *words).code == 0
    (record,) = records(tmp_path).values()
    assert record["config"]["model"]["dtype"] == record["config"]["trainer"]["dtype"] == "bfloat16"
    said = say("train", *words, "model.dtype=bfloat16")
    assert said.code == 0 and "1 of 1 runs are kept from before" in said.err


def test_ids_of_configs_with_a_dtype_are_what_they_were() -> None:
    """The value `auto` is in no id: what is hashed has the resolved one."""
    made = plan.make(unresolved())
    resolved = identity.training(
        unresolved(), made.contents, dict.fromkeys(made.lora_modules, 16),
        dict.fromkeys(made.lora_modules, 2.0), made.lora_modules, [], DEFINITIONS,
    )  # fmt: skip
    assert resolved["model"]["dtype"] == resolved["trainer"]["dtype"] == "float32"
    assert identity.short_hash(resolved) == made.run_id


def test_the_computation_must_go_with_the_dtype_that_is_found(stored: Callable[..., Path]) -> None:
    words = [f"model={stored('float32', dtype='bfloat16')}", "trainer.dtype=float32"]
    with pytest.raises(config.ConfigErrors, match=r"trainer\.dtype: must be model\.dtype=bfloat16"):
        plan.make(unresolved(*words))
    words = [f"model={stored('float32')}", "trainer.dtype=bfloat16"]  # autocast
    found = base_model.settled(unresolved(*words))
    assert (found.model.dtype, found.trainer.dtype) == ("float32", "bfloat16")


def test_a_dtype_that_nothing_trains_in_is_refused(stored: Callable[..., Path]) -> None:
    model = config.ModelConfig(path=str(stored("float32", dtype="float8_e4m3fn")), dtype="auto")
    with pytest.raises(config.ConfigErrors, match=r"stored in float8_e4m3fn; set model\.dtype=bf"):
        base_model.resolved(model)


def test_bfloat16_on_a_cpu_is_advised_against(stored: Callable[..., Path]) -> None:
    words = [f"model={stored('float32', dtype='bfloat16')}", "trainer.device=cpu"]

    def advised(*more: str) -> list[str]:
        found = plan.make(unresolved(*words, *more)).warnings
        return [text for text in found if not text.startswith("data.")]  # toy data, too

    (advice,) = advised()
    assert advice.endswith("on this CPU consider model.dtype=float32")
    assert advised("model.dtype=float32") == []
