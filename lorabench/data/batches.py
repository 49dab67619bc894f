"""Padding, labels, and the order in which training examples come.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lorabench.data.tokens import Tokens

IGNORED = -100  # label of tokens that carry no loss


def pad_id(tokenizer: Any) -> int:
    """What fills a row: the pad token, or EOS, or 0. Never seen: it is on the right, unlabelled."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def batch(
    tokens: Tokens, indices: Sequence[int] | np.ndarray, length: int | None, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `tokens` as input ids and labels, int64 of shape (B, T), padded on the right.

    Labels are the completion's ids at their own places, `IGNORED` on prompt and padding. They are
    not shifted (Hugging Face's convention): the loss compares logits at t with labels at t + 1.
    Of a classification, the number of the example's class stands at its last token.

    Args:
        length: T; None: that of the longest of these examples.
    """
    if length is None:
        length = max(len(tokens.input_ids[index]) for index in indices)
    input_ids_BT = np.full((len(indices), length), pad_id, dtype=np.int64)
    labels_BT = np.full((len(indices), length), IGNORED, dtype=np.int64)
    for row, index in enumerate(indices):
        ids, start = tokens.input_ids[index], tokens.completion_start[index]
        assert len(ids) <= length, f"example {index} has {len(ids)} tokens, the batch {length}"
        input_ids_BT[row, : len(ids)] = ids
        labels_BT[row, start : len(ids)] = ids[start:]
        if tokens.label_ids:
            labels_BT[row, len(ids) - 1] = tokens.label_ids[index]
    return input_ids_BT, labels_BT


def order(
    num_examples: int, batch_size: int, seed: int, steps: int, start_step: int = 0
) -> Iterator[np.ndarray]:
    """The examples of every step from `start_step` to `steps`, `batch_size` indices each.

    Seeded permutations of all examples, one after the other: none comes again before all have
    come. A batch may hold the end of one epoch and the beginning of the next. Epoch e depends on
    (seed, num_examples, e) alone, so any step is reached without the steps before it.
    """
    epoch, permutation = -1, np.empty(0, np.int64)
    for step in range(start_step, steps):
        epochs, places = np.divmod(
            np.arange(step * batch_size, (step + 1) * batch_size), num_examples
        )
        parts = []
        for needed in range(epochs[0], epochs[-1] + 1):
            if needed != epoch:
                epoch, permutation = needed, _permutation(num_examples, seed, needed)
            parts.append(permutation[places[epochs == needed]])
        yield np.concatenate(parts)


def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Sorts raw draws: numpy promises the bits of Philox, not those of Generator.permutation."""
    key = hashlib.sha256(f"order {seed} {epoch}".encode()).digest()[:16]
    draws = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(num_examples)
    return np.argsort(draws, kind="stable")


def order_hash(num_examples: int, batch_size: int, seed: int, steps: int) -> str:
    """sha256 of the indices of all steps, as little-endian int64."""
    digest = hashlib.sha256()
    for indices in order(num_examples, batch_size, seed, steps):
        digest.update(indices.astype("<i8").tobytes())
    return digest.hexdigest()
