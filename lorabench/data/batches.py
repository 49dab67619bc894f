"""Padding, labels, and the order in which training examples come.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lorabench.config import Config
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

    Labels are the ids of the spans at their own places, `IGNORED` elsewhere. They are not shifted
    (Hugging Face's convention): the loss compares logits at t with labels at t + 1.
    Of a classification, the number of the example's class stands at its last token.

    Args:
        length: T; None: that of the longest of these examples.
    """
    if length is None:
        length = max(len(tokens.input_ids.row(index)) for index in indices)
    input_ids_BT = np.full((len(indices), length), pad_id, dtype=np.int64)
    labels_BT = np.full((len(indices), length), IGNORED, dtype=np.int64)
    for row, index in enumerate(indices):
        ids = tokens.input_ids.row(index)
        assert len(ids) <= length, f"example {index} has {len(ids)} tokens, the batch {length}"
        input_ids_BT[row, : len(ids)] = ids
        for begin, end in tokens.spans.row(index).reshape(-1, 2):
            labels_BT[row, begin:end] = ids[begin:end]
        if tokens.label_ids:
            labels_BT[row, len(ids) - 1] = tokens.label_ids[index]
    return input_ids_BT, labels_BT


def order(
    num_examples: int,
    batch_size: int,
    seed: int,
    steps: int,
    start_step: int = 0,
    lengths: Sequence[int] | np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """The examples of every step from `start_step` to `steps`, `batch_size` indices each.

    Seeded permutations of all examples, one after the other: none comes again before all have
    come. A batch may hold the end of one epoch and the beginning of the next. Epoch e depends on
    (seed, num_examples, e) alone, so any step is reached without the steps before it.

    Args:
        lengths: of all examples, to group them by (`data.group_by_length`); None: do not.
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
                if lengths is not None:
                    permutation = _grouped(permutation, np.asarray(lengths), batch_size)
            parts.append(permutation[places[epochs == needed]])
        yield np.concatenate(parts)


def _grouped(permutation: np.ndarray, lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """A permutation in which neighbours are about as long, the longest example first.

    Stretches of up to 50 batches are sorted, so that batches still differ from epoch to epoch.
    Source: transformers' `get_length_grouped_indices`, behind the Trainer's
    train_sampling_strategy="group_by_length".
    """
    stretch = batch_size * max(1, min(len(lengths) // (batch_size * 4), 50))
    parts = [permutation[i : i + stretch] for i in range(0, len(permutation), stretch)]
    parts = [part[np.argsort(-lengths[part], kind="stable")] for part in parts]
    longest = int(np.argmax([lengths[part[0]] for part in parts]))
    parts[0][0], parts[longest][0] = parts[longest][0], parts[0][0]
    return np.concatenate(parts)


def order_of(tokens: Tokens, config: Config, start_step: int = 0) -> Iterator[np.ndarray]:
    """The examples of every step of a run: see `order`."""
    trainer = config.trainer
    return order(
        len(tokens),
        trainer.batch_size,
        config.seeds.data,
        trainer.num_steps,
        start_step,
        tokens.input_ids.lengths if config.data.group_by_length else None,
    )


def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Sorts raw draws: numpy promises the bits of Philox, not those of Generator.permutation."""
    key = hashlib.sha256(f"order {seed} {epoch}".encode()).digest()[:16]
    draws = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(num_examples)
    return np.argsort(draws, kind="stable")


def blocks(configs: Sequence[Config]) -> list[int]:
    """Sizes of the blocks of a pack: neighbours with the same seeds.data see the same batches."""
    alike = itertools.groupby(config.seeds.data for config in configs)
    return [len(list(seeds)) for _, seeds in alike]


def order_hash(order: Iterable[np.ndarray]) -> str:
    """sha256 of the indices of all steps, as little-endian int64."""
    digest = hashlib.sha256()
    for indices in order:
        digest.update(indices.astype("<i8").tobytes())
    return digest.hexdigest()
