"""From texts to nll of their labels: a model's own classification head, one row an example.

Letters: R runs, B examples of a run's batch, T tokens, D model width, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorabench import tasks
from lorabench.pack.batch import Laid
from lorabench.pack.head import Result, cross_entropy
from lorabench.pack.probe import inputs
from lorabench.pack.rows import Spans, on_device


class ClassHead:
    """The head of a sequence classifier, for the examples of R runs; called as RowHead is."""

    def __init__(self, tree: Any, spans: Spans):
        self.tree, self.spans = tree, spans
        self.body = tree.get_submodule(tree.base_model_prefix)
        self.needs_mask = tasks.needs_mask(tree)
        # Decoders pool the last token that is not padding: `logits` gives them no padding.
        tree.config.get_text_config().pad_token_id = 0

    def hidden(self, laid: Laid) -> Any:
        """The body's output; of a decoder the last token's alone, which is what it pools."""
        assert laid.at_output == laid.rows, "a classifier has adapters below its head"
        if self.needs_mask:
            return self.body(input_ids=laid.input_ids, attention_mask=laid.mask)
        output = self.body(**inputs(laid.input_ids, laid.position_ids))
        states = output.last_hidden_state
        last_ND = laid.picked.of(states.reshape(-1, states.shape[-1]))
        return type(output)(last_hidden_state=last_ND[:, None])

    def logits(self, hidden: Any, laid: Laid) -> list[Tensor]:
        """Logits, (size, B, C) of each block of runs, at least float32; the model's own pooling."""
        name = self.tree.base_model_prefix
        setattr(self.tree, name, Result(hidden, self.body))
        # Ids of one token an example, none of them padding: encoders do not look at them here.
        ids = torch.ones(laid.examples.total, 1, dtype=torch.long, device=laid.input_ids.device)
        try:
            with self.spans.at(None):  # an example has one row
                logits = self.tree(input_ids=ids).logits
        finally:
            setattr(self.tree, name, self.body)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return [block.of(logits) for block in laid.examples.blocks]

    def loss(self, hidden: Any, laid: Laid, num_targets: list[int]) -> Tensor:
        """Summed nll of each run's labels / num_targets, (R,)."""
        nll = cross_entropy(self.logits(hidden, laid), laid.targets)
        nll_R = torch.cat([block.sum(1) for block in nll])
        return nll_R / on_device(num_targets, nll_R.device, nll_R.dtype)

    def scored(self, hidden: Any, laid: Laid) -> tuple[list[Tensor], list[Tensor]]:
        """nll and likeliest class of every example, (size, B) each of each block of runs."""
        logits = self.logits(hidden, laid)
        return cross_entropy(logits, laid.targets), [block.argmax(-1) for block in logits]
