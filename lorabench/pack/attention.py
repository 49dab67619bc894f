"""Attention where the examples of a batch lie end to end in one row of tokens, without padding.

Every layer but attention sees each token by itself. Attention looks at one example at a time: here
the model's own attention function of transformers is called for each example, or where that would
be many small calls for a bucket of examples of about the same length, padded on the right; with the
model's own mask.

Letters: P tokens of all examples, H heads, E width of a head, Q places of all buckets.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
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
INNER = ("sdpa", "eager")  # what is called on the parts: functions that take any (B, H, T, E)
PLACES = ("position_ids", "cache_position")  # that attention may be handed and does not read
VIEWED = 32  # tokens of a batch's mean example from which going example by example pays on a CPU


def rung(length: int, device: str) -> int:
    """Length of the bucket an example goes to.

    At most an eighth above its own, from 64 on; on a GPU, where few calls count for more than what
    they compute, the next power of two. Depends on the example alone, so that no mate moves it to
    another bucket.
    """
    if not device.startswith("cpu"):
        return max(32, 1 << (length - 1).bit_length())
    step = max(8, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step


# Attention of some examples, (B, H, T, E) each, to (B, T, H, E).
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Views:
    """Examples looked at where they lie, each once for all runs that share it; nothing is padded.

    Args:
        runs: neighbours that see the same batch.
        lengths: of the batch's examples.
    """

    def __init__(self, runs: int, lengths: list[int]):
        self._runs, self._lengths = runs, lengths
        self.tokens = runs * sum(lengths)

    def attend(self, attention: Attention, *states: Tensor) -> Tensor:
        """Query, key and value, (P, H, E) each, to what comes out for every token, (P, H, E)."""
        parts = [x.reshape(self._runs, -1, *x.shape[1:]).split(self._lengths, 1) for x in states]
        found = [
            attention(*(x.transpose(1, 2) for x in example)) for example in zip(*parts, strict=True)
        ]
        y = torch.cat(found, 1)
        return y.view(-1, *y.shape[2:])


class Buckets:
    """Examples laid into padded buckets of similar lengths: few calls.

    Args:
        lengths: of the examples, in the order in which they lie end to end.
    """

    def __init__(self, lengths: list[int], device: str):
        widths = [rung(length, device) for length in lengths]
        first = list(itertools.accumulate(lengths, initial=0))
        order = sorted(range(len(lengths)), key=lambda example: widths[example])  # stable
        self.tokens = first[-1]
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
        there = np.zeros(place, bool)
        there[back] = True
        index = (np.concatenate(to), back, np.flatnonzero(~there))
        self.to_Q, self.back_P, self.fills = (torch.from_numpy(x).to(device) for x in index)

    def attend(self, attention: Attention, *states: Tensor) -> Tensor:
        """Query, key and value, (P, H, E) each, to what comes out for every token, (P, H, E)."""
        laid = list(states)
        if not self.as_they_lie:
            laid = [_Move.apply(x, self.to_Q, self.back_P) for x in states]
        sizes = [count * width for count, width in self.shapes]
        found = []
        for (count, width), *parts in zip(
            self.shapes, *(x.split(sizes) for x in laid), strict=True
        ):
            q, k, v = (x.reshape(count, width, *x.shape[1:]).transpose(1, 2) for x in parts)
            y = attention(q, k, v)
            found.append(y.reshape(count * width, *y.shape[2:]))
        y = torch.cat(found) if len(found) > 1 else found[0]
        return y if self.as_they_lie else _Move.apply(y, self.back_P, self.to_Q, self.fills)


class EndToEnd:
    """The examples of one forward pass, laid end to end.

    Args:
        levels: of each batch, how many runs see it and the lengths of its examples: above the
            place where shared batches are repeated, and below it, where one run stands for all.
            Told apart by their number of tokens.
    """

    def __init__(self, levels: list[list[tuple[int, list[int]]]], device: str):
        self.inner: dict[int, str] = {}  # by id of a part's config: what the model was loaded with
        self._masks: list[_Mask] = []
        self._levels = {sum(runs * sum(slab) for runs, slab in level): level for level in levels}
        self._ways: dict[tuple[int, bool], list[Views | Buckets]] = {}
        self._device = device

    def ways(self, tokens: int, exact: bool) -> list[Views | Buckets]:
        """How attention goes through the level with this number of tokens, part by part.

        Args:
            exact: without any padding, for attention that looks to the right.
        """
        if (tokens, exact) not in self._ways:
            level = self._levels[tokens]
            if exact:
                found: list[Views | Buckets] = [Views(*one) for one in level]
            elif self._device.startswith("cpu"):
                # By a run's own batch: no mate's examples change how its own are looked at.
                found = [
                    Views(runs, slab)
                    if sum(slab) >= VIEWED * len(slab) and len(set(slab)) > 1
                    else Buckets(runs * slab, self._device)
                    for runs, slab in level
                ]
            else:
                lengths = [length for runs, slab in level for length in runs * slab]
                found = [Buckets(lengths, self._device)]
            self._ways[tokens, exact] = found
        return self._ways[tokens, exact]

    def mask(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what stands for a mask of the model until a bucket asks for its own."""
        self._masks.append(_Mask(args, kwargs))
        return self._masks[-1].stand_in

    def mask_of(self, stand_in: Tensor | None) -> _Mask | None:
        """Return the mask that a layer was handed.

        Raises:
            ValueError: the layer made something else of it, which no bucket could take a part of.
        """
        if stand_in is None:
            return None
        for mask in self._masks:
            if mask.stand_in is stand_in:
                return mask
        raise ValueError("a layer has changed its attention mask")

    @contextmanager
    def on(self, tree: Any) -> Iterator[None]:
        """While a batch goes through a model, backward and recomputed layers included."""
        global _now
        before, _now = _now, self
        names = [(part, part._attn_implementation) for part in _parts(tree.config)]
        self.inner = {id(part): name for part, name in names}
        tree.config._attn_implementation = NAME  # of its parts too
        try:
            yield
        finally:
            _now = before
            self._masks.clear()
            for part, name in names:  # the whole before its parts
                part._attn_implementation = name


class _Mask:
    """A mask of the model, made for each width of a bucket when it is needed.

    Whether a bucket has any (a window may be longer than it) follows from its own width: no mate's
    long example takes a run's short ones to another kernel.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._args, self._kwargs = args, kwargs
        self._made: dict[int, Tensor | None] = {}
        self.stand_in = torch.ones(1, 1, 1, 1, dtype=torch.bool)

    def of(self, width: int, name: str) -> Tensor | None:
        """Return the mask of a bucket, (1, 1, T, T); None where the function needs none."""
        if width not in self._made:
            shape = {"batch_size": 1, "q_length": width, "kv_length": width, "attention_mask": None}
            make = ALL_MASK_ATTENTION_FUNCTIONS[name]
            self._made[width] = make(*self._args, **(self._kwargs | shape))
        return self._made[width]


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for key in getattr(config, "sub_configs", {}):
        if (part := getattr(config, key, None)) is not None:
            yield from _parts(part)


# transformers' registry holds plain functions: what lies where is looked up here. No context
# variable, because on a GPU autograd recomputes layers in a thread of its own.
_now: EndToEnd | None = None


class _Move(torch.autograd.Function):
    """Tokens into buckets, or back; each token has one place, and what fills a row no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, fills: Tensor | None = None
    ) -> Tensor:
        ctx.save_for_backward(inverse, fills)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Reads by the inverse: on a GPU, writing by an index sorts it to be deterministic.
        inverse, fills = ctx.saved_tensors
        back = grads[0].index_select(0, inverse)
        if fills is not None:
            back.index_fill_(0, fills, 0)
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
        attention_mask: what `masks` returned, or None.
    Returns:
        (1, P, H, E), and no weights.
    Raises:
        ValueError: the layer asks for more than attention within each example.
    """
    assert _now is not None and len(query) == 1, "called by a model whose batch lies end to end"
    tokens = query.shape[2]
    for name, given in kwargs.items():
        if isinstance(given, Tensor) and tokens in given.shape and name not in PLACES:
            raise ValueError(f"a layer hands {name} to its attention, which has a place a token")
    config = getattr(module, "config", None)
    name = _now.inner.get(id(config)) or next(iter(_now.inner.values()))
    inner, whole = _inner(module, name), _now.mask_of(attention_mask)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None if whole is None else whole.of(q.shape[2], name)
        found: Tensor = inner(module, q, k, v, mask, **kwargs)[0]
        return found

    ways = _now.ways(tokens, exact=not getattr(module, "is_causal", True))
    parts = [x[0].transpose(0, 1).split([way.tokens for way in ways]) for x in (query, key, value)]
    found = [way.attend(attention, *one) for way, *one in zip(ways, *parts, strict=True)]
    return (torch.cat(found) if len(found) > 1 else found[0])[None], None


def _inner(module: nn.Module, name: str) -> Callable[..., Any]:
    """The function that the model calls where its batch is padded."""
    if name == "eager":  # each architecture has its own: soft-capping, sinks
        return getattr(sys.modules[type(module).__module__], "eager_attention_forward")  # noqa: B009
    return ALL_ATTENTION_FUNCTIONS[name]


def masks(*args: Any, **kwargs: Any) -> Tensor:
    """The model's own mask, which each bucket gets for its width."""
    assert _now is not None
    return _now.mask(*args, **kwargs)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, masks)


# --- which models it suits -------------------------------------------------------------------


def body_of(tree: Any) -> tuple[str, Any]:
    """Path and module of what makes the hidden states of a language model."""
    path = tree.base_model_prefix
    if path not in dict(tree.named_children()):  # Llama 4's and others' says another name
        bodies = (name for name, m in tree.named_children() if isinstance(m, PreTrainedModel))
        path = next(bodies, path)
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
    if _looks_at_the_name(type(body).__module__) or getattr(
        tree.config, "reorder_and_upcast_attn", False
    ):
        return f"{type(tree).__name__} does other things by the name of its attention"
    if getattr(tree.config.get_text_config(), "attn_temperature_tuning", None):
        return f"{type(tree).__name__} scales queries by their place in the row"
    if "position_ids" not in inspect.signature(body.forward).parameters:
        return f"{type(body).__name__} counts positions itself"
    if type(tree).__name__.endswith("ForSequenceClassification") and not any(
        getattr(module, "is_causal", False) for module in tree.modules()
    ):
        return "an encoder pools its texts inside"
    return None


@functools.cache
def _looks_at_the_name(module: str) -> bool:
    """Whether an architecture's code asks which attention it has, as sparse ones do for masks."""
    source = inspect.getsource(sys.modules[module])
    return re.search(r"_attn_implementation (not )?in ", source) is not None


_PROBED: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
PROBE = (3, 11, 23)  # tokens; their sum is no other dimension of a model


def suits(base: PreTrainedModel) -> bool:
    """Whether a loaded base computes the same where examples lie end to end; tried once a base."""
    if base not in _PROBED:
        _PROBED[base] = why_padded(base) is None and _same(base)
    return _PROBED[base]


@torch.no_grad()
def _same(base: PreTrainedModel) -> bool:
    from lorabench.machine import is_out_of_memory

    _, body = body_of(base)
    device = str(base.device)
    vocabulary = base.config.get_text_config().vocab_size
    ids = [(7 * torch.arange(n, device=device) + 5 * n) % vocabulary for n in PROBE]
    others = [ids[0], (ids[1] + 3) % vocabulary, ids[2]]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    there = torch.arange(max(PROBE)) < torch.tensor(PROBE)[:, None]
    positions = torch.cat([torch.arange(n, device=device) for n in PROBE])[None]

    def end_to_end(examples: list[Tensor]) -> Tensor:
        with EndToEnd([[(1, list(PROBE))]], device).on(base):
            return body(**inputs(torch.cat(examples)[None], positions)).last_hidden_state[0]

    try:
        expected = body(**inputs(padded, None)).last_hidden_state[there.to(device)]
        found, changed = end_to_end(ids), end_to_end(others)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False  # whatever a model says of such a batch, it does not suit
    if found.shape != expected.shape:
        return False
    # Rounding differs by a few of the last bits; wrong positions differ in the first.
    bound = torch.finfo(found.dtype).eps ** 0.5
    gap = (found - expected).double().norm(dim=-1)
    if not bool((gap <= bound * expected.double().norm(dim=-1)).all()):
        return False
    # What is in one example reaches no other: not by a bit, or where experts get other numbers of
    # tokens by rounding alone.
    first, second, _ = PROBE
    apart = [slice(first), slice(first + second, None)]
    exact = all(torch.equal(found[part], changed[part]) for part in apart)
    if exact or found.dtype not in (torch.float32, torch.float64):
        return exact
    bound = 100 * torch.finfo(found.dtype).eps
    return all(
        float((found[part] - changed[part]).norm()) <= bound * float(found[part].norm())
        for part in apart
    )
