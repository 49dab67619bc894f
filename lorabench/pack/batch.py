"""One micro-batch: examples as they come, and laid out as tensors for a pack.

Letters: R runs in the pack, S slabs (batches that differ), B examples of a slab, T tokens of the
longest, P tokens of all examples, N rows of hidden states that carry a loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lorabench.data import IGNORED
from lorabench.pack.attention import EndToEnd
from lorabench.pack.rows import Picked, Rows, on_device


@dataclass
class Batch:
    """The examples that each run of a pack sees; one slab for neighbours that see the same.

    Shapes: lists of S slabs, of B examples each.
    """

    input_ids: list[list[np.ndarray]]  # (tokens of the example,), to its last labelled one
    labels: list[list[np.ndarray]]  # the same shape, IGNORED where a token carries no loss
    sizes: tuple[int, ...]  # runs that see each slab
    classes: bool  # a classification: an example's label stands at its last token

    @classmethod
    def make(
        cls,
        input_ids: Sequence[np.ndarray],
        labels: Sequence[np.ndarray],
        sizes: Sequence[int],
        classes: bool = False,
    ) -> Batch:
        """From padded arrays, (B, T) of each slab, as `data.batch` makes them.

        What comes after an example's last label is read by nobody, and left out.
        """
        ends = [(slab.shape[1] - (slab[:, ::-1] != IGNORED).argmax(1)).tolist() for slab in labels]
        cut = [
            [[row[:end] for row, end in zip(slab, ends[i], strict=True)] for i, slab in pairs]
            for pairs in (enumerate(input_ids), enumerate(labels))
        ]
        return cls(cut[0], cut[1], tuple(sizes), classes)

    def lengths(self) -> list[list[int]]:
        """Tokens of every example, slab by slab."""
        return [[len(ids) for ids in slab] for slab in self.input_ids]


class Laid:
    """A batch as a model takes it: examples end to end, or padded to the longest of all slabs.

    Args:
        end_to_end: whether the model takes it so; see `probe.suits`.
        spread: where a slab is repeated for each of its runs: at the "input", "inside" the model
            or at the "head".
    """

    def __init__(self, batch: Batch, end_to_end: bool, spread: str, device: str):
        lengths = batch.lengths()
        width = max(itertools.chain(*lengths))
        once = Rows((1,) * len(lengths), tuple(map(sum, lengths)))
        if not end_to_end:
            once = Rows(once.sizes, tuple(len(slab) * width for slab in lengths))
        self.sizes, self.classes, self.end_to_end = batch.sizes, batch.classes, end_to_end
        self.examples = Rows(batch.sizes, tuple(map(len, lengths)))
        self.rows = Rows(batch.sizes, once.counts)  # above the place where slabs are repeated
        self.at_input = self.rows if spread == "input" else once
        self.at_output = once if spread == "head" else self.rows
        self.width = width
        self._device, self._lengths = device, lengths
        # What is repeated at the input is laid out for every run of its slab.
        slabs = [i for i, n in enumerate(self.at_input.sizes) for _ in range(n)]
        self.input_ids = self._ids([batch.input_ids[i] for i in slabs])
        self.position_ids = self._positions([lengths[i] for i in slabs])
        self.mask = self._mask([lengths[i] for i in slabs])
        self.numbers_RN = self._numbers()
        self.picked, self.targets, self.chosen = self._chosen(batch)

    def _tensor(self, array: Any) -> Tensor:
        return on_device(np.asarray(array, dtype=np.int64), self._device)

    def _ids(self, slabs: list[list[np.ndarray]]) -> Tensor:
        """(1, P), or (S B, T) filled with zeros."""
        examples = list(itertools.chain(*slabs))
        if self.end_to_end:
            return self._tensor(np.concatenate(examples))[None]
        padded = np.zeros((len(examples), self.width), np.int64)
        for row, ids in zip(padded, examples, strict=True):
            row[: len(ids)] = ids
        return self._tensor(padded)

    def _positions(self, lengths: list[list[int]]) -> Tensor | None:
        """(1, P), from zero in each example; None where the model counts them itself."""
        if not self.end_to_end:
            return None
        return self._tensor(np.concatenate([np.arange(n) for n in itertools.chain(*lengths)]))[None]

    def _numbers(self) -> Tensor | None:
        """Number of each token of a run, anything for padding, (R, B T); None where all count."""
        if self.end_to_end:
            return None
        most = max(map(len, self._lengths)) * self.width
        found = np.zeros((len(self._lengths), most), np.int32)
        for number_N, slab in zip(found, self._lengths, strict=True):
            there_BT = np.arange(self.width) < np.array(slab)[:, None]
            number_N[: there_BT.size] = np.maximum(0, np.cumsum(there_BT.reshape(-1)) - 1)
        return on_device(np.repeat(found, self.sizes, axis=0), self._device)

    def _mask(self, lengths: list[list[int]]) -> Tensor | None:
        """Which places hold a token, (S B, T); None where no place is empty."""
        if self.end_to_end:
            return None
        ends = np.fromiter(itertools.chain(*lengths), np.int64)[:, None]
        return on_device(np.arange(self.width) < ends, self._device)

    def _chosen(self, batch: Batch) -> tuple[Picked, list[Tensor], Rows]:
        """Rows of the output that carry a loss, each slab's targets, and how many a run has."""
        of_slabs, targets = [], []
        for slab, lengths in zip(batch.labels, self._lengths, strict=True):
            step = lengths if self.end_to_end else [self.width] * len(lengths)
            first = np.cumsum([0, *step[:-1]])
            places = [np.flatnonzero(labels != IGNORED) for labels in slab]
            targets.append(np.concatenate([o[p] for o, p in zip(slab, places, strict=True)]))
            # Position t predicts the token at t + 1; a class is read where its label stands.
            back = 0 if batch.classes else 1
            pairs = zip(first, places, strict=True)
            of_slabs.append(np.concatenate([start + place - back for start, place in pairs]))
        index = [
            block.first_row + run * block.count + rows
            for block, rows in zip(self.at_output.blocks, of_slabs, strict=True)
            for run in range(block.size)
        ]
        chosen = Rows(self.sizes, tuple(map(len, of_slabs)))
        picked = Picked(np.concatenate(index), self.at_output.total, self._device)
        return picked, [self._tensor(one) for one in targets], chosen

    def attention(self, tree: Any) -> AbstractContextManager[None]:
        """While the batch goes through the model, forward and backward."""
        if not self.end_to_end:
            return nullcontext()
        once = [(1, slab) for slab in self._lengths]
        of_runs = list(zip(self.sizes, self._lengths, strict=True))
        return EndToEnd([once, of_runs], self._device).on(tree)
