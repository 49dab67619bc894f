"""Soft-capped attention in blocks of queries, against Gemma 2's own eager function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import compare_training
from stock import mixture, packed, tokens_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma2Config
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.vaultgemma import modeling_vaultgemma

from lorabench.adapters import Clock
from lorabench.pack import Batch, attention, softcap
from lorabench.pack.batch import Laid
from lorabench.pack.head import RowHead
from lorabench.pack.probe import inputs
from lorabench.pack.rows import Spans
from lorabench.pack.solo import enable_checkpointing
from lorabench.train import train

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MIXED_DTYPES = torch.float32, torch.float32, torch.bfloat16
CAP, SCALING = 2.0, 0.3  # scores of one and more, which the cap bends


def states(
    tokens: int, dtype: torch.dtype, device: str, groups: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(2, 4, tokens, 16), (2, groups, tokens, 16), (2, groups, tokens, 16)]
    made = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    q, k, v = (x.to(device, dtype).requires_grad_() for x in made)
    return q, k, v


def eager(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """By transformers, with a whole mask."""
    tokens = q.shape[2]
    place = torch.arange(tokens, device=q.device)
    hidden = place > place[:, None]
    if window is not None:
        hidden |= place <= place[:, None] - window
    mask = torch.zeros(tokens, tokens, dtype=q.dtype, device=q.device)
    mask.masked_fill_(hidden, torch.finfo(q.dtype).min)
    module = torch.nn.Module()
    module.num_key_value_groups = q.shape[1] // k.shape[1]
    return modeling_gemma2.eager_attention_forward(
        module, q, k, v, mask[None, None], scaling=SCALING, softcap=CAP
    )[0]


def gap(mine: Tensor, theirs: Tensor) -> float:
    mine, theirs = mine.detach().double(), theirs.detach().double()
    return float((mine - theirs).norm() / theirs.norm())


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 1, 37, 200])
@pytest.mark.parametrize("tokens", [1, 128, 300])
@pytest.mark.parametrize("groups", [1, 4])
def test_values_and_gradients_are_eagers(
    tokens: int, window: int | None, groups: int, device: str
) -> None:
    mine, theirs = (states(tokens, torch.float64, device, groups) for _ in range(2))
    y = softcap.attend(*mine, SCALING, CAP, window)
    expected = eager(*theirs, window)
    assert gap(y, expected) < 1e-13  # float64 sums in another order
    g = torch.randn(y.shape, dtype=torch.float64, device=device)
    y.backward(g)
    expected.backward(g)
    for one, other in zip(mine, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        # Of a single token no score has a gradient: what is left there is rounding.
        if float(other.grad.norm()) > 1e-12:
            assert gap(one.grad, other.grad) < 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_in_lower_precision_it_rounds_as_eager(
    dtype: torch.dtype, bound: float, device: str
) -> None:
    """Bounds: those of a pack's gradients in float32, and a few roundings of 2^-9."""
    mine, theirs = (states(300, dtype, device) for _ in range(2))
    y, expected = softcap.attend(*mine, SCALING, CAP, 100), eager(*theirs, 100)
    g = torch.randn(y.shape, device=device).to(dtype)
    y.backward(g)
    expected.backward(g)
    assert gap(y, expected) < bound
    for one, other in zip(mine, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        assert gap(one.grad, other.grad) < bound


@pytest.mark.parametrize("device", DEVICES)
def test_under_autocast_it_has_the_dtypes_of_eager(device: str) -> None:
    """Rotary embeddings leave queries and keys in float32 there; the values are bfloat16.

    Held against float64, where eager is less exact: it rounds the weights' gradient to bfloat16.
    """
    exact, mine, theirs = (states(600, torch.float64, device) for _ in range(3))
    mine, theirs = (
        tuple(x.detach().to(d).requires_grad_() for x, d in zip(one, MIXED_DTYPES, strict=True))
        for one in (mine, theirs)
    )
    with torch.autocast(device, torch.bfloat16):
        y, expected = softcap.attend(*mine, SCALING, CAP, None), eager(*theirs, None)
    assert y.dtype == expected.dtype == torch.bfloat16
    truth = softcap.attend(*exact, SCALING, CAP, None)
    g = torch.randn(y.shape, device=device).bfloat16()
    for one in (y, expected):
        one.backward(g)
    truth.backward(g.double())
    for one, other, true in zip(mine, theirs, exact, strict=True):
        assert one.grad is not None and other.grad is not None and true.grad is not None
        assert one.grad.dtype == other.grad.dtype
        assert gap(one.grad, true.grad) <= 1.2 * gap(other.grad, true.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_no_example_decides_anothers_rounding(device: str) -> None:
    given = states(530, torch.float32, device)
    y = softcap.attend(*given, SCALING, CAP, None)
    g = torch.randn(y.shape, device=device)
    together = [y, *torch.autograd.grad(y, given, g)]
    for i in range(2):
        own = [x[i : i + 1].detach().requires_grad_() for x in given]
        y = softcap.attend(own[0], own[1], own[2], SCALING, CAP, None)
        alone = [y, *torch.autograd.grad(y, own, g[i : i + 1])]
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one[0], other[i])


class Largest(TorchDispatchMode):
    """The most numbers that a tensor has whose last two dimensions are both T."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens, self.squares = tokens, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.shape[-2:].count(self.tokens) == 2:
                self.squares = max(self.squares, leaf.numel())
        return found


def gemma2(tokens: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=100,
        attn_logit_softcapping=2.0,
        max_position_embeddings=2 * tokens, attn_implementation="eager",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    return model.requires_grad_(True)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_holds_no_square_of_its_tokens(checkpointed: bool) -> None:
    """Two layers of Gemma 2, one of them windowed: losses and gradients are transformers' own."""
    tokens, model = 600, gemma2(600)
    ids = torch.randint(0, 61, (tokens,), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
    expected.backward()
    theirs = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if checkpointed:
        model.train()
        enable_checkpointing(model)
    head = RowHead(model, Clock([0]), Spans(1), recomputed=checkpointed)
    labels = ids.numpy().copy()
    labels[0] = -100
    with Largest(tokens) as seen:
        laid = Laid(Batch.make([ids.numpy()[None]], [labels[None]], [1]), True, "input", "cpu")
        with laid.attention(model):
            nll = head.loss(head.hidden(laid), laid, [1])
            nll.sum().backward()
    assert seen.squares == 0
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        name = name.replace("mlp.block.", "mlp.")
        assert gap(parameter.grad, theirs[name]) < 1e-5, name  # float32, as above


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
def test_it_is_part_of_a_compiled_graph() -> None:
    tokens, model = 600, gemma2(600)
    ids = torch.randint(0, 61, (tokens,), generator=torch.Generator().manual_seed(1)).numpy()
    laid = Laid(Batch.make([ids[None]], [ids[None]], [1]), True, "input", "cpu")
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager", dynamic=False)
    found = []
    for body in (model.model, compiled):
        model.zero_grad()
        with laid.attention(model):
            given = inputs(laid.input_ids, laid.position_ids)
            body(**given).last_hidden_state.square().sum().backward()
        found.append([p.grad.clone() for p in model.model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        assert gap(mine, theirs) < 1e-5


def test_other_attention_is_left_alone() -> None:
    """Without a cap, with dropout, with sinks, or where it is short."""
    module, own = torch.nn.Module(), modeling_gemma2.eager_attention_forward
    assert softcap.suits(module, own, {"softcap": 50.0, "dropout": 0.0}, 512)
    assert not softcap.suits(module, own, {"softcap": 50.0, "dropout": 0.0}, 511)
    assert not softcap.suits(module, own, {"softcap": 50.0, "dropout": 0.1}, 512)
    assert not softcap.suits(module, own, {"softcap": None}, 512)
    copied, sinks = modeling_vaultgemma, modeling_gpt_oss
    assert softcap.suits(module, copied.eager_attention_forward, {"softcap": 50.0}, 512)
    assert not softcap.suits(module, sinks.eager_attention_forward, {"softcap": 50.0}, 512)
    assert not softcap.suits(module, gap, {"softcap": 50.0}, 512)
    module.is_causal = False
    assert not softcap.suits(module, own, {"softcap": 50.0}, 512)


@pytest.mark.parametrize(
    ("make", "changes", "is_causal", "window"),
    [
        (modeling_gemma2.create_causal_mask, {}, True, None),
        (modeling_gemma2.create_causal_mask, {"or_mask_function": lambda b, h, q, k: k < 3},
         False, None),
        (modeling_gemma2.create_sliding_window_causal_mask, {}, True, 100),
        (modeling_gemma2.create_sliding_window_causal_mask, {}, False, None),
        (modeling_gemma2.create_sliding_window_causal_mask, {}, False, 99),
    ],
)  # fmt: skip
def test_a_mask_is_causal_if_transformers_says_so(
    make: Callable[..., Any], changes: dict[str, Any], is_causal: bool, window: int | None
) -> None:
    """What a layer says of its window must be what its mask was made with."""
    model: Any = gemma2(12)
    there = attention.EndToEnd([[(1, [12])]], "cpu")
    with there.on(model):
        x = torch.zeros(1, 12, 32)
        mask = make(model.config, x, torch.ones(1, 12), None, torch.arange(12)[None], **changes)
        found = there.mask_of(mask)
        assert found is not None and found.is_causal(window) == is_causal


# --- packs -----------------------------------------------------------------------------------


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks of 16 queries from 32 tokens on; the tokens of each example that went through them."""
    monkeypatch.setattr(softcap, "LONG", 32)
    monkeypatch.setattr(softcap, "BLOCK", 16)
    found: list[int] = []
    real = softcap.attend

    def counting(q: Tensor, *rest: Any) -> Tensor:
        found.append(q.shape[2])
        return real(q, *rest)

    monkeypatch.setattr(softcap, "attend", counting)
    return found


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize(
    "words",
    [["trainer.gradient_checkpointing=true"], pytest.param([], marks=pytest.mark.slow)],
)
def test_packs_in_blocks_equal_stock_peft(
    words: list[str],
    tiny_folder: Callable[[str], Path],
    mixed_lengths: list[str],
    short_blocks: list[int],
) -> None:
    """As test_lengths has it, in blocks."""
    common = ["model.dtype=float64", "trainer.steps=3", *words, *mixed_lengths]
    found, (weights, name) = compare_training(
        mixture("gemma2", tiny_folder("gemma2"), 0.1, *common)
    )
    assert max(short_blocks) > 64
    # Float64 rounding (1e-16) of sums in another order, grown by three AdamW steps.
    assert found < 1e-11
    assert weights < 1e-10, name


def test_a_pack_in_mixed_precision_trains_in_blocks(
    tiny_folder: Callable[[str], Path],
    mixed_lengths: list[str],
    short_blocks: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = ["trainer.dtype=bfloat16", "trainer.steps=3", *mixed_lengths]
    configs = mixture("gemma2", tiny_folder("gemma2"), 0.0, *common)

    def losses() -> Tensor:
        tokens, pad_id = tokens_of(configs[0])
        return torch.tensor([step.loss for step in train(packed(configs), tokens, pad_id)])

    found = losses()
    assert max(short_blocks) > 64
    monkeypatch.setattr(softcap, "LONG", 1 << 30)
    # Losses of five: a few roundings of 2^-9 in some of the hidden states.
    torch.testing.assert_close(found, losses(), rtol=5e-3, atol=0)
