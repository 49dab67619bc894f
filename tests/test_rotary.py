"""Rotary embeddings: the bits of stock transformers' values and gradients, or its own function."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as t
from tiny import tiny_config
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lorabench.pack.rotary import fuse_rotary, rotate


def angles(tokens: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    # Unequal halves, which no model has: a swap of the two would show.
    found = torch.rand(2, 1, tokens, width, generator=draw, dtype=torch.float64) * 2 - 1
    return found[0].to(dtype), found[1].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 2])
def test_values_and_gradients_are_transformers(dtype: torch.dtype, dim: int) -> None:
    cos, sin = angles(7, 8, dtype)
    shape = (2, 3, 7, 8) if dim == 1 else (2, 7, 3, 8)
    found = []
    for function in (rotate, apply_rotary_pos_emb):
        torch.manual_seed(1)
        q, k = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
        y = function(q, k, cos, sin, unsqueeze_dim=dim)
        torch.autograd.backward(y, [torch.randn(shape).to(dtype) for _ in range(2)])
        found.append([*y, q.grad, k.grad])
    for mine, wanted in zip(*found, strict=True):
        # The same operations in the same order: the same bits.
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0)


def test_the_gradient_is_the_derivative() -> None:
    cos, sin = angles(3, 6, torch.float64)
    q, k = (torch.randn(1, 2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda q, k: rotate(q, k, cos, sin), (q, k))


def test_mixed_precision_is_left_to_transformers() -> None:
    cos, sin = angles(3, 6, torch.float32)
    q, k = (torch.randn(1, 2, 3, 6).bfloat16() for _ in range(2))
    for mine, wanted in zip(
        rotate(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        assert mine.dtype == wanted.dtype == torch.float32 and torch.equal(mine, wanted)


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(tiny_config(kind, 61)).eval()


def own_forwards(model: nn.Module) -> int:
    """How many modules rotate by a function of ours."""
    functions = [type(module).forward for module in model.modules()]
    names = [getattr(one, "__globals__", {}).get("apply_rotary_pos_emb") for one in functions]
    return sum(name is rotate for name in names)


@pytest.mark.parametrize("kind", ["llama", "gemma", "gemma2", "gemma3", "qwen2", "qwen3"])
def test_a_model_says_the_same_to_the_bit(kind: str) -> None:
    stock = model_of(kind)
    mine = copy.deepcopy(stock)
    fuse_rotary(mine)
    assert own_forwards(mine) == stock.config.num_hidden_layers and own_forwards(stock) == 0
    ids = torch.arange(12).reshape(2, 6) % 61
    for one in (mine, stock):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_("norm" not in name)  # frozen, as in a pack
        one(input_ids=ids, labels=ids).loss.backward()
    pairs = zip(mine.named_parameters(), stock.parameters(), strict=True)
    for (name, one), other in pairs:
        if one.requires_grad:
            assert torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("kind", ["gpt2", "opt", "phi3"])
def test_an_architecture_with_an_idea_of_its_own_keeps_it(kind: str) -> None:
    model = model_of(kind)
    fuse_rotary(model)
    assert own_forwards(model) == 0


def test_a_function_that_was_replaced_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's kernel in the place of Llama's function is what they want to run."""
    from transformers.models.qwen2 import modeling_qwen2

    def kernel(q, k, cos, sin, unsqueeze_dim=1):
        return q, k

    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", kernel)
    model = model_of("qwen2")
    fuse_rotary(model)
    assert own_forwards(model) == 0
