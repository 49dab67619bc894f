"""Attention where the examples of a batch lie end to end in one row of tokens, without padding.

Every layer but attention sees each token by itself. Attention looks at one example at a time: here
examples of about the same length are laid into a bucket, padded on the right, and the model's own
attention function of transformers is called once a bucket, with the model's own mask.

Letters: P tokens of all examples, H heads, E width of a head, Q places of all buckets.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "lorabench_end_to_end"
INNER = ("sdpa", "eager")  # what is called on the buckets: functions that take any (B, H, T, E)


def rung(length: int) -> int:
    """Length of the bucket an example goes to: at most an eighth above its own, from 64 on.

    Depends on the example alone, so that no mate moves it to another bucket.
    """
    step = max(8, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step


class Buckets:
    """Where the tokens of each example lie in padded buckets of similar lengths.

    Args:
        lengths: of the examples, in the order in which they lie end to end.
        widths: of the bucket each example goes to.
    """

    def __init__(self, lengths: list[int], widths: list[int], device: str):
        first = list(itertools.accumulate(lengths, initial=0))
        order = sorted(range(len(lengths)), key=lambda example: widths[example])  # stable
        self.shapes = [
            (len(list(alike)), width)
            for width, alike in itertools.groupby(order, key=lambda example: widths[example])
        ]
        self.as_they_lie = order == sorted(order) and lengths == widths
        to, back, place = [], np.empty(first[-1], np.int64), 0
        for example in order:
            length, width = lengths[example], widths[example]
            # What fills a row is the example's own last token: no other example's comes in.
            to.append(first[example] + np.minimum(np.arange(width), length - 1))
            back[first[example] : first[example] + length] = place + np.arange(length)
            place += width
        self.to_Q = torch.from_numpy(np.concatenate(to)).to(device)
        self.back_P = torch.from_numpy(back).to(device)


class EndToEnd:
    """The examples of one forward pass, laid end to end.

    Args:
        levels: lengths of the examples: of all runs, and where layers below the first adapter
            see a shared batch once, of that batch. Told apart by their number of tokens.
    """

    def __init__(self, levels: list[list[int]], device: str):
        self.longest = rung(max(max(lengths) for lengths in levels))  # of a bucket, in tokens
        self.inner = "sdpa"  # the attention implementation that the model was loaded with
        self._lengths = {sum(lengths): lengths for lengths in levels}
        self._buckets: dict[tuple[int, bool], Buckets] = {}
        self._device = device

    def buckets(self, tokens: int, exact: bool) -> Buckets:
        """The buckets of the level with this number of tokens.

        Args:
            exact: without any padding, for attention that looks to the right.
        """
        if (tokens, exact) not in self._buckets:
            lengths = self._lengths[tokens]
            widths = lengths if exact else [rung(length) for length in lengths]
            self._buckets[tokens, exact] = Buckets(lengths, widths, self._device)
        return self._buckets[tokens, exact]

    @contextmanager
    def on(self, tree: Any) -> Iterator[None]:
        """While a batch goes through a model, backward and recomputed layers included."""
        global _now
        config = tree.config
        before, self.inner, _now = _now, config._attn_implementation, self
        config._attn_implementation = NAME  # of its parts too
        try:
            yield
        finally:
            _now = before
            config._attn_implementation = self.inner


# transformers' registry holds plain functions: what lies where is looked up here. No context
# variable, because on a GPU autograd recomputes layers in a thread of its own.
_now: EndToEnd | None = None


class _Move(torch.autograd.Function):
    """Tokens into buckets, or back; each token has one place, and what fills a row no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, fills: bool) -> Tensor:
        ctx.save_for_backward(index, inverse)
        ctx.fills, ctx.rows = fills, len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        index, inverse = ctx.saved_tensors
        if ctx.fills:
            return g.index_select(0, inverse), None, None, None
        back = g.new_zeros(ctx.rows, *g.shape[1:]).index_copy(0, index, g)
        return back, None, None, None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each example, for transformers' AttentionInterface.

    Args:
        query: (1, H, P, E); key and value may have fewer heads.
        attention_mask: from `masks`, (1, 1, T, T) of the longest example, or None.
    Returns:
        (1, P, H, E), and no weights.
    """
    assert _now is not None and len(query) == 1, "called by a model whose batch lies end to end"
    exact = not getattr(module, "is_causal", True)
    buckets = _now.buckets(query.shape[2], exact)
    inner = _inner(module, _now.inner)
    states = [x[0].transpose(0, 1) for x in (query, key, value)]  # (P, H, E)
    if not buckets.as_they_lie:
        states = [_Move.apply(x, buckets.to_Q, buckets.back_P, True) for x in states]
    sizes = [count * width for count, width in buckets.shapes]
    found = []
    for (count, width), *parts in zip(
        buckets.shapes, *(x.split(sizes) for x in states), strict=True
    ):
        # (examples, H, T, E)
        q, k, v = (x.reshape(count, width, *x.shape[1:]).transpose(1, 2) for x in parts)
        mask = None if attention_mask is None else attention_mask[:, :, :width, :width]
        out, _ = inner(module, q, k, v, mask, **kwargs)
        found.append(out.reshape(count * width, *out.shape[2:]))
    y = torch.cat(found) if len(found) > 1 else found[0]
    if not buckets.as_they_lie:
        y = _Move.apply(y, buckets.back_P, buckets.to_Q, False)
    return y[None], None


def _inner(module: nn.Module, name: str) -> Callable[..., Any]:
    """The function that the model calls where its batch is padded."""
    if name == "eager":  # each architecture has its own: soft-capping, sinks
        return getattr(sys.modules[type(module).__module__], "eager_attention_forward")  # noqa: B009
    return ALL_ATTENTION_FUNCTIONS[name]


def masks(*args: Any, **kwargs: Any) -> Tensor | None:
    """The model's own mask for the longest example, of which each bucket takes its corner."""
    assert _now is not None
    longest = _now.longest
    kwargs |= {"batch_size": 1, "q_length": longest, "kv_length": longest, "attention_mask": None}
    return ALL_MASK_ATTENTION_FUNCTIONS[_now.inner](*args, **kwargs)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, masks)


# --- which models it suits -------------------------------------------------------------------


def body_of(tree: Any) -> tuple[str, Any]:
    """Path and module of what makes the hidden states of a language model."""
    path = tree.base_model_prefix
    body = tree.get_submodule(path)
    if hasattr(body, "decoder"):  # OPT calls it past its body
        return f"{path}.decoder", body.decoder
    return path, body


def inputs(input_ids: Tensor, position_ids: Tensor | None) -> dict[str, Any]:
    """What a body is called with; the mask of ones says that nothing is padding."""
    found: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if position_ids is not None:
        found |= {"position_ids": position_ids, "attention_mask": torch.ones_like(input_ids)}
    return found


def why_padded(tree: PreTrainedModel) -> str | None:
    """The reason a model's batches are padded, read off the model without its weights."""
    _, body = body_of(tree)
    name = tree.config._attn_implementation
    if name not in INNER:
        return f"model.attn_implementation={name} is not called on parts of a batch"
    if not getattr(tree, "_supports_attention_backend", False):
        return f"{type(tree).__name__} computes attention in a way of its own"
    if "position_ids" not in inspect.signature(body.forward).parameters:
        return f"{type(body).__name__} counts positions itself"
    if type(tree).__name__.endswith("ForSequenceClassification") and not any(
        getattr(module, "is_causal", False) for module in tree.modules()
    ):
        return "an encoder pools its texts inside"
    return None


_PROBED: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
PROBE = (3, 11, 6)  # tokens


def suits(base: PreTrainedModel) -> bool:
    """Whether a loaded base computes the same where examples lie end to end; tried once a base."""
    if base not in _PROBED:
        _PROBED[base] = why_padded(base) is None and _same(base)
    return _PROBED[base]


@torch.no_grad()
def _same(base: PreTrainedModel) -> bool:
    _, body = body_of(base)
    device = str(base.device)
    vocabulary = base.config.get_text_config().vocab_size
    ids = [(7 * torch.arange(n, device=device) + 5 * n) % vocabulary for n in PROBE]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    there = torch.arange(max(PROBE)) < torch.tensor(PROBE)[:, None]
    expected = body(**inputs(padded, None)).last_hidden_state[there.to(device)]
    positions = torch.cat([torch.arange(n, device=device) for n in PROBE])
    try:
        with EndToEnd([list(PROBE)], device).on(base):
            given = inputs(torch.cat(ids)[None], positions[None])
            found = body(**given).last_hidden_state[0]
    except Exception:
        return False
    if found.shape != expected.shape:
        return False
    # Rounding differs by a few of the last bits; an example that sees another's tokens, or wrong
    # positions, differs in the first.
    bound = torch.finfo(found.dtype).eps ** 0.5
    gap = (found - expected).double().norm(dim=-1)
    return bool((gap <= bound * expected.double().norm(dim=-1)).all())
