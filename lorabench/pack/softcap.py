"""Causal attention with soft-capped scores, block by block of queries: never T x T scores.

Gemma 2 caps its scores by cap tanh(s / cap), which torch's fused attention cannot; its own eager
function holds several tensors of T x T a head. Here scores live for one block of queries, and are
computed again in the backward pass; only query, key and value are kept.

Letters: B examples, H heads, G heads of keys and values, J = H / G, T tokens, E width of a head,
N queries of a block, L keys they may see.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorabench.pack.rotary import code_of

LONG = 512  # tokens from which blocks are used: below, eager is faster where heads are narrow
BLOCK = 128  # queries; by themselves, so that no mate changes where a block ends
SCORES = 1 << 24  # numbers of a block's scores at a time: examples are taken in turns


def suits(module: nn.Module, function: Any, options: dict[str, Any], tokens: int) -> bool:
    """Whether an attention call can be made in blocks, and is long enough for it to pay.

    Args:
        function: what the architecture would call: Gemma 2's own eager function, to the
            instruction.
        options: what it would be called with.
    """
    if tokens < LONG or options.get("softcap") is None or options.get("dropout"):
        return False
    return getattr(module, "is_causal", True) and _is_gemma2s(function)


@torch.compiler.assume_constant_result
def _is_gemma2s(function: Any) -> bool:
    from transformers.models.gemma2 import modeling_gemma2

    return bool(code_of(function) == code_of(modeling_gemma2.eager_attention_forward))


def attend(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float, window: int | None
) -> Tensor:
    """Softmax of capped scores over the keys up to each query, times the values.

    Args:
        q: (B, H, T, E); k and v (B, G, T, E).
        window: keys that a query sees, its own included; None: all before it.
    Returns:
        (B, T, H, E), in the dtype of a product of q and k.
    """
    # As autocast would for each product; but a backward runs outside of it, in the dtypes saved.
    if torch.is_autocast_enabled(q.device.type):
        low = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(low) for x in (q, k, v))
    found: Tensor = _Blocks.apply(q, k, v, scaling, softcap, window)
    return found.transpose(1, 2)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, cap: float, window: int | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.how = scaling, cap, window
        y = torch.empty_like(q, memory_format=torch.contiguous_format)
        for some, queries, keys in _blocks(q, window):
            own = _Block(q[some], k[some], queries, keys, *ctx.how)
            y[some, :, queries] = own.merged(own.weights().to(v.dtype) @ v[some, :, keys])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        (g,) = grads
        exact = q.dtype if q.dtype == torch.float64 else torch.float32
        gq = torch.empty_like(q, memory_format=torch.contiguous_format)
        gk, gv = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (k, v))
        for some, queries, keys in _blocks(q, ctx.how[2]):
            own = _Block(q[some], k[some], queries, keys, *ctx.how)
            weights, g_own = own.weights(), own.split(g[some])
            gv[some, :, keys] += weights.to(v.dtype).transpose(-1, -2) @ g_own
            by_weights = (g_own @ v[some, :, keys].transpose(-1, -2)).to(weights.dtype)
            # Of softmax, then of cap tanh(s / cap), whose derivative is 1 - tanh^2.
            by_weights -= (by_weights * weights).sum(-1, keepdim=True)
            by_scores = by_weights.mul_(weights).mul_(own.slope()).mul_(ctx.how[0]).to(q.dtype)
            gq[some, :, queries] = own.merged(by_scores @ k[some, :, keys])
            gk[some, :, keys] += by_scores.transpose(-1, -2) @ own.q
        return gq, gk.to(k.dtype), gv.to(v.dtype), None, None, None


def _blocks(q: Tensor, window: int | None) -> Iterator[tuple[slice, slice, slice]]:
    """Examples, queries, and the keys that any of these queries sees."""
    count, heads, tokens, _ = q.shape
    at_once = max(1, SCORES // (heads * BLOCK * tokens))
    for first in range(0, count, at_once):
        for start in range(0, tokens, BLOCK):
            end = min(start + BLOCK, tokens)
            oldest = 0 if window is None else max(0, start - window + 1)
            yield slice(first, first + at_once), slice(start, end), slice(oldest, end)


class _Block:
    """Scores of some queries, those of the J heads that share keys side by side, (B, G, J N, L)."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        queries: slice,
        keys: slice,
        scaling: float,
        cap: float,
        window: int | None,
    ):
        self.shape = q.shape[0], q.shape[1], queries.stop - queries.start, q.shape[3]
        self.groups, self.queries, self.keys = k.shape[1], queries, keys
        self.q = self.split(q)
        raw = self.q @ k[:, :, keys].transpose(-1, -2)
        exact = raw.dtype if raw.dtype == torch.float64 else torch.float32
        self.tanh = raw.mul_(scaling).div_(cap).tanh_()
        place_N = torch.arange(queries.start, queries.stop, device=q.device)[:, None]
        place_L = torch.arange(keys.start, keys.stop, device=q.device)
        hidden_NL = place_L > place_N
        if window is not None:
            hidden_NL |= place_L <= place_N - window
        repeats = q.shape[1] // self.groups
        self._hidden, self._cap, self._exact = hidden_NL.repeat(repeats, 1), cap, exact

    def split(self, x: Tensor) -> Tensor:
        """These queries' part of (B, H, T, E), (B, G, J N, E)."""
        part = x[:, :, self.queries]
        return part.reshape(part.shape[0], self.groups, -1, part.shape[-1])

    def merged(self, y: Tensor) -> Tensor:
        """The inverse, (B, H, N, E)."""
        return y.reshape(self.shape)

    def weights(self) -> Tensor:
        """Softmax of the capped scores, at least float32."""
        scores = (self.tanh * self._cap).to(self._exact)
        return scores.masked_fill_(self._hidden, float("-inf")).softmax(-1)

    def slope(self) -> Tensor:
        """What the cap multiplies the gradient of the scores by."""
        tanh = self.tanh.to(self._exact)
        return 1 - tanh * tanh
