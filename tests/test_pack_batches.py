"""Packed = solo in parts of a batch, recomputed, over shared layers and in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMOKE, composed, recorded_runs, say
from equality import compare_gradients, compare_training, relative
from stock import TINY, Stock, copy_of, gradients, mixture, packed, tokens_of, train_pack

from lorabench import data, plan
from lorabench import model as base_model
from lorabench.pack import Batch, ModulePack


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize(
    ("words", "shared"),
    [
        pytest.param(["trainer.micro_batch_size=2"], True, marks=pytest.mark.slow),
        (["trainer.micro_batch_size=2"], False),
        (["trainer.gradient_checkpointing=true"], True),
        (["trainer.gradient_checkpointing=true"], False),
    ],
)
def test_micro_batches_and_checkpointing(
    words: list[str], shared: bool, tiny_folder: Callable[[str], Path]
) -> None:
    """A layer that is recomputed must see what it saw: masks, and a shared batch repeated."""
    common = ["model.dtype=float64", "model=local", f"model.path={tiny_folder('llama')}"]
    configs = [
        composed(
            *TINY, *common, *words, "lora.lora_dropout=0.1", "trainer.steps=4", f"seed={i}", *own
        )
        for i, own in enumerate((["head=lora", "lora.r=4"], ["head=full", "lora.r=6"]))
    ]
    for config in configs if shared else ():
        config.seeds.data = 0
    loss, (weights, name) = compare_training(configs)
    assert loss < 1e-12  # float64 sums in another order
    assert weights < 1e-11, name


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize(
    ("kind", "words", "repeated"),
    [
        # Adapters in the last layer and on the head: layer 0 runs once, layer 1 R times.
        ("llama", ["target_modules.names='.*layers[.]1[.].*_proj'"], True),
        ("gpt2", ["target_modules.names='.*[.]h[.]1[.].*c_(attn|fc)'"], True),
        # The head alone: every layer runs once.
        (
            "gemma",
            [
                "target_modules.names=[q_proj]",
                "target_modules.exclude=[q_proj]",
            ],
            False,
        ),
    ],
)
def test_layers_below_the_first_adapted_one_run_once(
    kind: str, words: list[str], repeated: bool, tiny_folder: Callable[[str], Path]
) -> None:
    configs = [
        composed(
            *TINY,
            "model.dtype=float64",
            "model=local",
            f"model.path={tiny_folder(kind)}",
            "target_modules=custom",
            *words,
            "head=lora",
            "trainer.steps=6",
            f"lora.r={r}",
            f"seeds.init={r}",
        )
        for r in (2, 5, 3)
    ]
    rows: dict[str, list[int]] = {"first": [], "last": []}
    pack = packed(configs)
    layers = pack.tree.transformer.h if kind == "gpt2" else pack.tree.model.layers
    for name, layer in (("first", layers[0]), ("last", layers[1])):
        # The module inside the layer sees what the layer's own hooks made of its input.
        inside = next(m for m in layer.children())
        inside.register_forward_hook(
            lambda m, args, out, name=name: rows[name].append(
                (out[0] if isinstance(out, tuple) else out)[..., 0].numel()
            )
        )
    train_pack(pack)
    tokens, _ = tokens_of(configs[0])
    orders = data.order(len(tokens), configs[0].trainer.batch_size, 0, 6)
    once = [sum(len(tokens.input_ids[i]) for i in indices) for indices in orders]
    assert rows == {"first": once, "last": [3 * n if repeated else n for n in once]}
    loss, (weights, name) = compare_training(configs)
    assert loss < 1e-12 and weights < 1e-11, name  # float64 sums in another order


@pytest.mark.parametrize("kind", ["bloom", "mpt", "falcon"])
def test_layers_that_take_more_than_states_and_masks(
    kind: str, tiny_folder: Callable[[str], Path]
) -> None:
    """On a shared batch of as many examples as heads: what has a row a head is no example's.

    Falcon adds to a layer's output in place.
    """
    eager = ["model.attn_implementation=eager"] if kind != "falcon" else []
    common = ["model=local", f"model.path={tiny_folder(kind)}", *eager, "trainer.batch_size=4"]
    runs = (["head=exclude", "lora.r=2"], ["head=lora", "lora.r=3"])
    configs = [composed(*TINY, *common, "trainer.steps=3", *own) for own in runs]
    worst, name = compare_gradients(configs, [0, 2])
    assert worst <= 1e-5, name  # float32 roundings (6e-8) behind one another


def test_bfloat16_autocast_equals_stock_peft_under_autocast(
    tiny_folder: Callable[[str], Path],
) -> None:
    """From the same weights, after some steps: neither side is exact, so the bound is loose."""
    configs = mixture("llama", tiny_folder("llama"), 0.1, "trainer.dtype=bfloat16")
    for config in configs:
        config.trainer.steps = 12
    pack = packed(configs)
    train_pack(pack)
    for stacked in pack.stacked.values():
        assert stacked.value.dtype == torch.float32, "trained weights stay in float32"
    tokens, pad_id = tokens_of(configs[0])
    stocks = [Stock(config, copy_of(pack.adapter_state(i))) for i, config in enumerate(configs)]
    pairs = [data.batch(tokens, stock.order[11], stock.length, pad_id) for stock in stocks]
    batch = Batch.make(
        [ids for ids, _ in pairs], [labels for _, labels in pairs], [1] * len(pairs)
    )  # fmt: skip
    counts = [int((labels != data.IGNORED).sum()) for _, labels in pairs]
    losses = pack.forward_backward(11, 0, batch, counts).tolist()
    worst = (0.0, "")
    for run, stock in enumerate(stocks):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = stock.loss(11)
        assert losses[run] == pytest.approx(expected, rel=5e-3)  # bfloat16: 2^-9 a rounding
        for name, mine in gradients(pack, run).items():
            theirs = stock.parameters[name].grad
            assert theirs is not None
            worst = max(worst, (relative(mine, theirs), f"run {run}: {name}"))
    print(f"\nlargest relative difference of a bfloat16 gradient {worst[0]:.2e} ({worst[1]})")
    # A dozen bfloat16 roundings (2^-9 = 0.002) behind one another, cancelling in small gradients.
    assert worst[0] < 0.1, worst


class AutocastStock(Stock):
    def loss(self, step: int) -> float:
        # A context per step: autocast casts a weight once per context, and would miss its updates.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().loss(step)


ATTENTION = ["target_modules=attention"]  # the last feed-forward block is frozen


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "dtype", "words"),
    [
        ("gemma", "float32", [*ATTENTION, "head=exclude"]),
        ("gpt2", "float32", [*ATTENTION, "head=lora", "lora.bias=lora_only"]),
        ("bert", "float32", ["target_modules=mlp", "head=full"]),
        ("gpt2", "bfloat16", [*ATTENTION, "lora.bias=all"]),  # LayerNorms with a trained bias
        ("falcon", "bfloat16", [*ATTENTION, "lora.bias=all"]),  # trains alone
    ],
)
def test_bfloat16_losses_equal_stock_pefts_under_autocast(
    kind: str, dtype: str, words: list[str], alone: bool, tiny_folder: Callable[[str], Path]
) -> None:
    """A layer that hands on another dtype than the module it replaces would raise, or differ."""
    configs = [
        composed(
            *TINY, "model=local", f"model.path={tiny_folder(kind)}", f"model.dtype={dtype}",
            "trainer.dtype=bfloat16", "trainer.steps=6", "trainer.warmup_steps=0", *words,
            f"lora.r={r}", f"seeds.init={r}",
        )
        for r in (4, 8)
    ]  # fmt: skip
    if alone or kind == "falcon":
        base = base_model.load(configs[0].model, "cpu")
        packs = [ModulePack(base, c, plan.make(c).lora_modules, "cpu") for c in configs[:1]]
    else:
        packs = [packed(configs)]
    for pack in packs:
        initial = [copy_of(pack.adapter_state(run)) for run in range(pack.size)]
        losses = train_pack(pack)
        for run, config in enumerate(pack.configs):
            expected = AutocastStock(config, initial[run]).train()
            # One bfloat16 rounding is 2^-9 = 2e-3; over the targets of a batch roundings cancel
            # (measured: 7e-5). Without the updates losses would be off by 2e-3 and more.
            assert losses[run] == pytest.approx(expected, rel=5e-4), run


@pytest.mark.slow
def test_a_frozen_last_feed_forward_block_trains_in_bfloat16_autocast(tmp_path: Path) -> None:
    """From the command line, alone and in a pack."""
    words = [*SMOKE, *ATTENTION, "trainer.dtype=bfloat16", "model.dtype=float32"]
    for name, more in (("alone", []), ("packed", ["-m", "lora.r=2,4"])):
        said = say("train", *words, *more, f"output_dir={tmp_path / name}")
        assert said.code == 0, said.err
        sizes = [r["plan"]["pack"]["size"] for _, r in recorded_runs(tmp_path / name)]
        assert sizes == ([1] if name == "alone" else [2, 2])
