"""Rotary embeddings with a backward written by hand: half of autograd's passes over memory.

Only where an architecture's code is Llama's own, to the instruction: most copy it. The same
products and sums in the same order, so the same bits.
"""

from __future__ import annotations

import functools
import sys
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

NAME = "apply_rotary_pos_emb"


class _Rotate(torch.autograd.Function):
    """x cos + rotate_half(x) sin, (..., E); cos and sin broadcast and get no gradient.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.4.2, in Llama's order of the dimensions.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        low, high = sin.chunk(2, -1)
        first, second = x.chunk(2, -1)
        return _added(x * cos, -1, second * low, first * high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        low, high = sin.chunk(2, -1)
        first, second = grads[0].chunk(2, -1)
        return _added(grads[0] * cos, 1, second * high, first * low), None, None


def _added(y: Tensor, sign: int, turned: Tensor, other: Tensor) -> Tensor:
    """y, plus or minus one tensor in its first half and the other way in its second."""
    first, second = y.chunk(2, -1)
    first.add_(turned, alpha=sign)
    second.add_(other, alpha=-sign)
    return y


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """What takes the place of transformers' `apply_rotary_pos_emb`."""
    if not q.dtype == k.dtype == cos.dtype == sin.dtype:  # is computed in the widest of them
        found: tuple[Tensor, Tensor] = _llama().apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        return found
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)


def fuse_rotary(tree: nn.Module) -> None:
    """Let every attention that rotates as Llama does call `rotate`."""
    for module in tree.modules():
        kind: Any = type(module)
        now = getattr(sys.modules[kind.forward.__module__], NAME, None)
        if now is not None and (own := _rotating(kind, now)) is not None:
            module.__class__ = own


@functools.cache
def _rotating(kind: Any, now: Any) -> type[nn.Module] | None:
    """A class of attention that calls `rotate`; None where it does not rotate as Llama does.

    Its forward is the same code with one name of its module bound to something else: neither the
    class nor its module is changed.

    Args:
        now: what that name is bound to: somebody else may put a kernel of their own there.
    """
    forward: Any = kind.forward
    if not isinstance(forward, FunctionType) or forward.__closure__:
        return None
    module = sys.modules[forward.__module__]
    if NAME not in forward.__code__.co_names or not _is_llamas(module):
        return None
    names = forward.__globals__ | {NAME: rotate}
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return type(kind.__name__, (kind,), {"forward": own, "__module__": kind.__module__})


def _is_llamas(module: Any) -> bool:
    names = (NAME, "rotate_half")
    return all(
        code_of(getattr(module, n, None)) == code_of(getattr(_llama(), n)) for n in names
    )


def _llama() -> Any:
    from transformers.models.llama import modeling_llama

    return modeling_llama


def code_of(function: Any) -> Any:
    """What a function does, without its text and its place."""
    if not isinstance(function, FunctionType):
        return None
    code = function.__code__
    values = tuple(value for value in code.co_consts if not isinstance(value, str))
    return code.co_code, code.co_names, code.co_varnames, values, function.__defaults__
