"""lora.init=orthogonal: PEFT's distribution, seeded by module; packed, alone and in stock PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed, recorded_runs, say, scores
from equality import compare_training, differences
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from peft.tuners.lora import Linear
from stock import TINY, Stock, copy_of, packed, train_pack
from torch import Tensor, nn

from lorabench import adapters, data, plan
from lorabench import model as base_model
from lorabench.config import Config
from lorabench.pack import ModulePack

ORTHOGONAL = "lora.init=orthogonal"
R, WIDTH, OUT = 32, 400, 300


def pefts(seed: int) -> tuple[Tensor, Tensor]:
    """A and B as PEFT draws them, from the global stream."""
    settings = LoraConfig(init_lora_weights="orthogonal")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = nn.Linear(WIDTH, OUT)
        layer: Any = Linear(base, "default", settings, r=R, lora_alpha=8)
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def alone(config: Config) -> ModulePack:
    base = base_model.load(config.model, "cpu")
    return ModulePack(base, config, plan.make(config).lora_modules, "cpu")


# --- the draw --------------------------------------------------------------------------------


def test_a_and_b_have_pefts_distribution() -> None:
    draws = {
        "ours": [adapters.initial_ab(seed, "q", R, WIDTH, OUT, "orthogonal") for seed in range(4)],
        "theirs": [pefts(seed) for seed in range(4)],
    }
    found: dict[str, list[Tensor]] = {}
    for name, pairs in draws.items():
        for a, b in pairs:
            assert (a.shape, b.shape, a.dtype, b.dtype) == (
                (R, WIDTH), (OUT, R), torch.float32, torch.float32
            )  # fmt: skip
            assert a.is_contiguous() and b.is_contiguous()
            # Float32 rounding (6e-8) of A and of B, against the product of their sizes.
            assert float((b @ a).norm() / (b.norm() * a.norm())) < 1e-6
        found[name] = [
            torch.stack([torch.linalg.svdvals(pair[i].double()) for pair in pairs]) for i in (0, 1)
        ]
    for ours, theirs in zip(found["ours"], found["theirs"], strict=True):
        # Each is a Gaussian matrix in half of the ranks; the other half is rounding.
        half = R // 2
        assert float(torch.cat([ours, theirs])[:, half:].max()) < 1e-5
        # Of 4 x 16 singular values the mean varies by about 0.3%, each one by about 4%.
        mean = [float(values[:, :half].mean()) for values in (ours, theirs)]
        assert mean[0] == pytest.approx(mean[1], rel=0.02)
        torch.testing.assert_close(
            ours[:, :half].mean(0), theirs[:, :half].mean(0), rtol=0.08, atol=0
        )
        norms = [float(values.square().sum(1).sqrt().mean()) for values in (ours, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_the_halves_of_the_ranks_are_drawn_anew_for_each_module() -> None:
    """Not the first ranks to A and the last to B: every rank takes part in both."""
    projections = []
    for name in ("q", "k"):
        a, b = adapters.initial_ab(0, name, R, WIDTH, OUT, "orthogonal")
        for one in (a.norm(dim=1), b.norm(dim=0)):
            assert float(one.min() / one.max()) > 0.3
        projections.append(torch.linalg.svd(a.T)[2][: R // 2])
    # Two random 16-dimensional subspaces of 32 dimensions share cos^2 of 1/2 on average.
    overlap = float((projections[0] @ projections[1].T).square().sum() / (R // 2))
    assert 0.3 < overlap < 0.7


def test_it_depends_on_seed_name_and_shape() -> None:
    def draw(seed: int = 0, name: str = "q", r: int = 8, width: int = 40, out: int = 30) -> Tensor:
        return torch.cat(
            [t.flatten() for t in adapters.initial_ab(seed, name, r, width, out, "orthogonal")]
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first = draw()
        state = torch.random.get_rng_state()
        torch.manual_seed(6)
        assert torch.equal(first, draw())
        torch.manual_seed(5)
        assert torch.equal(state, torch.random.get_rng_state()), "nothing from the global stream"
    others = [draw(seed=1), draw(name="k"), draw(width=41)[: len(first)]]
    assert all(not torch.equal(first, other) for other in others)


# --- in a run --------------------------------------------------------------------------------


def test_a_run_starts_alike_packed_and_alone_and_as_the_base_does(
    tiny_folder: Callable[[str], Path],
) -> None:
    """Neither mates nor other targets change A and B; B A = 0 leaves the logits as they were."""
    words = [*TINY, "model=local", f"model.path={tiny_folder('gpt2')}"]  # Conv1D, transposed
    one = composed(*words, ORTHOGONAL, "lora.r=4", "target_modules=attention", "head=lora")
    mate = composed(*words, ORTHOGONAL, "lora.r=16", "lora.use_rslora=true", "seed=3")
    plainer = composed(*words, "lora.r=6", "seed=3")
    expected = alone(one).adapter_state(0)
    for mates in ([one, mate], [plainer, one]):
        pack = packed(mates)
        state = pack.adapter_state(mates.index(one))
        assert set(state) == set(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert all(float(tensor.norm()) > 0 for tensor in expected.values())
    more = alone(composed(*words, ORTHOGONAL, "lora.r=4", "head=lora")).adapter_state(0)
    assert set(expected) < set(more)
    assert all(torch.equal(more[name], expected[name]) for name in expected)

    base, wrapped = base_model.load(one.model, "cpu"), alone(one).wrapped.eval()
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, untouched = wrapped(input_ids=ids).logits, base(input_ids=ids).logits
    # Float32 rounding (6e-8) of B A x, in two layers and the head.
    torch.testing.assert_close(logits, untouched, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("float64_inside")
def test_packed_and_alone_it_trains_as_in_stock_peft(tiny_folder: Callable[[str], Path]) -> None:
    common = [
        *TINY, "model=local", f"model.path={tiny_folder('llama')}", "model.dtype=float64",
        "trainer.steps=8", "trainer.batch_size=2",
    ]  # fmt: skip
    configs = [
        composed(*common, *words)
        for words in (
            [ORTHOGONAL, "lora.r=4", "head=lora", "lora.lora_dropout=0.1"],
            ["lora.r=5", "head=full", "lora.init=gaussian"],  # a mate of another init
            [ORTHOGONAL, "lora.r=8", "lora.use_rslora=true", "lora.rank_pattern={q_proj: 2}"],
        )
    ]
    loss, (weights, name) = compare_training(configs)
    # Float64 rounding (1e-16) of sums in another order, grown by eight AdamW steps.
    assert loss < 1e-10
    assert weights < 1e-9, name

    solo = alone(configs[0])
    initial = copy_of(solo.adapter_state(0))
    losses, stock = train_pack(solo), Stock(configs[0], initial)
    loss, (weights, name) = differences(solo, [initial], losses, [(stock, stock.train())])
    assert loss < 1e-10
    assert weights < 1e-9, name


def test_doras_magnitudes_start_as_the_base_weights_norms() -> None:
    """Bitwise those of the default init: PEFT would take them from draws of its own."""
    words = [*TINY, "lora.use_dora=true", "lora.r=4", "target_modules=attention"]
    states = [
        alone(composed(*words, f"lora.init={init}")).adapter_state(0)
        for init in ("default", "orthogonal")
    ]
    magnitudes = [name for name in states[0] if "magnitude" in name]
    assert magnitudes and set(states[0]) == set(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in magnitudes)
    assert all(float(t.norm()) > 0 for name, t in states[1].items() if ".lora_B." in name)


@pytest.mark.parametrize("kind", ["packed", "alone"])
def test_a_saved_adapter_says_so_and_reloads_in_plain_peft(kind: str, tmp_path: Path) -> None:
    words = [*TINY, ORTHOGONAL, "lora.r=4", "target_modules=attention"]
    one = composed(*words)
    pack = packed([one, composed(*words, "seed=1")]) if kind == "packed" else alone(one)
    state = pack.adapter_state(0)
    adapters.save(state, pack.settings(0), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["init_lora_weights"] == "orthogonal"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own, of transformers' renaming
        model = PeftModel.from_pretrained(base_model.load(one.model, "cpu"), str(tmp_path))
    read = adapters.adapter_state(model)
    assert set(read) == set(state)
    assert all(torch.equal(read[name], state[name]) for name in state)


# --- the command line ------------------------------------------------------------------------


@pytest.mark.slow
def test_init_and_ratio_from_the_command_line(tmp_path: Path) -> None:
    """Planned, trained in one pack, scored; plain PEFT gives the recorded scores."""
    words = [
        *TINY, "target_modules=attention", "lora.r=4", ORTHOGONAL,
        "lora.loraplus_lr_ratio=16,null", "trainer.steps=2", "trainer.batch_size=2",
        "trainer.num_threads=1", f"output_dir={tmp_path}",
    ]  # fmt: skip
    planned = say("plan", "-m", *words, "--json")
    assert planned.code == 0, planned.err
    said = say("train", "-m", *words)
    assert said.code == 0, said.err
    found = recorded_runs(tmp_path)
    assert [record["status"] for _, record in found] == ["finished"] * 2
    assert [record["plan"]["pack"]["size"] for _, record in found] == [2, 2]
    ratios = {record["config"]["lora"]["loraplus_lr_ratio"] for _, record in found}
    assert ratios == {16.0, None}
    assert len({record["hashes"]["initial_adapter"] for _, record in found}) == 1
    assert len({record["hashes"]["adapter"] for _, record in found}) == 2

    config = composed(*TINY)
    tokenizer = base_model.tokenizer(config.model)
    tokens = data.tokenise(data.load(config.data).test, tokenizer, config.data)
    count, length = len(tokens), max(map(len, tokens.input_ids))
    ids, labels = map(
        torch.from_numpy, data.batch(tokens, range(count), length, data.pad_id(tokenizer))
    )
    for folder, record in found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tied layers
            model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1]
        nll = nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
        )
        value = float((nll.double().sum(1) / (labels[:, 1:] != -100).sum(1)).mean())
        # Float32, the same examples, GEMMs of other shapes.
        assert abs(scores(record)["test"]["nll"]["value"] - value) < 1e-6
    refused = say("train", "-m", *words, "lora.r=4,5")
    assert refused.code == 2
    assert "lora.r: must be even with lora.init=orthogonal; got 5; use 6" in refused.err
