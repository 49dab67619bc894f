"""How attention goes through examples that lie end to end, and which models suit that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from tiny import SMALL, tiny_config

from lorabench.pack import attention, probe, ways
from lorabench.pack.ways import Buckets

# --- buckets ---------------------------------------------------------------------------------


def test_every_token_has_one_place_and_what_fills_a_row_is_its_own() -> None:
    lengths = [1, 17, 300, 8, 1, 64, 65, 33]
    found = Buckets(lengths, "cpu")
    owner = np.repeat(np.arange(len(lengths)), lengths)
    assert torch.equal(found.to_Q[found.back_P], torch.arange(sum(lengths)))
    place = 0
    for count, width in found.shapes:
        rows = owner[found.to_Q[place : place + count * width].numpy()].reshape(count, width)
        assert (rows == rows[:, :1]).all() and (np.array(lengths)[rows[:, 0]] <= width).all()
        place += count * width
    assert place == len(found.to_Q)


def test_a_bucket_is_at_most_an_eighth_longer() -> None:
    for length in range(1, 5000):
        assert length <= ways.rung(length, "cpu") <= max(length + 7, 1.125 * length)


def test_how_a_batch_is_looked_at_depends_on_no_mate() -> None:
    def kinds(device: str, exact: bool = False) -> list[str]:
        ways = attention.EndToEnd([[(1, [90, 40]), (2, [3, 4]), (1, [64, 64])]], device)
        return [type(way).__name__ for way in ways.ways(272, exact)]

    assert kinds("cpu") == ["Views", "Buckets", "Buckets"]
    assert kinds("cpu", exact=True) == ["Views"] * 3
    alone = attention.EndToEnd([[(1, [90, 40])]], "cpu")
    assert [type(way).__name__ for way in alone.ways(130, False)] == ["Views"]


def test_a_gpu_has_few_buckets() -> None:
    widths = {ways.rung(length, "cuda:1") for length in range(1, 4097)}
    assert widths == {32, 64, 128, 256, 512, 1024, 2048, 4096}
    assert all(n <= ways.rung(n, "cuda") < max(33, 2 * n) for n in range(1, 4097))


# --- architectures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["gemma", "gemma2", "gemma3", "llama", "qwen2", "qwen3", "gpt2", "opt", "phi3"]
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_probe_takes_what_computes_the_same(kind: str, implementation: str) -> None:
    model = t.AutoModelForCausalLM.from_config(
        tiny_config(kind, 61), attn_implementation="eager" if kind == "gemma2" else implementation
    )
    assert probe.why_padded(model) is None
    assert probe.suits(model.eval())


def test_the_probe_finds_what_does_not() -> None:
    """Positions counted from the ids; short convolutions that run over the rows."""
    plain = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
    roberta = t.RobertaConfig(vocab_size=61, **plain, is_decoder=True, pad_token_id=1)
    lfm2 = t.Lfm2Config(
        vocab_size=61, **plain, num_key_value_heads=2, layer_types=["conv", "full_attention"]
    )
    for config in (roberta, lfm2):
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(config).eval()
        assert probe.why_padded(model) is None, "nothing shows it before the weights are there"
        before = model.config._attn_implementation
        assert not probe.suits(model)
        assert model.config._attn_implementation == before


def test_what_shows_only_on_long_texts_is_known_before() -> None:
    """A sparse mask made only where the attention has a name its code knows."""
    plain = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
    config = t.MiniMaxM3VLTextConfig(vocab_size=61, **plain, intermediate_size=64)
    with torch.device("meta"):
        sparse = t.AutoModelForCausalLM.from_config(config)
        upcast = t.AutoModelForCausalLM.from_config(tiny_config("gpt2", 61))
    upcast.config.reorder_and_upcast_attn = True
    for model in (sparse, upcast):
        assert "by the name of its attention" in (probe.why_padded(model) or "")


def test_a_layer_may_neither_change_its_mask_nor_add_one() -> None:
    query = torch.zeros(1, 1, 5, 4)
    tree = t.AutoModelForCausalLM.from_config(tiny_config("llama", 61))
    layer = tree.model.layers[0].self_attn
    with attention.EndToEnd([[(1, [2, 3])]], "cpu").on(tree):
        mask = attention.masks(mask_function=None)
        with pytest.raises(ValueError, match="has changed its attention mask"):
            attention.attend(layer, query, query, query, mask[:, :, :1, :1])
        with pytest.raises(ValueError, match="hands blocks to its attention"):
            attention.attend(layer, query, query, query, None, blocks=torch.zeros(1, 5))


@pytest.mark.parametrize(("dtype", "leak"), [("float32", 1e-4), ("bfloat16", 0.03)])
def test_the_probe_feels_a_leak_below_its_tolerance(
    dtype: str, leak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(tiny_config("llama", 61)).eval()
    model.to(getattr(torch, dtype))
    assert probe._same(model)
    norm = type(model.model.norm).forward

    def leaking(self: Any, x: torch.Tensor) -> torch.Tensor:
        """The last norm lets a little of all rows into each."""
        y = norm(self, x)
        return y + leak * y.mean(1, keepdim=True) if self is model.model.norm else y

    monkeypatch.setattr(type(model.model.norm), "forward", leaking)
    assert not probe._same(model)
