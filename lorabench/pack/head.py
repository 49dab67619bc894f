"""From hidden states to nll: the head on chosen rows only, in chunks if the vocabulary is large.

The body of the model runs once; then the model's own forward runs with the body replaced by its
result, so that whatever an architecture does after its head (soft-capping, scaling) stays its own.
In training a chunk's gradient is made right behind its logits, which are then forgotten: no more
than one chunk of logits ever exists, and none is computed twice.

Letters: R runs, N rows that carry a loss, of all runs end to end; n of one run; D model width, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabench.adapters import Clock
from lorabench.pack import compiling
from lorabench.pack.batch import Laid
from lorabench.pack.probe import body_of, inputs
from lorabench.pack.rows import Rows, Spans, choose_rows, on_device

CHUNK_BYTES = 1 << 28  # of float32 logits that exist at a time, on a CPU

# A trained parameter, and whose it is: one entry a run, or None where it is the only run's.
Owned = tuple[Tensor, Tensor | None]


def chunk_bytes(device: torch.device) -> int:
    """Of float32 logits that exist at a time: more where a GPU has room, for fewer calls.

    By all of its memory, not by what is free: how a run is computed must not depend on the moment.
    """
    if device.type != "cuda":
        return CHUNK_BYTES
    total = torch.cuda.get_device_properties(device).total_memory
    return max(CHUNK_BYTES, min(8 * CHUNK_BYTES, total // 32))


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
        self.trained: Callable[[], list[Owned]] | None = None  # None: the tree's own parameters
        self._in_training: Any = self.body

    def compile(self) -> None:
        """Call the body as one compiled graph from now on, in training."""
        self._in_training = compiling.compiled(self.body)
        self.last = None  # how many rows it chooses changes from batch to batch

    def _parameters(self) -> list[Owned]:
        """Every parameter that takes a gradient and is not in the body; the head's, if tied."""
        inside = set(self.body.modules())
        found = {
            parameter: None
            for module in self.tree.modules()
            if module not in inside
            for parameter in module.parameters(recurse=False)
            if parameter.requires_grad
        }
        return list(found.items())

    def hidden(self, laid: Laid) -> Tensor:
        """Last hidden states of the chosen rows, (N, D)."""
        with self._last_block_on(laid):
            body = self._in_training if torch.is_grad_enabled() else self.body
            output = body(**inputs(laid.input_ids, laid.position_ids))
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

    def loss(self, hidden_ND: Tensor, laid: Laid, num_targets: list[int]) -> Tensor:
        """Summed nll of each run's targets / num_targets, (R,)."""
        owned = self._parameters() if self.trained is None else self.trained()
        found: Tensor = _Loss.apply(
            hidden_ND, self, laid, num_targets, owned, *(p for p, _ in owned)
        )
        return found

    def gradients(
        self, hidden_ND: Tensor, laid: Laid, num_targets: list[int], wanted: list[Tensor]
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """`loss`, (R,), and its gradients: by hidden states and by parameters.

        Args:
            wanted: parameters that only one run's nll depends on, or that have an entry a run.
        """
        by_hidden = torch.empty_like(hidden_ND) if hidden_ND.requires_grad else None
        by_parameter: list[Tensor | None] = [None] * len(wanted)
        losses = []
        for chunk in self._chunks(laid.chosen, hidden_ND.device):
            with torch.enable_grad(), window(self.clock, chunk.start):
                rows = self._rows_of(hidden_ND.detach(), laid, chunk)
                rows.requires_grad_(by_hidden is not None)
                logits = self._logits_of(rows, laid, chunk)
                nll = cross_entropy(logits, [one[chunk] for one in laid.targets])
                nll_R = torch.cat([block.sum(1) for block in nll])
                # Divided before its gradient is made, as stock PEFT does: p - 1 of a likely target
                # rounds by what it is scaled by.
                loss_R = nll_R / on_device(num_targets, nll_R.device, nll_R.dtype)
                inputs = [*([rows] if by_hidden is not None else []), *wanted]
                found = list(
                    torch.autograd.grad(loss_R.sum(), inputs, allow_unused=True) if inputs else []
                )
            losses.append(loss_R.detach())
            del logits, nll
            if by_hidden is not None:
                own, place = found.pop(0), laid.chosen.chunk(chunk)
                for block, part in zip(laid.chosen.blocks, place.blocks, strict=True):
                    block.of(by_hidden)[:, chunk] = part.of(own)
            for i, grad in enumerate(found):
                known = by_parameter[i]
                by_parameter[i] = grad if known is None or grad is None else known.add_(grad)
        return torch.stack(losses).sum(0), by_hidden, by_parameter

    def scored(self, hidden_ND: Tensor, laid: Laid) -> tuple[list[Tensor], list[Tensor]]:
        """nll and argmax of every row, (size, n) each of each block of runs."""
        nll, best = [], []
        for chunk in self._chunks(laid.chosen, hidden_ND.device):
            logits = self._logits_of(self._rows_of(hidden_ND, laid, chunk), laid, chunk)
            nll.append(cross_entropy(logits, [one[chunk] for one in laid.targets]))
            best.append([block.argmax(-1) for block in logits])
        found = [[torch.cat(one, 1) for one in zip(*parts, strict=True)] for parts in (nll, best)]
        return found[0], found[1]

    def _chunks(self, rows: Rows, device: torch.device) -> list[slice]:
        """Parts of each run's rows."""
        at_once = max(1, chunk_bytes(device) // (4 * self.size * self.vocabulary))
        return [slice(first, first + at_once) for first in range(0, max(rows.counts), at_once)]

    def _rows_of(self, hidden_ND: Tensor, laid: Laid, chunk: slice) -> Tensor:
        """A part of each run's rows, end to end: a copy."""
        parts = [block.of(hidden_ND)[:, chunk].flatten(0, 1) for block in laid.chosen.blocks]
        return torch.cat(parts)

    def _logits_of(self, rows_ND: Tensor, laid: Laid, chunk: slice) -> list[Tensor]:
        rows = laid.chosen.chunk(chunk)
        logits_NV = self._logits(rows_ND, rows)
        return [block.of(logits_NV) for block in rows.blocks]


class _Loss(torch.autograd.Function):
    """Its gradient is made in the forward; the backward scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head: RowHead,
        laid: Laid,
        num_targets: list[int],
        owned: list[Owned],
        *own: Tensor,
    ) -> Tensor:
        wanted = [parameter for parameter, _ in owned]
        loss_R, by_hidden, by_parameter = head.gradients(hidden_ND, laid, num_targets, wanted)
        ctx.save_for_backward(by_hidden, *by_parameter)
        ctx.rows, ctx.runs = laid.chosen, [runs for _, runs in owned]
        return loss_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g_R,) = grads
        by_hidden, *by_parameter = ctx.saved_tensors
        if by_hidden is not None:
            for block in ctx.rows.blocks:
                g = g_R[block.first_run : block.first_run + block.size, None, None]
                block.of(by_hidden).mul_(g)
        for grad, runs in zip(by_parameter, ctx.runs, strict=True):
            if grad is not None:
                g = g_R if runs is None else g_R.index_select(0, runs)
                grad.mul_(g.view(-1, *[1] * (grad.dim() - 1)) if runs is not None else g.sum())
        return by_hidden, None, None, None, None, *by_parameter


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
