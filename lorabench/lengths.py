"""What a run computes, from the lengths of its examples: known before it trains."""

from __future__ import annotations

import itertools

from pydantic import BaseModel

from lorabench import data
from lorabench.config import Config


class Lengths(BaseModel):
    """What a run computes, known from the lengths of its examples before it trains."""

    tokens: int  # of all steps
    rows: int  # of the base's linear layers, in all steps: tokens, and padding where there is any
    padded_rows: int  # the same if every micro-batch were padded to its longest example
    longest: int  # rows of the largest micro-batch; of padded ones, of the largest there could be
    batch: list[int]  # tokens of each example of that micro-batch
    targets: int  # tokens that carry a loss, in the micro-batch with the most
    validation: int = 0  # tokens of one scoring of the validation split
    test: int = 0  # and of the test split
    scored: int = 0  # tokens of the largest batch that is scored

    def is_one_shape(self, config: Config) -> bool:
        """Whether all micro-batches have the same shape."""
        trainer = config.trainer
        parts = trainer.num_steps * trainer.batch_size
        parts //= trainer.micro_batch_size or trainer.batch_size
        return self.tokens == self.padded_rows == parts * self.longest


def lengths_of(config: Config, tokens: data.Tokens, padded: bool) -> Lengths:
    """Return what a run computes, from its examples in the order in which they come.

    Args:
        tokens: the tokenised training split.
        padded: whether a micro-batch is padded to its longest example.
    """
    import numpy as np

    trainer = config.trainer
    micro = trainer.micro_batch_size or trainer.batch_size
    every = tokens.input_ids.lengths
    loss = np.ones_like(every) if tokens.labels else tokens.num_targets()
    real = padded_rows = longest = targets = 0
    batch: list[int] = []
    order = data.order_of(tokens, config)
    while steps := list(itertools.islice(order, 4096)):
        batches = np.concatenate(steps).reshape(-1, micro)
        sums = every[batches].sum(1)
        real += int(sums.sum())
        padded_rows += int(micro * every[batches].max(1).sum())
        if int(sums.max()) > longest:
            longest = int(sums.max())
            batch = every[batches[sums.argmax()]].tolist()
        targets = max(targets, int(loss[batches].sum(1).max()))
    if padded:  # a mate with other data may have the longest example of all
        batch = [int(every.max())] * micro
        longest = sum(batch)
    rows = padded_rows if padded else real
    return Lengths(
        tokens=real, rows=rows, padded_rows=padded_rows, longest=longest, batch=batch,
        targets=targets,
    )  # fmt: skip
