"""What runs take on their device, alone and in packs: memory and time, from a traced step."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lorabench import data, machine
from lorabench.config import first_line

if TYPE_CHECKING:
    from lorabench.lengths import Lengths
    from lorabench.pack.account import Trace
    from lorabench.plan import Planner
    from lorabench.sweep.jobs import Job
    from lorabench.sweep.rates import Rates

log = logging.getLogger(__name__)

RUNTIME_BYTES = 450_000_000  # Python, torch and transformers themselves
START_SECONDS = 2.0  # loading, saving, checkpoints
SAFE = 4  # times the rough estimate: no pack takes more
TRACED = 16  # runs of a small pack of which a step is traced; the seconds of more are in proportion
SMALL = 8_000_000_000  # bytes below which, SAFE times, runs of a CPU's pack are not traced together


class Needs:
    """Memory and time of the runs of one command; each distinct step is traced once."""

    def __init__(self, planner: Planner):
        self.planner = planner
        self.rough: dict[str, str] = {}  # why no step could be traced, by model
        self._traces: dict[str, Trace | None] = {}
        self._lengths: dict[str, Lengths] = {}
        self._rates: dict[tuple[str, int | None], Rates] = {}

    def know(self, jobs: Sequence[Job]) -> None:
        """Take the longest micro-batch of runs that differ in their seeds for that of each."""
        for job in jobs:
            key, found = _data_key(job), job.plan.lengths
            if found and (key not in self._lengths or found.longest > self._lengths[key].longest):
                self._lengths[key] = found

    def fits(self, jobs: Sequence[Job], memory: int) -> bool:
        """Whether a pack of these runs takes no more than this memory, in bytes."""
        if self.base_bytes(jobs[0]) + SAFE * self._rough(jobs) <= memory:
            return True  # far from it: nothing is to be traced
        return self.memory(jobs) <= memory

    def memory(self, jobs: Sequence[Job]) -> int:
        """Bytes that a pack of these runs takes: base, runtime, and the largest step."""
        if self._is_small(jobs):
            base = self.base_bytes(jobs[0])
            return base + sum(alone - base for alone in self.alone(jobs))
        trace = self._trace(jobs)
        return self.base_bytes(jobs[0]) + (self._rough(jobs) if trace is None else trace.peak)

    def alone(self, jobs: Sequence[Job]) -> list[int]:
        """Bytes that each of these runs takes by itself."""
        return [round(one) for one in _by_rank(jobs, lambda job: float(self.memory([job])))]

    def _is_small(self, jobs: Sequence[Job]) -> bool:
        """Whether several runs take so little on a CPU that their bytes are reckoned from each's.

        The whole would take as long to trace as some steps of it.
        """
        device = machine.choose_device(jobs[0].config.trainer.device)
        return len(jobs) > 1 and device == "cpu" and SAFE * self._rough(jobs) <= SMALL

    def base_bytes(self, job: Job) -> int:
        """Bytes that runs of a pack share whatever they train."""
        skeleton = self.planner.skeleton(job.config.model, len(job.plan.labels))
        weights = sum(p.numel() * p.element_size() for p in skeleton.parameters())
        return RUNTIME_BYTES + weights

    def step_seconds(self, jobs: Sequence[Job]) -> tuple[float, float]:
        """Seconds of a step of a pack of these runs, and those of them that calls take."""
        trainer = jobs[0].config.trainer
        if len(jobs) > TRACED and self._is_small(jobs):
            # Spread over all, which are sorted by rank.
            some = [jobs[i * len(jobs) // TRACED] for i in range(TRACED)]
            step, host = self.step_seconds(some)  # calls serve all at once
            return host + (step - host) * len(jobs) / TRACED, host
        micro = trainer.micro_batch_size or trainer.batch_size
        times = trainer.batch_size // micro
        trace = self._trace(jobs)
        if trace is None:
            rows = sum(_rows(job) for job in jobs) / trainer.num_steps
            flops = 4 * jobs[0].plan.total_parameters * rows
            return 3 * flops / machine.matmul_flops(), 0.0
        tokens = sum(n for job in jobs for n, _ in self._batch(job)) * times
        share = sum(_rows(job) for job in jobs) / trainer.num_steps / tokens
        rates = self._rates_of(jobs[0])
        forward_backward, update = rates.of(trace, min(1.0, share))
        calls = sum(n * (1 if call.in_update else times) for call, n in trace.calls.items())
        return times * forward_backward + update, rates.host_seconds * calls

    def seconds_at_most(self, jobs: Sequence[Job]) -> float:
        """Seconds that these runs take one after the other, which is sooner known than a pack's."""
        return sum(_by_rank(jobs, lambda job: self.seconds([job])))

    def seconds(self, jobs: Sequence[Job]) -> float:
        """Seconds of a pack of these runs: start, steps, and scoring without generations."""
        trainer = jobs[0].config.trainer
        step, _ = self.step_seconds(jobs)
        training = trainer.num_steps * step
        lengths = jobs[0].plan.lengths
        if lengths is None or not lengths.rows:
            return START_SECONDS + training
        times = 1 + trainer.num_steps // trainer.eval_every if trainer.eval_every else 1
        scored = times * lengths.validation + lengths.test
        # A forward pass is a third of a step, or two fifths of one without gradients of weights.
        return START_SECONDS + training * (1 + 0.4 * scored / lengths.rows)

    def _rates_of(self, job: Job) -> Rates:
        from lorabench.sweep.rates import Rates

        trainer = job.config.trainer
        key = machine.choose_device(trainer.device), trainer.num_threads
        if key not in self._rates:
            self._rates[key] = Rates(*key)
        return self._rates[key]

    def _batch(self, job: Job) -> list[tuple[int, int]]:
        """The longest micro-batch of a run: of each example its tokens, and those with a loss."""
        trainer, most = job.config.trainer, job.config.data.max_length
        found = self._lengths.get(_data_key(job), job.plan.lengths)
        tokens = [most] * (trainer.micro_batch_size or trainer.batch_size)
        if found is not None:
            tokens = [min(most, n) for n in found.batch]
        if job.config.task == "seq_cls":
            return [(n, 1) for n in tokens]
        left = sum(tokens) if found is None else found.targets
        batch = []
        for n in tokens:
            batch.append((n, max(1, min(n - 1, left))))
            left -= batch[-1][1]
        return batch

    def _scored(self, jobs: Sequence[Job]) -> list[tuple[int, int]]:
        """The largest batch that is scored, where it may take more than a step does."""
        config = jobs[0].config
        tokens = max(job.plan.lengths.scored if job.plan.lengths else 0 for job in jobs)
        if tokens <= sum(n for n, _ in self._batch(jobs[0])):
            return []  # a step keeps as much of every layer
        examples = min(tokens, config.trainer.eval_batch_size)
        each = min(config.data.max_length, -(-tokens // examples))
        return [(each, 1 if config.task == "seq_cls" else max(1, each // 2))] * examples

    def _trace(self, jobs: Sequence[Job]) -> Trace | None:
        """The largest step of a pack of these runs; None where it cannot be traced."""
        from lorabench.pack.trace import trace

        left = iter(jobs)
        sizes = data.blocks([job.config for job in jobs])
        blocks = [list(itertools.islice(left, size)) for size in sizes]
        # Packs that differ in the order of their blocks take the same.
        blocks.sort(key=lambda block: json.dumps([_shape_key(job) for job in block]))
        jobs = list(itertools.chain(*blocks))
        slabs = [(len(block), self._batch(block[0])) for block in blocks]
        alone = jobs[0].plan.alone is not None
        scored = self._scored(jobs)
        key = json.dumps([[_shape_key(job) for job in jobs], slabs, alone, scored])
        if key not in self._traces:
            classes = len(jobs[0].plan.labels)
            configs = [job.config for job in jobs]
            skeleton = self.planner.skeleton(configs[0].model, classes)
            ranks = [self.planner.ranks(config, classes) for config in configs]
            device = machine.choose_device(configs[0].trainer.device)
            theirs = logging.getLogger("torch._subclasses.fake_tensor")
            theirs.disabled = True  # a kernel that cannot be traced is told below, in one line
            try:
                self._traces[key] = trace(skeleton, configs, ranks, slabs, device, alone, scored)
            except Exception as error:
                log.info("a step cannot be traced", exc_info=True)
                self.rough[jobs[0].plan.model] = f"{type(error).__name__}: {first_line(error)}"
                self._traces[key] = None
            finally:
                theirs.disabled = False
        return self._traces[key]

    def _rough(self, jobs: Sequence[Job]) -> int:
        """Bytes of a step by a formula, where none can be traced or all is far from the limit."""
        import torch

        from lorabench.pack.head import chunk_bytes

        config, plan = jobs[0].config, jobs[0].plan
        skeleton = self.planner.skeleton(config.model, len(plan.labels))
        text = skeleton.config.get_text_config()
        number = {"bfloat16": 2, "float64": 8}.get(config.trainer.dtype, 4)
        wide = max(1.0, getattr(text, "intermediate_size", 0) / (4 * text.hidden_size))
        layers = 1 + text.num_hidden_layers / (16 if config.trainer.gradient_checkpointing else 1)
        is_eager = config.model.attn_implementation == "eager"
        squares = getattr(text, "num_attention_heads", 0) if is_eager else 0
        total = logits = 0.0
        for job in jobs:
            batch = self._batch(job)
            for tokens, targets in batch:
                a_layer = 34 * text.hidden_size * wide + 3 * squares * tokens
                total += tokens * layers * a_layer * number
                logits += 12 * targets * (len(plan.labels) or text.vocab_size)
            total += 5 * max(4, number) * job.plan.trainable_parameters
        device = torch.device(machine.choose_device(config.trainer.device))
        return math.ceil(total + min(logits, 3 * chunk_bytes(device)))


def _by_rank(jobs: Sequence[Job], value: Callable[[Job], float]) -> list[float]:
    """A value of each run; of those that differ in r alone from two, in which it is linear."""
    alike: dict[str, list[Job]] = {}
    for job in jobs:
        alike.setdefault(json.dumps(_shape_key(job) | {"r": None}), []).append(job)
    found: dict[int, float] = {}
    for group in alike.values():
        low, high = (choose(group, key=lambda job: job.config.lora.r) for choose in (min, max))
        first, last = low.config.lora.r, high.config.lora.r
        least = value(low)
        each = (value(high) - least) / (last - first) if last > first else 0.0
        for job in group:
            found[id(job)] = least + each * (job.config.lora.r - first)
    return [found[id(job)] for job in jobs]


def _rows(job: Job) -> int:
    """Rows that a run computes in all its steps."""
    trainer, lengths = job.config.trainer, job.plan.lengths
    if lengths is not None:
        return lengths.rows
    return trainer.num_steps * trainer.batch_size * job.config.data.max_length


def _data_key(job: Job) -> str:
    """What decides the lengths of a run's micro-batches, seeds aside."""
    trainer = job.config.trainer
    batches = [trainer.batch_size, trainer.micro_batch_size, trainer.num_steps]
    return json.dumps([asdict(job.config.data), batches, job.plan.padded, job.plan.labels])


def _shape_key(job: Job) -> dict[str, Any]:
    """What decides a run's tensors."""
    config, trainer = job.config, job.config.trainer
    lora = asdict(config.lora) | {"lora_dropout": config.lora.lora_dropout > 0}
    for name in ("r", "alpha_pattern", "loraplus_lr_ratio", "lora_alpha", "alpha_ratio"):
        lora.pop(name)
    return {
        "r": config.lora.r, "scale": job.plan.scale != 1, "lora": lora,
        "model": asdict(config.model), "task": config.task, "head": config.head.policy,
        "lora_modules": job.plan.lora_modules, "saved_modules": job.plan.saved_modules,
        "classes": len(job.plan.labels), "dtype": trainer.dtype, "device": trainer.device,
        "recomputed": trainer.gradient_checkpointing, "data": _data_key(job),
    }  # fmt: skip
