"""Examples of very different lengths: nothing padded, nothing mixed, the numbers of stock PEFT."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from conftest import composed, recorded_runs, say
from equality import compare_training
from processes import running, slowly, wait_for
from stock import TINY, embedded_tokenizer, mixture, packed, tokens_of, train_pack
from tiny import SMALL

from lorabench import adapters, cli, data, plan
from lorabench.data.ragged import Ragged
from lorabench.lengths import lengths_of
from lorabench.pack import probe
from lorabench.sweep.needs import Needs
from lorabench.train import train

FAST = [
    "tracker=none",
    "trainer.steps=4",
    "recipe=embedded",
    "trainer.num_threads=1",
    "data.metric=[nll]",
    "lora.r=2",
]

# --- equal to stock PEFT ---------------------------------------------------------------------

CASES = [
    ("gemma2", 0.1, ["trainer.gradient_checkpointing=true"]),  # eager, windows, soft-capping
    ("gpt2", 0.1, ["trainer.micro_batch_size=4"]),  # learned positions; each run its own data
]
SLOW_CASES = [
    ("llama", 0.0, []),  # one batch for all runs
    ("gemma", 0.1, ["trainer.micro_batch_size=2"]),
    ("gemma3", 0.0, ["trainer.gradient_checkpointing=true"]),
    ("qwen2", 0.1, []),
    ("opt", 0.1, ["trainer.micro_batch_size=4"]),
    ("bert", 0.1, []),
    ("llama", 0.1, ["trainer.gradient_checkpointing=true", "trainer.micro_batch_size=4"]),
]


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize(
    ("kind", "dropout", "words"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
)
def test_packs_equal_stock_peft(
    kind: str, dropout: float, words: list[str], tiny_folder: Callable[[str], Path],
    mixed_lengths: list[str],
) -> None:  # fmt: skip
    common = ["model.dtype=float64", "trainer.steps=5", *words, *mixed_lengths]
    configs = mixture(kind, tiny_folder(kind), dropout, *common)
    tokens, _ = tokens_of(configs[0])
    lengths = [len(ids) for ids in tokens.input_ids]
    loss = [n - start for n, start in zip(lengths, tokens.completion_start, strict=True)]
    assert max(lengths) > 90 and min(loss) == 1
    found, (weights, name) = compare_training(configs)
    # Float64 rounding (1e-16) of sums in another order, grown by five AdamW steps.
    assert found < 1e-11
    assert weights < 1e-10, name


@pytest.mark.parametrize("kind", ["bloom", pytest.param("falcon", marks=pytest.mark.slow)])
def test_architectures_that_are_padded_equal_stock_peft(
    kind: str, tiny_folder: Callable[[str], Path], mixed_lengths: list[str]
) -> None:
    """Each run sees other data and has dropout: nothing is drawn for padding."""
    eager = ["model.attn_implementation=eager"] if kind == "bloom" else []
    words = [*TINY, "model=local", f"model.path={tiny_folder(kind)}", *eager, *mixed_lengths]
    words += ["model.dtype=float64", "trainer.steps=4", "target_modules=all-linear"]
    runs = [["lora.r=2"], ["lora.r=3", "lora.lora_dropout=0.2", "seed=1"]]
    configs = [composed(*words, *own) for own in runs]
    assert plan.make(configs[0]).padded is not None
    found, (weights, name) = compare_training(configs)
    # Float64, but for what these models cast to float32 (softmax, alibi, rotary): 6e-8 a rounding.
    assert found < 1e-5
    assert weights < 1e-4, name


# --- what is computed ------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [[0, 0, 0], [0, 1, 2]], ids=["one batch", "three batches"])
def test_linear_layers_see_every_token_once_and_no_padding(
    seeds: list[int], tiny_folder: Callable[[str], Path], mixed_lengths: list[str]
) -> None:
    words = ["model=local", f"model.path={tiny_folder('llama')}", "trainer.steps=3"]
    words = [*TINY, *words, *mixed_lengths]
    configs = [composed(*words, f"seed={i}", f"seeds.data={n}") for i, n in enumerate(seeds)]
    pack = packed(configs)
    rows: list[int] = []
    layer = pack.tree.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda _, args, out: rows.append(args[0][..., 0].numel()))
    tokens, pad_id = tokens_of(configs[0])
    steps = list(train(pack, tokens, pad_id))
    assert rows == [sum(step.tokens) for step in steps]
    # The plan has said so before anything trained.
    for run, config in enumerate(configs):
        lengths = lengths_of(config, tokens, padded=False)
        assert lengths.rows == lengths.tokens == sum(step.tokens[run] for step in steps)
        assert lengths.longest == max(step.tokens[run] for step in steps)
        assert lengths.padded_rows == sum(
            8 * max(len(tokens.input_ids[i]) for i in indices)
            for indices in data.order_of(tokens, config)
        )


def test_attention_never_sees_a_mates_example(
    tiny_folder: Callable[[str], Path], mixed_lengths: list[str]
) -> None:
    """Other tokens in examples that only a mate sees change no bit of a run."""
    words = ["model=local", f"model.path={tiny_folder('gemma3')}", "trainer.steps=4"]
    words = [*TINY, *words, *mixed_lengths, "trainer.warmup_steps=0"]
    configs = [composed(*words, f"seed={seed}") for seed in (0, 1)]
    tokens, pad_id = tokens_of(configs[0])
    orders = [np.concatenate(list(data.order_of(tokens, config))) for config in configs]
    only_the_mates = set(orders[1].tolist()) - set(orders[0].tolist())
    assert len(only_the_mates) > 5

    def trained() -> list[str]:
        pack = packed(configs)
        list(train(pack, tokens, pad_id))
        return [adapters.state_hash(pack.adapter_state(run)) for run in (0, 1)]

    before = trained()
    lists = list(tokens.input_ids)
    for index in only_the_mates:
        lists[index] = [5 + token % 40 for token in lists[index]]
    tokens = replace(tokens, input_ids=Ragged.of(lists))
    after = trained()
    assert after[0] == before[0] and after[1] != before[1]


def test_with_one_batch_for_all_a_mate_changes_no_bit(
    tiny_folder: Callable[[str], Path], mixed_lengths: list[str]
) -> None:
    words = ["model=local", f"model.path={tiny_folder('llama')}", "trainer.steps=4"]
    words = [*TINY, *words, *mixed_lengths, "seeds.data=0", "lora.lora_dropout=0.1"]
    first = composed(*words, "lora.r=8")

    def trained(slot: int, *mates: str) -> str:
        configs = [composed(*words, "lora.r=8", f"seed={i}", *mates) for i in (1, 2)]
        configs.insert(slot, first)
        pack = packed(configs)
        train_pack(pack)
        return adapters.state_hash(pack.adapter_state(slot))

    assert len({trained(0), trained(2), trained(0, "trainer.lr=1e-2", "lora.alpha_ratio=4")}) == 1


# --- architectures ---------------------------------------------------------------------------


def test_rotary_embeddings_of_the_longest_text_keep_runs_apart(tmp_path: Path) -> None:
    """One long text of a mate would change those of a run's short ones."""
    small = {k: v for k, v in SMALL.items() if k != "head_dim"}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    rope["original_max_position_embeddings"] = 64
    shape = t.Phi3Config(
        vocab_size=152, **small, rope_parameters=rope, original_max_position_embeddings=64,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    t.AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    embedded_tokenizer().save_pretrained(tmp_path)
    words = ["model=local", f"model.path={tmp_path}"]
    short, long = (plan.make(composed(*words, f"data.max_length={n}")).alone for n in (64, 65))
    assert short is None and long is not None and "beyond 64 tokens" in long


def test_a_base_that_fails_the_probe_is_padded_and_said_to_be(
    mixed_lengths: list[str], tmp_path: Path, tiny_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(probe, "_same", lambda base: False)
    words = [*FAST, "model=local", f"model.path={tiny_folder('llama')}", *mixed_lengths]
    assert say("train", "-m", *words, "seed=0,1", f"output_dir={tmp_path}").code == 0
    for _, entry in recorded_runs(tmp_path):
        assert entry["plan"]["padded"] == "a probe of the loaded base"
        assert any("batches are padded" in note for note in entry["notes"])


# --- the order -------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(1000, 8), (100, 8), (20, 8), (5, 8), (999, 4)])
def test_groups_by_length_as_the_trainer_does(
    count: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths = np.random.default_rng(0).integers(1, 400, count).tolist()
    plainly = np.concatenate(list(data.order(count, count, 7, 1)))
    monkeypatch.setattr(torch, "randperm", lambda n, generator=None: torch.from_numpy(plainly))
    expected = get_length_grouped_indices(lengths, size)
    steps = count // size
    mine = np.concatenate(list(data.order(count, size, 7, steps, lengths=lengths))) if steps else []
    assert list(mine) == expected[: steps * size]
    assert sorted(next(data.order(count, count, 7, 1, lengths=lengths))) == list(range(count))


# --- on the command line ---------------------------------------------------------------------


def hashes(folder: Path) -> dict[str, Any]:
    return {r["run_id"]: (r["status"], r["hashes"]) for _, r in recorded_runs(folder)}


@pytest.mark.slow
def test_a_killed_sweep_on_mixed_lengths_resumes_to_the_same_bits(
    tmp_path: Path, tiny_folder: Callable[[str], Path], mixed_lengths: list[str]
) -> None:
    words = [*FAST, "model=local", f"model.path={tiny_folder('llama')}", *mixed_lengths]
    words += ["trainer.steps=12", "trainer.checkpoint_every=2", "seed=0,1", "head=exclude,lora"]
    killed = tmp_path / "killed"

    def saved() -> bool:
        assert process.poll() is None, process.said
        return len(list(killed.glob("*/*/checkpoint/checkpoint.json"))) == 4

    begun = ["train", "-m", *words, f"output_dir={killed}"]
    with running(tmp_path, *begun, before=slowly) as process:
        wait_for(saved)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert {r["status"] for _, r in recorded_runs(killed)} == {"running"}
    assert cli.main(begun) == 0
    assert cli.main(["train", "-m", *words, f"output_dir={tmp_path / 'whole'}"]) == 0
    assert hashes(killed) == hashes(tmp_path / "whole")
    for _, entry in recorded_runs(killed):
        assert sum(entry["plan"]["pack"]["blocks"]) == entry["plan"]["pack"]["size"] == 4


@pytest.mark.slow
def test_the_plan_names_the_share_of_real_tokens(
    tiny_folder: Callable[[str], Path], mixed_lengths: list[str]
) -> None:
    words = [*FAST, *mixed_lengths, "model=local", "data.group_by_length=false,true"]
    said = say("plan", "-m", *words, f"model.path={tiny_folder('llama')}")
    (line,) = (line for line in said.out.splitlines() if line.startswith("rows "))
    assert "examples lie end to end; 100% of the computed tokens are real (padded" in line
    eager = [f"model.path={tiny_folder('bloom')}", "model.attn_implementation=eager"]
    found = json.loads(say("plan", "-m", *words, *eager, "--json").out)["runs"]
    plainly, grouped = (one["lengths"] for one in found)
    assert {one["padded"] for one in found} == {
        "BloomForCausalLM computes attention in a way of its own"
    }
    assert grouped["tokens"] / grouped["rows"] > plainly["tokens"] / plainly["rows"]
    shown = say("plan", *words[:-1], *eager)
    share = f"{plainly['tokens'] / plainly['rows']:.0%} of the computed tokens are real"
    assert any(f"padded to its longest; {share}" in line for line in shown.out.splitlines())


def test_the_plan_says_where_a_pack_cannot_pay(
    tiny_folder: Callable[[str], Path], mixed_lengths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that is slow at arithmetic a run alone keeps it busy."""
    words = [*FAST, *mixed_lengths, "model=local", f"model.path={tiny_folder('llama')}", "seed=0,1"]
    for calls, busy in ((0.05, True), (0.9, False)):  # seconds of a step that calls take
        monkeypatch.setattr(Needs, "step_seconds", lambda *_, calls=calls: (1.0, calls))
        said = say("plan", "-m", *words).out
        assert ("a run alone keeps this device busy" in said) == busy


def test_the_plan_refuses_data_that_train_would_refuse(
    mixed_lengths: list[str], tiny_folder: Callable[[str], Path]
) -> None:
    words = [*FAST, *mixed_lengths, "model=local", f"model.path={tiny_folder('llama')}"]
    said = say("plan", *words, "data.max_length=2")
    assert said.code == 2 and "data.max_length: must let at least one" in said.err


def test_batches_grouped_by_length_are_another_run(
    tiny_folder: Callable[[str], Path], mixed_lengths: list[str], tmp_path: Path
) -> None:
    words = [*FAST, "model=local", f"model.path={tiny_folder('llama')}", *mixed_lengths]
    words += ["data.group_by_length=false,true", f"output_dir={tmp_path}"]
    assert say("train", "-m", *words).code == 0
    plainly, grouped = sorted(
        (entry for _, entry in recorded_runs(tmp_path)),
        key=lambda entry: entry["config"]["data"]["group_by_length"],
    )
    assert plainly["run_id"] != grouped["run_id"]
    assert plainly["hashes"]["data_order"] != grouped["hashes"]["data_order"]
    assert plainly["hashes"]["train_tokens"] == grouped["hashes"]["train_tokens"]
    # Nothing padded in either: grouping only changes which examples meet.
    assert grouped["plan"]["lengths"]["padded_rows"] < plainly["plan"]["lengths"]["padded_rows"]
    assert all(one["plan"]["lengths"]["rows"] == one["cost"]["train_tokens"]
               for one in (plainly, grouped))  # fmt: skip
