"""Where runs share a batch: once below the first adapted layer, from there once for every run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lorabench.pack.batch import Laid

# What a layer may be given where hidden states are repeated before it: states, masks and positions
# with one row an example, or one for all. Others may have rows of another kind (Bloom's alibi: one
# a head of an example, MPT's position_bias: one a head).
REPEATABLE = {
    "hidden_states", "attention_mask", "position_ids", "position_embeddings", "past_key_values",
    "layer_past", "use_cache", "output_attentions", "encoder_hidden_states",
    "encoder_attention_mask", "cache_position", "per_layer_input", "kwargs",
}  # fmt: skip


class Repeat:
    """A forward pre-hook that repeats each slab of a batch once for every run that sees it.

    Holds nothing of the pack: a bound method of the pack would tie module tree and pack in a
    reference cycle, and the memory of a finished pack would wait for the garbage collector.
    """

    def __init__(self) -> None:
        self.laid: Laid | None = None  # a batch that is repeated inside, while it is computed
        self._done: list[tuple[Tensor, Tensor]] = []  # masks and positions, of all layers

    @contextmanager
    def on(self, laid: Laid) -> Iterator[None]:
        self.laid = laid
        try:
            yield
        finally:
            self.laid = None
            self._done.clear()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.laid is None:
            return None
        return self._spread(tuple(args)), {k: self._spread(v) for k, v in kwargs.items()}

    def _spread(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._spread, value))
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        assert self.laid is not None
        laid = self.laid
        if laid.end_to_end:  # (1, P) or (1, P, D); what stands for a mask has four dimensions
            if value.dim() > 3 or len(value) != 1 or value.shape[1] != laid.at_input.total:
                return value
            counts, rows = laid.at_input.counts, value[0]
        else:  # (S B, ...)
            counts, rows = laid.examples.counts, value
            if len(value) != sum(counts):
                return value
        for known, repeated in self._done:
            if known is value:
                return repeated
        spread = laid.rows.spread(list(rows.split(counts)))
        self._done.append((value, spread[None] if laid.end_to_end else spread))
        return self._done[-1][1]


def is_repeatable(layer: nn.Module) -> bool:
    """Whether everything a layer may be given has a row an example, or one for all."""
    return REPEATABLE.issuperset(inspect.signature(layer.forward).parameters)
