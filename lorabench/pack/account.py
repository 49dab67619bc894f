"""An account of what runs on fake tensors: storages that live at the same time, calls of kernels.

Fake tensors (torch._subclasses) have shapes, dtypes and a device, and no storage.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Spec:
    """Stands for a tensor among the arguments of a call; no tuple, which a tree would open."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """A kernel and what it was called with; equal calls take the same time."""

    function: Any  # torch's operator
    arguments: str  # of the whole call, by which it is known
    in_update: bool  # part of the optimizer's step; else of a micro-batch
    args: Any = field(compare=False)
    kwargs: Any = field(compare=False)
    flops: int = field(compare=False)  # of matrix products and attention
    bytes: int = field(compare=False)  # read and written


@dataclass
class Trace:
    """What one step took; bytes are of storages alive at the same time, the base's left out."""

    peaks: dict[str, float]  # bytes, by phase
    calls: Counter[Call] = field(default_factory=Counter)  # views are not counted

    @property
    def flops(self) -> int:
        """Floating point operations of matrix products and attention, of a micro-batch."""
        return sum(count * call.flops for call, count in self.calls.items())

    @property
    def peak(self) -> int:
        """The most bytes at any time."""
        return round(max(self.peaks.values()))

    def deeper(self, other: Trace, times: int) -> Trace:
        """Return the trace with as many more layers, `times` over, as the other has on top of this.

        Each phase's peak is linear in the number of layers that are alike.
        """
        peaks = {p: b + times * (other.peaks[p] - b) for p, b in self.peaks.items()}
        calls = Counter(self.calls)
        for call, count in other.calls.items():
            calls[call] += times * (count - self.calls[call])
        return Trace(peaks, calls)


class Accounting(FakeTensorMode):
    """Runs what is called on fake tensors; adds up live storages and calls, phase by phase."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.phase, self.live = "", 0
        self.trace = Trace({})
        self._known = WeakIdKeyDictionary()
        self._inside = False  # a kernel that is made of others: its own allocations are unknown

    def leave_out(self) -> None:
        """Take what is live until now for what was there before: it is not counted."""
        self.live = 0

    def enter(self, phase: str) -> None:
        """Begin a phase; what is live is live in it."""
        self.phase = phase
        self.trace.peaks[phase] = max(self.trace.peaks.get(phase, 0.0), self.live)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside or func.namespace == "prim":  # prim: a device is asked for
            return super().dispatch(func, types, args, kwargs)
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # fake tensors have no numbers
        self._inside = True
        try:
            found = super().dispatch(func, types, args, kwargs)
        finally:
            self._inside = False
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        if self.phase not in ("", "score") and not func.is_view:
            self._count(func, args, kwargs, found)
        return found

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = None
        size = storage.nbytes()
        self.live += size
        if self.phase:
            self.trace.peaks[self.phase] = max(self.trace.peaks[self.phase], self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size

    def _count(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        flops_of = FLOPS.get(func._overloadpacket)
        flops = 0 if flops_of is None else flops_of(*args, **kwargs, out_val=found)
        tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, Tensor)]
        moved = sum(x.numel() * x.element_size() for x in tensors)
        args, kwargs = tree_map_only(
            Tensor, lambda x: Spec(tuple(x.shape), x.stride(), x.dtype), (args, kwargs)
        )
        in_update = self.phase == "update"
        call = Call(func, repr((args, kwargs)), in_update, args, kwargs, flops, moved)
        self.trace.calls[call] += 1


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _shapes(flops_of: Any) -> Any:
    def of_tensors(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        args, kwargs = tree_map_only(Tensor, lambda x: x.shape, (args, kwargs))
        return int(flops_of(*args, **kwargs))

    return of_tensors


# torch's own counts, and its CPU kernel's of attention, which it leaves out.
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FLOPS = flop_registry | {
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
    _CPU_ATTENTION: _shapes(_attention_flops),
    _CPU_ATTENTION_BACKWARD: _shapes(_attention_backward_flops),
}
