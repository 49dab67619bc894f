"""Soft-capped attention in blocks of queries, against Gemma 2's own eager function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma2Config
from transformers.models.gemma2 import modeling_gemma2

from lorabench.adapters import Clock
from lorabench.pack import Batch, softcap
from lorabench.pack.batch import Laid
from lorabench.pack.head import RowHead
from lorabench.pack.probe import inputs
from lorabench.pack.rows import Spans
from lorabench.pack.solo import enable_checkpointing

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
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
    tokens, model = 384, gemma2(384)
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
            nll = head.summed_nll(head.hidden(laid), laid)
            nll.sum().backward()
    assert seen.squares == 0
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        name = name.replace("mlp.block.", "mlp.")
        assert gap(parameter.grad, theirs[name]) < 1e-5, name  # float32, as above


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
def test_it_is_part_of_a_compiled_graph() -> None:
    tokens, model = 384, gemma2(384)
    ids = torch.randint(0, 61, (tokens,), generator=torch.Generator().manual_seed(1)).numpy()
    laid = Laid(Batch.make([ids[None]], [ids[None]], [1]), True, "input", "cpu")
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager", dynamic=False)
    found = []
    for body in (model.model, compiled):
        model.zero_grad()
        with laid.attention(model), Largest(tokens) as seen:
            given = inputs(laid.input_ids, laid.position_ids)
            body(**given).last_hidden_state.square().sum().backward()
        assert seen.squares == 0
        found.append([p.grad.clone() for p in model.model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        assert gap(mine, theirs) < 1e-5


def test_other_attention_is_left_alone() -> None:
    """Without a cap, with dropout, or where it is short."""
    module, own = torch.nn.Module(), modeling_gemma2.eager_attention_forward
    assert softcap.suits(module, own, {"softcap": 50.0, "dropout": 0.0}, 256)
    assert not softcap.suits(module, own, {"softcap": 50.0, "dropout": 0.0}, 255)
    assert not softcap.suits(module, own, {"softcap": 50.0, "dropout": 0.1}, 256)
    assert not softcap.suits(module, own, {"softcap": None}, 256)
    assert not softcap.suits(module, gap, {"softcap": 50.0}, 256)
    module.is_causal = False
    assert not softcap.suits(module, own, {"softcap": 50.0}, 256)
