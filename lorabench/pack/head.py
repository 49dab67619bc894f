"""From hidden states to nll: the head on chosen rows only, in chunks if the vocabulary is large.

The body of the model runs once; then the model's own forward runs with the body replaced by its
result, so that whatever an architecture does after its head (soft-capping, scaling) stays its own.

Letters: R runs, N rows that carry a loss, of all runs end to end; n of one run; D model width, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorabench.adapters import Clock
from lorabench.pack.batch import Laid
from lorabench.pack.probe import body_of, inputs
from lorabench.pack.rows import Rows, Spans, choose_rows

CHUNK_BYTES = 1 << 28  # of float32 logits that exist at a time


class Result(nn.Module):
    """Stands where the body was and returns what it had computed.

    Its other attributes are the body's: Falcon-H1 scales logits by a number that its body holds.
    """

    def __init__(self, output: Any, body: nn.Module):
        super().__init__()
        self.output = output
        self.__dict__["body"] = body  # not a submodule: hooks and modes stay with the real one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["body"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class RowHead:
    """The output layer of a causal language model, for the rows of R runs."""

    def __init__(self, tree: Any, clock: Clock, spans: Spans, recomputed: bool = False):
        self.tree, self.clock, self.size, self.spans = tree, clock, spans.size, spans
        self.recomputed = recomputed  # layers run again in the backward pass
        self.vocabulary = tree.config.get_text_config().vocab_size
        path, self.body = body_of(tree)
        parent, _, self.name = path.rpartition(".")
        self.parent = tree.get_submodule(parent)
        self.last = choose_rows(self.body)

    def hidden(self, laid: Laid) -> Tensor:
        """Last hidden states of the chosen rows, (N, D)."""
        with self._last_block_on(laid):
            output = self.body(**inputs(laid.input_ids, laid.position_ids))
        self.output_class = type(output)
        states = output.last_hidden_state
        chosen_ND = laid.picked.of(states.reshape(-1, states.shape[-1]))
        if laid.at_output == laid.rows:
            return chosen_ND
        return laid.chosen.spread(list(chosen_ND.split(laid.chosen.counts)))

    def _last_block_on(self, laid: Laid) -> AbstractContextManager[Any]:
        if self.last is None or (torch.is_grad_enabled() and self.recomputed):
            return nullcontext()
        return self.last.on(laid.picked)

    def _logits(self, hidden_ND: Tensor, rows: Rows) -> Tensor:
        """Logits of these rows, (N, V), at least float32."""
        body = self.parent._modules[self.name]
        output = self.output_class(last_hidden_state=hidden_ND[None])
        self.parent._modules[self.name] = Result(output, body)
        try:
            ids = torch.zeros(1, 1, dtype=torch.long, device=hidden_ND.device)
            with self.spans.at(rows):
                logits = self.tree(input_ids=ids, use_cache=False).logits[0]
        finally:
            self.parent._modules[self.name] = body
        return logits if logits.dtype == torch.float64 else logits.float()

    def logits(self, hidden_ND: Tensor, laid: Laid) -> list[Tensor]:
        """Logits of each block of runs, (size, n, V), at least float32."""
        logits_NV = self._logits(hidden_ND, laid.chosen)
        return [block.of(logits_NV) for block in laid.chosen.blocks]

    def nll(self, hidden_ND: Tensor, laid: Laid) -> list[Tensor]:
        """Negative log-likelihood of the targets, (size, n) of each block of runs.

        Chunks of rows are recomputed in the backward pass: their logits never exist together.
        """
        chunks = self._chunks(laid.chosen)
        if len(chunks) == 1:
            return cross_entropy(self.logits(hidden_ND, laid), laid.targets)
        parts = [
            checkpoint(self._nll_of, hidden_ND, laid, chunk, use_reentrant=False)
            for chunk in chunks
        ]
        return [torch.cat(blocks, 1) for blocks in zip(*parts, strict=True)]

    def scored(self, hidden_ND: Tensor, laid: Laid) -> tuple[list[Tensor], list[Tensor]]:
        """nll and argmax of every row, (size, n) each of each block of runs."""
        nll, best = [], []
        for chunk in self._chunks(laid.chosen):
            logits = self._logits_of(hidden_ND, laid, chunk)
            nll.append(cross_entropy(logits, [one[chunk] for one in laid.targets]))
            best.append([block.argmax(-1) for block in logits])
        found = [[torch.cat(one, 1) for one in zip(*parts, strict=True)] for parts in (nll, best)]
        return found[0], found[1]

    def _chunks(self, rows: Rows) -> list[slice]:
        """Parts of each run's rows."""
        at_once = max(1, CHUNK_BYTES // (4 * self.size * self.vocabulary))
        return [slice(first, first + at_once) for first in range(0, max(rows.counts), at_once)]

    def _logits_of(self, hidden_ND: Tensor, laid: Laid, chunk: slice) -> list[Tensor]:
        rows = laid.chosen.chunk(chunk)
        parts = [block.of(hidden_ND)[:, chunk].flatten(0, 1) for block in laid.chosen.blocks]
        logits_NV = self._logits(torch.cat(parts), rows)
        return [block.of(logits_NV) for block in rows.blocks]

    def _nll_of(self, hidden_ND: Tensor, laid: Laid, chunk: slice) -> list[Tensor]:
        """One chunk's nll; the masks of a dropout on the head are those of its rows."""
        with window(self.clock, chunk.start):
            logits = self._logits_of(hidden_ND, laid, chunk)
            return cross_entropy(logits, [one[chunk] for one in laid.targets])


@contextmanager
def window(clock: Clock, first_row: int) -> Iterator[None]:
    """While the head sees the rows of each run from this one on."""
    clock.first_row = first_row
    try:
        yield
    finally:
        clock.first_row = 0


def cross_entropy(logits: list[Tensor], targets: list[Tensor]) -> list[Tensor]:
    """nll of every row.

    Args:
        logits: (size, n, V) of each block of runs.
        targets: (n,) of each.
    Returns:
        (size, n) of each.
    """
    return [
        F.cross_entropy(one.flatten(0, 1), target.repeat(len(one)), reduction="none").reshape(
            len(one), -1
        )
        for one, target in zip(logits, targets, strict=True)
    ]
