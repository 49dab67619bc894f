"""What one training step of a pack takes, from running it on tensors that have no storage.

The step is the real one: the pack's own code on fake tensors (torch._subclasses), which have
shapes, dtypes and a device, and no numbers. What it allocates, keeps for the backward pass and
frees is added up as it happens, so dropout, checkpointing, chunks of the head, low-precision copies
and the device's attention kernels are counted without being modelled here.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorabench import adapters
from lorabench import model as base_model
from lorabench.config import Config
from lorabench.data import IGNORED
from lorabench.pack.account import Accounting, Trace
from lorabench.pack.batch import Batch
from lorabench.pack.solo import ModulePack
from lorabench.pack.stacked import StackedPack

Examples = Sequence[tuple[int, int]]  # of each its tokens, and how many of them carry a loss
Slab = tuple[int, Examples]  # runs that see a micro-batch, and its examples


class _Stacked(StackedPack):
    """Weights have no values here: drawing them would take longer than the step."""

    def _fill(self, base: Any) -> None:
        pass


class _Alone(ModulePack):
    """PEFT puts the adapter on the skeleton: fake tensors cannot be changed in their place."""

    def __init__(
        self,
        base: Any,
        skeleton: Any,
        config: Config,
        modules: list[str],
        device: str,
        wrapped: Any,
    ):
        self.skeleton, self.on_skeleton = skeleton, wrapped
        super().__init__(base, config, modules, device)

    def _attach(self, base: Any, modules: list[str]) -> Any:
        own = set(modules) if self.configs[0].lora.init in adapters.CHANGES_BASE else set()
        theirs, ours = dict(self.skeleton.named_parameters()), dict(base.named_parameters())
        shared = {id(p): ours[n] for n, p in theirs.items() if n.rpartition(".")[0] not in own}
        buffers = zip(self.skeleton.buffers(), base.buffers(), strict=True)
        return _fake(self.on_skeleton, self.device, shared | {id(old): new for old, new in buffers})


@contextmanager
def _phases(pack: Any, account: Accounting) -> Iterator[None]:
    """Tell the account when the body has run, and when its backward pass begins."""
    body = pack.head.hidden

    def hidden(laid: Any) -> Any:
        found = body(laid)
        account.enter("head")
        if isinstance(found, Tensor) and found.requires_grad:
            found.register_hook(lambda grad: account.enter("backward"))
        return found

    pack.head.hidden = hidden
    try:
        yield
    finally:
        del pack.head.hidden


def trace(
    skeleton: Any,
    configs: list[Config],
    ranks: list[dict[str, int]],
    slabs: Sequence[Slab],
    device: str,
    alone: bool,
    scored: Examples = (),
) -> Trace:
    """Trace the largest step of a pack.

    A model whose layers are alike is traced with few of them, and what the others add is known
    from one period more.

    Args:
        skeleton: the base on the meta device.
        configs: of the runs.
        ranks: of each run: every adapted module and its rank.
        slabs: one for each block of runs that share a batch.
        alone: on PEFT's own modules.
        scored: the largest batch that all runs are scored on, unless it is smaller.
    """

    def traced(tree: Any) -> Trace:
        names = {name for name, _ in tree.named_modules()}
        modules = [[name for name in of_run if name in names] for of_run in ranks]
        return _trace(tree, configs, modules, slabs, device, alone, scored)

    found = _alike(skeleton, ranks)
    if found is None:
        return traced(skeleton)
    few, period, times = found
    less, more = traced(_cut(skeleton, few)), traced(_cut(skeleton, few + period))
    return less.deeper(more, times)


def _layers(tree: Any) -> tuple[str, nn.ModuleList] | None:
    """Name and list of a model's layers, where it has one such list."""
    depth = getattr(tree.config.get_text_config(), "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in tree.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    return found[0] if len(found) == 1 else None


def _alike(tree: Any, ranks: list[dict[str, int]]) -> tuple[int, int, int] | None:
    """How many layers tell the rest, with how many more, and how often those come again.

    None where no few layers do: all are traced.
    """
    found = _layers(tree)
    if found is None:
        return None
    name, layers = found
    text = tree.config.get_text_config()
    each = [v for v in vars(text).values() if isinstance(v, list) and len(v) == len(layers)]
    kinds = []
    for i, layer in enumerate(layers):
        prefix = f"{name}.{i}."
        kinds.append((
            [value[i] for value in each],
            [(key, type(module).__name__) for key, module in layer.named_modules()],
            [(key, p.shape, p.dtype) for key, p in layer.named_parameters()],
            [
                [(key[len(prefix):], r) for key, r in of_run.items() if key.startswith(prefix)]
                for of_run in ranks
            ],
        ))  # fmt: skip
    total = len(kinds)
    for period in range(1, total // 3):
        if kinds[period:] == kinds[:-period]:
            few = total % period + 2 * period
            return few, period, (total - few) // period
    return None


def _cut(tree: Any, depth: int) -> Any:
    """The same model with its first layers only."""
    own = base_model.share(tree)
    found = _layers(own)
    assert found is not None
    text: Any = own.config.get_text_config()
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == len(found[1]):
            setattr(text, key, value[:depth])
    text.num_hidden_layers = depth
    del found[1][depth:]
    return own


def _trace(
    skeleton: Any,
    configs: list[Config],
    modules: list[list[str]],
    slabs: Sequence[Slab],
    device: str,
    alone: bool,
    scored: Examples,
) -> Trace:
    known: dict[str, Any] = {}  # PEFT wraps on the meta device: it would read fake tensors
    wrapped = [
        adapters.attach_skeleton(skeleton, config, of_run, known)
        for config, of_run in zip(configs, modules, strict=True)
    ]
    if alone:
        double = configs[0].trainer.dtype == "float64"
        adapters.raise_precision(wrapped[0], torch.float64 if double else torch.float32)
    with Accounting() as account:
        base = _fake(skeleton, device, {})
        base.config.use_cache = False
        base.requires_grad_(False)
        account.leave_out()
        pack: Any = (
            _Alone(base, skeleton, configs[0], modules[0], device, wrapped[0])
            if alone
            else _Stacked(base, skeleton, configs, modules, device, known)
        )
        classes = configs[0].task == "seq_cls"
        laid = pack.lay(batch_of(slabs, classes))
        targets = [sum(n for _, n in batch) for runs, batch in slabs for _ in range(runs)]
        with _phases(pack, account):
            account.enter("forward")
            pack.forward_backward(0, 0, laid, targets)
        del laid
        account.enter("update")
        pack.update([1e-4] * pack.size)
        if scored:
            account.enter("score")
            pack.score(batch_of([(pack.size, scored)], classes))
    return account.trace


def _fake(module: Any, device: str, known: dict[int, Any]) -> Any:
    """A copy of a module on the meta device, of fake tensors.

    Args:
        known: what takes the place of some of its tensors, by their ids.
    """
    memo = dict(known)
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if id(tensor) not in memo:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = new
    return copy.deepcopy(module, memo).eval()


def batch_of(slabs: Sequence[Slab], classes: bool) -> Batch:
    """A micro-batch of these lengths; the last tokens of each example carry the loss."""
    input_ids, labels = [], []
    for _, examples in slabs:
        input_ids.append([np.ones(tokens, np.int64) for tokens, _ in examples])
        of_slab = [np.full(tokens, IGNORED, np.int64) for tokens, _ in examples]
        for label, (tokens, targets) in zip(of_slab, examples, strict=True):
            label[tokens - targets :] = 1
        labels.append(of_slab)
    return Batch(input_ids, labels, tuple(runs for runs, _ in slabs), classes)
