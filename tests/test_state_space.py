"""Mamba and its hybrids train alone, as plain PEFT does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed, say, scores
from conftest import records as records_of
from equality import relative
from stock import Stock, copy_of
from test_models import command, nll_by_plain_peft
from tiny import SMALL

from lorabench import data, plan, versions
from lorabench import model as base_model
from lorabench.pack import Batch, ModulePack

MIXER = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
# Architecture: its config's class and arguments, and words without which a plan refuses it.
EAGER = ["model.attn_implementation=eager", "target_modules.exclude=[out_proj]"]
OUT = ["target_modules.exclude=[out_proj]"]
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "mamba": (
        "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, EAGER
    ),
    "falcon_mamba": (
        "FalconMambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, EAGER
    ),
    "mamba2": (
        "Mamba2Config",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16,
         "n_groups": 1, "chunk_size": 8},
        EAGER,
    ),
    "bamba": ("BambaConfig", SMALL | MIXER | {"mamba_n_groups": 1, "attn_layer_indices": [1]}, []),
    "falcon_h1": (
        "FalconH1Config",
        SMALL | MIXER | {"mamba_n_groups": 1, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
        OUT,
    ),
    "granite": (
        "GraniteMoeHybridConfig",
        SMALL | MIXER
        | {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 64,
           "layer_types": ["mamba", "attention"], "mamba_n_groups": 1},
        [],
    ),
    "jamba": (
        "JambaConfig",
        SMALL
        | {"num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 2,
           "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
        [],
    ),
    "zamba2": (
        "Zamba2Config",
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
         "num_attention_heads": 4, "mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 1,
         "mamba_d_state": 8, "chunk_size": 8, "layers_block_type": ["mamba", "hybrid", "mamba"],
         "max_position_embeddings": 128, "num_mem_blocks": 1, "use_mem_rope": False},
        [],
    ),
}  # fmt: skip


MAMBA_1 = ("mamba", "falcon_mamba", "jamba")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            import transformers as t

            tokenizer = t.AutoTokenizer.from_pretrained(base_model.ZOO / "tiny-gemma")
            name, settings, _ = KINDS[kind]
            ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
            config = getattr(t, name)(vocab_size=len(tokenizer), **settings, **ids)
            torch.manual_seed(0)
            made[kind] = tmp_path_factory.mktemp("state-space") / kind
            t.AutoModelForCausalLM.from_config(config).save_pretrained(made[kind])
            tokenizer.save_pretrained(made[kind])
        return made[kind]

    return make


def words_of(kind: str, base: Callable[[str], Path], jsonl: Path, *more: str) -> list[str]:
    return command(kind, base(kind), jsonl, *KINDS[kind][2], "lora.r=4", *more)


# Jamba has experts, whose adapters an old PEFT cannot reload: refused there, by the test below.
TRAINED = [kind for kind in KINDS if kind != "jamba" or not versions.too_old_for_experts()]


def test_jamba_needs_a_peft_that_reloads_it(base: Callable[[str], Path], jsonl: Path) -> None:
    said = say("plan", *words_of("jamba", base, jsonl))
    too_old = versions.too_old_for_experts()
    assert said.code == (2 if too_old else 0) and (not too_old or too_old in said.err)


@pytest.mark.parametrize("kind", TRAINED)
def test_gradients_are_those_of_plain_peft(
    kind: str, base: Callable[[str], Path], jsonl: Path
) -> None:
    """Of padded batches: a state that read padding, or a skipped adapter, has other ones."""
    config = composed(*words_of(kind, base, jsonl))
    planner = plan.Planner()
    planned = planner.make(config)
    assert planned.alone and planned.alone.endswith("weights of its layers beside calling them")
    pack = ModulePack(base_model.load(config.model, "cpu"), config, planned.lora_modules, "cpu")
    with torch.no_grad():  # at B = 0 every gradient of A is zero
        for parameter in pack.parameters.values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    stock = Stock(config, copy_of(pack.adapter_state(0)), "cpu", planner)
    theirs = stock.gradients(0)
    ids, labels = data.batch(stock.tokens, stock.order[0], stock.length, stock.pad_id)
    count = int((labels != data.IGNORED).sum())
    pack.forward_backward(0, 0, Batch.make([ids], [labels], [1]), [count])
    mine = {name.replace(".default", ""): p.grad for name, p in pack.parameters.items()}
    idle = {name for name, gradient in mine.items() if gradient is None}
    assert set(mine) - idle == set(theirs)
    # What does nothing in plain PEFT either is said by the plan.
    assert {name.split(".")[-3] for name in idle} == ({"dt_proj"} if kind in MAMBA_1 else set())
    assert any("exclude=[dt_proj]" in text for text in planned.warnings) == bool(idle)
    for name in theirs:
        assert theirs[name].norm() > 1e-9, f"{name}: nothing to compare"
        # float32: the head sees the rows that carry a loss alone, sums have another order
        assert relative(mine[name], theirs[name]) < 1e-4, name


@pytest.mark.parametrize(
    "kind",
    [k if k == "falcon_h1" else pytest.param(k, marks=pytest.mark.slow) for k in TRAINED],
)
def test_a_run_is_trained_and_its_score_is_plain_pefts(
    kind: str, base: Callable[[str], Path], jsonl: Path, tmp_path: Path
) -> None:
    words = words_of(kind, base, jsonl, f"output_dir={tmp_path / 'out'}")
    said = say("train", *words)
    assert said.code == 0, said.err
    (record,) = records_of(tmp_path / "out").values()
    adapter = tmp_path / "out" / "default" / record["run_id"] / "adapter"
    values = nll_by_plain_peft(adapter, words)
    # One example at a time instead of padded batches: float32 sums of other shapes.
    assert abs(scores(record)["test"]["nll"]["value"] - sum(values) / len(values)) < 2e-5


def test_what_a_plan_refuses_of_mamba_names_the_key_to_set(
    base: Callable[[str], Path], jsonl: Path
) -> None:
    words = command("mamba", base("mamba"), jsonl)
    said = say("plan", *words)
    assert said.code == 2 and said.err.startswith("model.attn_implementation: must be one that ")
    assert said.err.endswith("set model.attn_implementation=eager\n")
    said = say("plan", *words, EAGER[0])
    assert said.code == 2 and said.err.endswith("; set 'target_modules.exclude=[out_proj]'\n")
    assert say("plan", *words, *EAGER).code == 0
