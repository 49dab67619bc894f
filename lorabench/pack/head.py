"""From hidden states to nll: the head on chosen rows only, in chunks if the vocabulary is large.

The body of the model runs once; then the model's own forward runs with the body replaced by its
result, so that whatever an architecture does after its head (soft-capping, scaling) stays its own.

Letters: R runs, N rows that carry a loss, D model width, V vocabulary, S slabs (1 or R).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorabench.adapters import Clock
from lorabench.data import IGNORED
from lorabench.pack.batch import Batch
from lorabench.pack.rows import choose_rows

CHUNK_BYTES = 1 << 28  # of float32 logits that exist at a time


class Result(nn.Module):
    """Stands where the body was and returns what it had computed."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class RowHead:
    """The output layer of a causal language model, for the rows of R runs."""

    def __init__(self, tree: Any, clocks: list[Clock], recomputed: bool = False):
        self.tree, self.clocks, self.size = tree, clocks, len(clocks)
        self.recomputed = recomputed  # layers run again in the backward pass
        self.vocabulary = tree.config.get_text_config().vocab_size
        path = tree.base_model_prefix
        body = tree.get_submodule(path)
        if hasattr(body, "decoder"):  # OPT calls it past its body
            path, body = f"{path}.decoder", body.decoder
        parent, _, self.name = path.rpartition(".")
        self.parent, self.body = tree.get_submodule(parent), body
        self.last = choose_rows(body)

    def hidden(self, input_ids: Tensor, batch: Batch) -> Tensor:
        """Last hidden states of the chosen rows, (R, N, D).

        Args:
            input_ids: (S B, T), or fewer slabs where no layer before the head tells runs apart.
        """
        rows_SN = batch.rows_SN
        with self._last_block_on(batch):
            output = self.body(input_ids=input_ids, use_cache=False)
        self.output_class = type(output)
        states = output.last_hidden_state
        width = states.shape[-1]
        index_RND = rows_SN.expand(self.size, -1)[..., None].expand(-1, -1, width)
        slabs = self.size if self.tells_apart else 1
        flat = states.reshape(slabs, -1, width).expand(self.size, -1, -1)
        return torch.gather(flat, 1, index_RND)

    def _last_block_on(self, batch: Batch) -> AbstractContextManager[Any]:
        if self.last is None or (torch.is_grad_enabled() and self.recomputed):
            return nullcontext()
        there_SN = batch.targets_SN != IGNORED
        return self.last.on(batch.rows_SN, there_SN, batch.input_ids_SBT.shape[1])

    tells_apart = True  # whether the body's output has a slab a run

    def logits(self, hidden_RND: Tensor) -> Tensor:
        """Logits, (R, N, V), at least float32."""
        body = self.parent._modules[self.name]
        self.parent._modules[self.name] = Result(self.output_class(last_hidden_state=hidden_RND))
        try:
            ids = torch.zeros(1, 1, dtype=torch.long, device=hidden_RND.device)
            logits = self.tree(input_ids=ids, use_cache=False).logits
        finally:
            self.parent._modules[self.name] = body
        return logits if logits.dtype == torch.float64 else logits.float()

    def nll(self, hidden_RND: Tensor, targets_RN: Tensor) -> Tensor:
        """Negative log-likelihood of every target, (R, N), zero where it is ignored.

        Chunks of rows are recomputed in the backward pass: their logits never exist together.
        """
        chunks = self._chunks(hidden_RND.shape[1])
        if len(chunks) == 1:
            return cross_entropy(self.logits(hidden_RND), targets_RN)
        parts = [
            checkpoint(self._nll_of, hidden_RND, targets_RN, chunk, use_reentrant=False)
            for chunk in chunks
        ]
        return torch.cat(parts, 1)

    def scored(self, hidden_RND: Tensor, targets_RN: Tensor) -> tuple[Tensor, Tensor]:
        """nll and argmax of every row, (R, N) each."""
        nll, best = [], []
        for chunk in self._chunks(hidden_RND.shape[1]):
            logits = self.logits(hidden_RND[:, chunk])
            nll.append(cross_entropy(logits, targets_RN[:, chunk]))
            best.append(logits.argmax(-1))
        return torch.cat(nll, 1), torch.cat(best, 1)

    def _chunks(self, rows: int) -> list[slice]:
        at_once = max(1, CHUNK_BYTES // (4 * self.size * self.vocabulary))
        return [slice(first, first + at_once) for first in range(0, rows, at_once)]

    def _nll_of(self, hidden_RND: Tensor, targets_RN: Tensor, chunk: slice) -> Tensor:
        """One chunk's nll; a dropout on the head draws its mask for all rows and uses its part."""
        for clock in self.clocks:
            clock.window = (chunk, hidden_RND.shape[1])
        try:
            return cross_entropy(self.logits(hidden_RND[:, chunk]), targets_RN[:, chunk])
        finally:
            for clock in self.clocks:
                clock.window = None


def cross_entropy(logits_RNV: Tensor, targets_RN: Tensor) -> Tensor:
    """nll of every row, (R, N), zero where the target is ignored."""
    nll = F.cross_entropy(
        logits_RNV.flatten(0, 1),
        targets_RN.reshape(-1),
        reduction="none",
        ignore_index=IGNORED,
    )
    return nll.reshape(targets_RN.shape)
