"""Frozen norms: the bits of stock transformers' values and gradients, or its own module."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lorabench.pack.norms import FrozenRMSNorm, fuse_norms

WIDTH = 48


def tree_of(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.weight.add_(torch.randn(WIDTH, dtype=norm.weight.dtype) / 3)
    return nn.Sequential(norm).requires_grad_(False)


def through(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return y.detach(), x.grad


@pytest.mark.parametrize("kind", [GemmaRMSNorm, Gemma3RMSNorm, LlamaRMSNorm, Qwen3RMSNorm])
def test_values_and_gradients_are_those_of_the_architecture(kind: type) -> None:
    tree = tree_of(kind(WIDTH))
    stock = tree[0]
    fuse_norms(tree)
    assert isinstance(tree[0], FrozenRMSNorm)
    # Rows around one, large ones, ones where eps decides, and zeros.
    x = torch.randn(4, 3, WIDTH) * torch.tensor([1.0, 1e3, 1e-3, 0.0])[:, None, None]
    for mine, wanted in zip(through(tree[0], x), through(stock, x), strict=True):
        # The same operations in the same order: the same bits.
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0)


def test_float64_is_float64_throughout() -> None:
    """The architectures go down to float32 inside; a float64 run should not."""
    tree = tree_of(LlamaRMSNorm(WIDTH).double())
    fuse_norms(tree)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * tree[0].weight
    torch.testing.assert_close(tree[0](x), exact, rtol=1e-14, atol=1e-14)


LOW = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", LOW, ids=str)
@pytest.mark.parametrize("kind", [GemmaRMSNorm, LlamaRMSNorm])
def test_one_kernel_rounds_no_more_than_the_architecture(
    kind: type, device: torch.device
) -> None:
    """In bfloat16, as a GPU computes it, against the architecture's formula in float64."""
    tree = tree_of(kind(WIDTH).to(torch.bfloat16)).to(device)
    stock = tree[0]
    fuse_norms(tree)
    norm = tree[0]
    assert isinstance(norm, FrozenRMSNorm)
    x = torch.randn(64, WIDTH, device=device).to(torch.bfloat16)

    class OneKernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return norm.in_one_kernel(x)

    w = stock.weight.double() + (kind is GemmaRMSNorm)

    class Exact(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * w

    exact = through(Exact(), x.double())
    for mine, theirs, wanted in zip(
        through(OneKernel(), x), through(stock, x), exact, strict=True
    ):
        gap = float((mine.double() - wanted).norm() / wanted.norm())
        # The architecture's own roundings, 2^-9 each; another order may be a little worse.
        assert gap <= 1.2 * float((theirs.double() - wanted).norm() / wanted.norm())


def test_the_gradient_is_the_derivative() -> None:
    tree = tree_of(LlamaRMSNorm(WIDTH)).double()
    fuse_norms(tree)
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tree[0], (x,))


def test_low_precision_rounds_where_the_architecture_does() -> None:
    tree = tree_of(LlamaRMSNorm(WIDTH)).bfloat16()
    stock = tree[0]
    fuse_norms(tree)
    x = torch.randn(3, WIDTH, dtype=torch.bfloat16)
    assert torch.equal(tree[0](x), stock(x))


class ClippedRMSNorm(LlamaRMSNorm):
    """An architecture's own idea, under a name like the others'."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-1, 1)


class BiasedRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.01


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        normed = super().forward(x)
        return normed if gate is None else normed * gate


@pytest.mark.parametrize("kind", [ClippedRMSNorm, BiasedRMSNorm, GatedRMSNorm])
def test_a_norm_that_computes_something_else_is_left_alone(kind: type) -> None:
    tree = tree_of(kind(WIDTH))
    fuse_norms(tree)
    assert type(tree[0]) is kind


def test_a_norm_that_trains_is_left_alone() -> None:
    tree = nn.Sequential(LlamaRMSNorm(WIDTH))
    fuse_norms(tree)
    assert type(tree[0]) is LlamaRMSNorm


def test_a_whole_model_says_the_same() -> None:
    torch.manual_seed(0)
    config = t.Qwen3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64,
    )  # fmt: skip
    model = t.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = torch.randint(0, 64, (2, 9))
    before = model(ids).logits
    fuse_norms(model)
    count = sum(isinstance(module, FrozenRMSNorm) for module in model.modules())
    assert count == 2 * 4 + 1  # around attention and feed-forward, of queries and keys; the last
    assert torch.equal(model(ids).logits, before)
