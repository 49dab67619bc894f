"""How long this machine takes for the kernels of a traced step: measured on the kernels themselves.

Every distinct call of a step is made a few times on tensors of its shapes. Only those too large to
be tried are reckoned from the rate of matrix products and of memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import LlamaConfig, LlamaForCausalLM

from lorabench.config import Config
from lorabench.pack.account import Call, Spec, Trace
from lorabench.pack.stacked import StackedPack
from lorabench.pack.trace import batch_of

TRIED_FLOPS, TRIED_BYTES = 1e9, 1 << 26  # of a call that is tried; larger ones are reckoned


class Rates:
    """Times of kernels on a device, each measured once.

    Args:
        num_threads: that will train on a CPU; None: as many as torch takes.
    """

    def __init__(self, device: str, num_threads: int | None = None):
        self.device = device
        self._threads = num_threads or torch.get_num_threads()
        self._known: dict[Call, float] = {}
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            self.host_seconds = self._of_a_call()
            self._floor = self._timed(self._tensor((1,)).neg)
            self._flops = self._rate_of_products()
            self._bytes = self._rate_of_memory()
        finally:
            torch.set_num_threads(before)

    def of(self, trace: Trace, share: float = 1.0) -> tuple[float, float]:
        """Seconds of a micro-batch's forward and backward pass, and of an update.

        Args:
            share: of the rows that were traced, in a micro-batch of mean length.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            found = []
            for in_update in (False, True):
                calls = {c: n for c, n in trace.calls.items() if c.in_update == in_update}
                host = self.host_seconds * sum(calls.values())
                busy = sum(n * self._seconds(call) for call, n in calls.items())
                busy *= 1.0 if in_update else share
                # A GPU works while the host asks for more.
                found.append(max(host, busy) if self.device.startswith("cuda") else host + busy)
        finally:
            torch.set_num_threads(before)
        return found[0], found[1]

    def _seconds(self, call: Call) -> float:
        """Seconds of a call beyond those that any call takes."""
        if call not in self._known:
            reckoned = call.flops / self._flops + call.bytes / self._bytes
            if call.flops <= TRIED_FLOPS and call.bytes <= TRIED_BYTES:
                reckoned = self._try(call, reckoned)
            self._known[call] = max(0.0, reckoned - self._floor)
        return self._known[call]

    def _try(self, call: Call, otherwise: float) -> float:
        def made(spec: Spec) -> torch.Tensor:
            return self._tensor(spec.shape, spec.stride, spec.dtype)

        try:
            args, kwargs = tree_map_only(Spec, made, (call.args, call.kwargs))
            return self._timed(lambda: call.function(*args, **kwargs))
        except Exception:  # an index that zeros are no example of, say
            return otherwise

    @torch.no_grad()
    def _timed(self, work: Callable[[], Any], times: int = 6) -> float:
        """Median seconds of a few times, after the first.

        On a CPU of the calling thread, which takes part in all that a kernel does: what else runs
        on the machine is left out.
        """
        clock = time.perf_counter if self.device.startswith("cuda") else time.thread_time
        found, spent = [], 0.0
        for attempt in range(times):
            self._wait()
            begun = clock()
            work()
            self._wait()
            took = clock() - begun
            spent += took
            if attempt:
                found.append(took)
            if spent > 0.2 and attempt > 1:
                break
        return statistics.median(found)

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def _tensor(
        self,
        shape: tuple[int, ...],
        stride: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """A tensor of ones, or of zeros where numbers may be indices."""
        if stride is None:
            return torch.ones(shape, dtype=dtype, device=self.device)
        size = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        value = 1 if dtype.is_floating_point or dtype == torch.bool else 0
        whole = torch.full((max(1, size),), value, dtype=dtype, device=self.device)
        return whole.as_strided(shape, stride)

    def _rate_of_products(self) -> float:
        a = self._tensor((1024, 512))
        b = self._tensor((512, 1024))
        return 2 * 1024 * 1024 * 512 / self._timed(lambda: a @ b)

    def _rate_of_memory(self) -> float:
        a = self._tensor((1 << 22,))
        return 3 * a.nbytes / self._timed(lambda: a * a)

    def _of_a_call(self) -> float:
        """Seconds of the host for a call within a step: Python, autograd, dispatch, launch.

        Measured on a pack of one over a small Llama, whose kernels take next to nothing.
        """
        shape = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
            num_attention_heads=2, use_cache=False,
        )  # fmt: skip
        with torch.device("meta"):
            skeleton = LlamaForCausalLM(shape)
        with torch.random.fork_rng(), torch.device(self.device):
            base = LlamaForCausalLM(shape).requires_grad_(False).eval()
        config = Config()
        modules = [name for name, m in base.named_modules() if type(m) is torch.nn.Linear][:-1]
        pack = StackedPack(base, skeleton, [config], [modules], self.device)
        batch = batch_of([(1, [(4, 2)] * 2)], classes=False)

        def step() -> None:
            with torch.enable_grad():
                pack.forward_backward(0, 0, pack.lay(batch), [4])
            pack.update([1e-6])

        step()
        with _Counting() as counting:
            step()
        return self._timed(step, 12) / counting.calls


class _Counting(TorchDispatchMode):
    """Counts calls of kernels; views have none."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))
