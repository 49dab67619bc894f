"""Dropout whose masks depend on the run, the step, the module and the row alone.

A mask is a hash of counters, not a stream of drawn numbers: any part of it can be made by itself,
those of all runs of a pack are made at once, and it is the same on every device.

Letters: R runs, M of them that train a module, L modules, N rows, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lorabench.adapters.inject import ADAPTER, lora_layers
from lorabench.adapters.seeding import key


class Clock:
    """Where the runs of a pack are: step and micro-step, and so the keys of their masks.

    Args:
        seeds: `seeds.dropout` of each run.
    """

    def __init__(self, seeds: list[int], device: str = "cpu"):
        self.seeds, self.device = seeds, device
        self.training = False
        self.first_row = 0  # the number of the first of a run's rows, where the head sees some
        self.numbers_RN: Tensor | None = None  # of padded batches: each token's number
        self._names: list[str] = []
        self._own_LR = np.empty((0, len(seeds)), np.uint64)
        self._counted = torch.arange(0, dtype=torch.int32, device=device)
        self.keys_LR2 = torch.empty(0, len(seeds), 2, dtype=torch.int32, device=device)

    def register(self, name: str) -> int:
        """Add a module whose input is dropped out; its place among the keys."""
        own = [[key("dropout", seed, name) for seed in self.seeds]]
        self._own_LR = np.concatenate([self._own_LR, np.array(own, np.uint64)])
        self.keys_LR2 = torch.empty(
            len(self._own_LR), len(self.seeds), 2, dtype=torch.int32, device=self.device
        )
        return len(self._own_LR) - 1

    def at(self, step: int, micro_step: int) -> None:
        """Set the keys of all masks of a micro-step (from 0), in place."""
        if len(self._own_LR):
            now = _mixed(np.array([step << 20 | micro_step], np.uint64))
            words = torch.from_numpy(_mixed(self._own_LR ^ now)[..., None].view(np.int32))
            if self.device.startswith("cuda"):
                words = words.pin_memory()  # so that the copy waits for nothing
            self.keys_LR2.copy_(words, non_blocking=True)

    def numbers_of(self, rows: int, runs_M: Tensor) -> Tensor:
        """Number of each of these runs' rows, (M or 1, N): makes its mask, wherever it lies."""
        padded = self.numbers_RN
        if padded is not None and padded.shape[1] == rows and not self.first_row:
            return padded.index_select(0, runs_M)
        self.count_to(end := self.first_row + rows)
        return self._counted[None, self.first_row : end]

    def count_to(self, end: int) -> None:
        """Have so many numbers ready."""
        if len(self._counted) < end:
            self._counted = torch.arange(2 * end, dtype=torch.int32, device=self.device)


def _mixed(words: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits in which each bit depends on all.

    Source: Steele, Lea and Flood 2014, SplitMix64 (its finalizer).
    """
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


def _signed(word: int) -> int:
    """The int32 of the same 32 bits."""
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


# The multipliers of MurmurHash3's 32-bit finalizer (Appleby 2011).
FIRST, SECOND = _signed(0x85EBCA6B), _signed(0xC2B2AE35)


def threshold(p: float) -> int:
    """The least hash, of -2^31 to 2^31, that is kept: a share p of all is below it."""
    return min(round(p * 2**32) - 2**31, 2**31 - 1)


def kept(number_MN: Tensor, width: int, keys_M2: Tensor, threshold_M: Tensor) -> Tensor:
    """Which numbers of each run's rows are kept, (M, N, D), bool.

    A hash of 32 bits of (row, column) under two keys: MurmurHash3's finalizer with a key before
    each multiplication.

    Args:
        number_MN: of the rows, int32; one row for all runs where they have the same.
        keys_M2: of this module and micro-step, int32.
        threshold_M: of each run's dropout, int32.
    """
    column_D = torch.arange(width, dtype=torch.int32, device=number_MN.device)
    place_MND = torch.add(column_D, number_MN[..., None] * width)
    hash_MND = place_MND ^ keys_M2[:, 0, None, None]
    hash_MND ^= (hash_MND >> 16) & 0xFFFF  # the mask makes the shift of a signed number logical
    hash_MND *= FIRST
    hash_MND ^= keys_M2[:, 1, None, None]
    hash_MND ^= (hash_MND >> 13) & 0x7FFFF
    hash_MND *= SECOND
    return hash_MND >= threshold_M[:, None, None]


class KeyedDropout(nn.Module):
    """Dropout of one run whose mask depends only on (seeds.dropout, step, micro-step, module).

    An extra evaluation, another run or a resume therefore leaves every mask as it was. Rows of
    padding have no number: the mask of a batch is the same however far it is padded.
    """

    def __init__(self, p: float, clock: Clock, name: str):
        super().__init__()
        self.p, self.clock, self.name = p, clock, name
        self.index = clock.register(name)

    def mask(self, shape: torch.Size) -> Tensor:
        """The kept positions, scaled by 1 / (1 - p), (*shape); float32.

        Args:
            shape: of rows and their width, (..., D).
        """
        keys_12 = self.clock.keys_LR2[self.index]
        limit_1 = torch.full((1,), threshold(self.p), dtype=torch.int32, device=keys_12.device)
        run_1 = torch.zeros(1, dtype=torch.long, device=keys_12.device)
        number_1N = self.clock.numbers_of(shape[:-1].numel(), run_1)
        return (kept(number_1N, shape[-1], keys_12, limit_1)[0] / (1 - self.p)).reshape(shape)

    def forward(self, x: Tensor) -> Tensor:
        if not self.clock.training:
            return x
        return x * self.mask(x.shape).to(x.dtype)


def key_dropout(wrapped: nn.Module, clock: Clock) -> None:
    """Replace PEFT's dropout modules by keyed ones."""
    for name, layer in lora_layers(wrapped).items():
        dropout = layer.lora_dropout[ADAPTER]
        if isinstance(dropout, nn.Dropout):
            layer.lora_dropout[ADAPTER] = KeyedDropout(dropout.p, clock, name)
