"""From texts to nll of their labels: a model's own classification head, one row an example.

Letters: R runs, N examples of a run's batch, T tokens, C classes, S slabs (1 or R).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorabench import tasks
from lorabench.adapters import Clock
from lorabench.pack.batch import Batch
from lorabench.pack.head import Result, cross_entropy


class ClassHead:
    """The head of a sequence classifier, for the examples of R runs; called as RowHead is."""

    tells_apart = True  # the body's output has a slab a run: some layer of it has adapters

    def __init__(self, tree: Any, clocks: list[Clock]):
        self.tree, self.size = tree, len(clocks)
        self.body = tree.get_submodule(tree.base_model_prefix)
        self.needs_mask = tasks.needs_mask(tree)
        # Decoders pool the last token that is not padding. `logits` gives them the mask for ids:
        # where a text ends is known from its length, whatever the tokenizer pads with.
        tree.config.get_text_config().pad_token_id = 0

    def hidden(self, input_ids: Tensor, batch: Batch) -> Any:
        """The body's whole output, and which places hold a token, (R N, T).

        Args:
            input_ids: (S N, T).
        """
        assert self.tells_apart, "a classifier has adapters below its head"
        assert batch.there_SNT is not None
        there_SNT = batch.there_SNT
        mask = there_SNT.expand(len(input_ids) // there_SNT.shape[1], -1, -1).flatten(0, 1)
        options = {"attention_mask": mask} if self.needs_mask else {}
        output = self.body(input_ids=input_ids, **options)
        return output, there_SNT.expand(self.size, -1, -1).flatten(0, 1)

    def logits(self, hidden: Any) -> Tensor:
        """Logits, (R, N, C), at least float32; pooling and head are the model's own."""
        output, there = hidden
        name = self.tree.base_model_prefix
        setattr(self.tree, name, Result(output))
        try:
            logits = self.tree(input_ids=there.long()).logits
        finally:
            setattr(self.tree, name, self.body)
        logits = logits.reshape(self.size, -1, logits.shape[-1])
        return logits if logits.dtype == torch.float64 else logits.float()

    def nll(self, hidden: Any, targets_RN: Tensor) -> Tensor:
        """Negative log-likelihood of every label, (R, N)."""
        return cross_entropy(self.logits(hidden), targets_RN)

    def scored(self, hidden: Any, targets_RN: Tensor) -> tuple[Tensor, Tensor]:
        """nll and likeliest class of every example, (R, N) each."""
        logits = self.logits(hidden)
        return cross_entropy(logits, targets_RN), logits.argmax(-1)
