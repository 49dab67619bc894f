"""How attention goes through examples that lie end to end, and which models suit that."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from tiny import SMALL, tiny_config
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import flex_attention
from transformers import masking_utils
from transformers.integrations import flex_attention as integration

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


# --- flex_attention --------------------------------------------------------------------------

# torch says so where it is not compiled, and looks at gradients while it traces what it then runs.
uncompiled = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention as torch writes it out, which has gradients on a CPU too."""
    monkeypatch.setattr(
        integration,
        "compile_friendly_flex_attention",
        lambda q, k, v, training=False, **settings: flex_attention(q, k, v, **settings),
    )
    monkeypatch.setattr(flex, "_validate_device", lambda *states: None)
    monkeypatch.setattr(
        masking_utils,
        "create_block_mask",
        lambda _compile=True, **settings: flex.create_block_mask(**settings),
    )


def states_and_gradients(model: Any, examples: list[torch.Tensor]) -> list[torch.Tensor]:
    """What a model says of examples, and of a padded batch if nobody lays them end to end."""
    lengths = [len(ids) for ids in examples]
    model.zero_grad()
    if model.config._attn_implementation == "flex_attention":
        positions = torch.cat([torch.arange(n, device=model.device) for n in lengths])[None]
        batch = probe.inputs(torch.cat(examples)[None], positions)
        with attention.EndToEnd([[(1, lengths)]], str(model.device)).on(model):
            y = model.model(**batch).last_hidden_state[0]
            (y * torch.linspace(-1, 2, y.shape[-1], device=y.device)).sum().backward()
    else:
        padded = torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)
        there = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        y = model.model(**probe.inputs(padded, None)).last_hidden_state[there.to(model.device)]
        (y * torch.linspace(-1, 2, y.shape[-1], device=y.device)).sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def two_models(kind: str, device: str, **changes: Any) -> list[Any]:
    """The same weights, once with the eager function and once with flex_attention."""
    config = tiny_config(kind, 61)
    for name, value in changes.items():
        setattr(config, name, value)
    found = []
    for name in ("eager", "flex_attention"):
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=name)
        for part, weight in model.named_parameters():
            if part.endswith(("q_proj.weight", "k_proj.weight")):
                weight.data *= 20  # as initialised, all scores are about zero
        found.append(model.to(device).eval())
    return found


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        pytest.param("gemma2", [[140, 33]], marks=uncompiled),
        *(
            pytest.param(kind, [[140, 33, 70], [3, 5, 11]], marks=[*uncompiled, pytest.mark.slow])
            for kind in ("gemma2", "llama", "qwen3")
        ),
    ],
)
def test_flex_attention_end_to_end_is_eager_padded(kind: str, lengths: list[list[int]]) -> None:
    """Windows and soft-capping included, in buckets and example by example."""
    changes = {"attn_logit_softcapping": 2.0} if kind == "gemma2" else {}
    stock, mine = two_models(kind, "cpu", **changes)
    assert probe.why_padded(mine) is None and (len(lengths) == 1 or probe.suits(mine))
    for batch in lengths:
        examples = [(7 * torch.arange(n) ** 2 + n) % 61 for n in batch]
        pairs = zip(
            states_and_gradients(mine, examples), states_and_gradients(stock, examples), strict=True
        )
        for one, other in pairs:
            # A few hundred float32 roundings (6e-8) behind one another.
            assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_flex_attention_on_a_gpu_keeps_no_scores(kind: str) -> None:
    """The compiled kernels: gradients are eager's, and memory is not of T x T."""
    size = {"head_dim": 32, "max_position_embeddings": 2048}
    changes = {"attn_logit_softcapping": 2.0, "sliding_window": 500} if kind == "gemma2" else {}
    stock, mine = two_models(kind, "cuda", **size, **changes)
    lengths = [2048, 1024, 700]
    examples = [(7 * torch.arange(n, device="cuda") ** 2 + n) % 61 for n in lengths]
    states_and_gradients(mine, examples)  # compiled
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = states_and_gradients(mine, examples)
    # Scores of the longest example alone, in one layer: 4 heads, float32.
    assert torch.cuda.max_memory_allocated() - held < 4 * 2048 * 2048 * 4
    for one, other in zip(found, states_and_gradients(stock, examples), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()  # as on a CPU; TF32 is off


# --- leaks -----------------------------------------------------------------------------------


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
