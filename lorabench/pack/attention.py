"""Attention where the examples of a batch lie end to end in one row of tokens, without padding.

Every layer but attention sees each token by itself. Attention looks at one example at a time: here
the model's own attention function of transformers is called on parts of a batch (ways.py), with the
model's own mask.

Letters: P tokens of all examples, H heads, E width of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorabench.pack import softcap
from lorabench.pack.ways import Buckets, Views, Way, few_calls, way_of

NAME = "lorabench_end_to_end"
# What is called on the parts: functions that take any (B, H, T, E).
INNER = ("sdpa", "eager", "flex_attention")
PLACES = ("position_ids", "cache_position")  # that attention may be handed and does not read


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
        self._ways: dict[tuple[int, bool], list[Way]] = {}
        self._device = device

    def ways(self, tokens: int, exact: bool) -> list[Way]:
        """How attention goes through the level with this number of tokens, part by part.

        Args:
            exact: without any padding, for attention that looks to the right.
        """
        if (tokens, exact) not in self._ways:
            level = self._levels[tokens]
            if exact:
                found: list[Way] = [Views(*one) for one in level]
            elif few_calls(self._device):
                lengths = [length for runs, slab in level for length in runs * slab]
                found = [Buckets(lengths, self._device)]
            else:  # by a run's own batch: no mate's examples change how its own are looked at
                found = [way_of(runs, slab, self._device) for runs, slab in level]
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

    def is_causal(self, window: int | None) -> bool:
        """Whether transformers says that the mask is nothing but causal, with this window.

        It says so to sdpa, which then makes no mask; not if anything was added to the mask.
        """
        skip = self._kwargs.get("allow_is_causal_skip", False)
        return bool(skip) and self._kwargs.get("local_size") == window

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
    window = kwargs.get("sliding_window")
    is_causal = whole is not None and whole.is_causal(window)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if is_causal and softcap.suits(module, inner, kwargs, q.shape[2]):
            return softcap.attend(q, k, v, kwargs["scaling"], kwargs["softcap"], window)
        mask = None if whole is None else whole.of(q.shape[2], name)
        found: Tensor = inner(module, q, k, v, mask, **kwargs)[0]
        return found

    ways = _now.ways(tokens, exact=not getattr(module, "is_causal", True))
    states = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
    if len(ways) == 1:
        return ways[0].attend(attention, *states)[None], None
    parts = [x.split([way.tokens for way in ways]) for x in states]
    found = [way.attend(attention, *one) for way, *one in zip(ways, *parts, strict=True)]
    return torch.cat(found)[None], None


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
