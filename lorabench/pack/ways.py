"""The ways in which attention goes through examples that lie end to end.

Letters: P tokens of all examples, H heads, T tokens of an example, E width of a head, Q places of
all buckets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

VIEWED = 32  # tokens of a batch's mean example from which going example by example pays on a CPU


def few_calls(device: str) -> bool:
    """Whether a call costs more than what a small one computes: anywhere but on a CPU."""
    return not device.startswith("cpu")


def rung(length: int, device: str) -> int:
    """Length of the bucket an example goes to.

    At most an eighth above its own, from 64 on; with few calls the next power of two. Depends on
    the example alone, so that no mate moves it to another bucket.
    """
    if few_calls(device):
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


Way = Views | Buckets


def way_of(runs: int, lengths: list[int], device: str) -> Way:
    """What is fastest on a CPU for a batch that these many runs share."""
    is_long = sum(lengths) >= VIEWED * len(lengths)
    if is_long and len(set(lengths)) > 1:
        return Views(runs, lengths)
    return Buckets(runs * lengths, device)
