"""The training loop: pack -> stream of step metrics. Knows no files and no tracker."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lorabench import data
from lorabench.config import TrainerConfig
from lorabench.pack import Batch, Laid, ModulePack, StackedPack
from lorabench.stages import Stage, Stages


@dataclass
class Step:
    """What one optimizer step did; lists hold one value a run of the pack."""

    step: int  # steps done, from 1
    lr: list[float]
    loss: list[float]  # mean nll over the labelled tokens of the batch, nats
    grad_norm: list[float]  # before clipping
    tokens: list[int]  # non-pad tokens of the batch
    ended: list[int]  # runs whose loss or gradient was not finite for the first time
    stages: list[Stage | None]  # what trains from this step on, where that changed


@dataclass
class _Taken:
    """The batches of a step."""

    laid: list[Laid]  # micro-batches
    num_targets: list[int]  # labelled tokens of each run
    num_tokens: list[int]  # non-pad tokens of each run


def learning_rate(trainer: TrainerConfig, step: int) -> float:
    """Return the learning rate of a step (from 0).

    Source: transformers' schedules of the same names; with `min_lr_ratio`, its
    cosine_with_min_lr, and for linear its polynomial with power=1 and lr_end.
    """
    assert trainer.warmup_ratio is None, "Planner.resolved turns it into steps"
    warmup, steps = trainer.warmup_steps, trainer.num_steps
    if step < warmup:
        return trainer.lr * step / max(1, warmup)
    if trainer.schedule == "constant":
        return trainer.lr
    done = (step - warmup) / max(1, steps - warmup)
    if trainer.schedule == "linear":
        left = max(0.0, 1.0 - done)
    else:
        left = max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    return trainer.lr * (left * (1.0 - trainer.min_lr_ratio) + trainer.min_lr_ratio)


def train(
    pack: ModulePack | StackedPack, tokens: data.Tokens, pad_id: int, start_step: int = 0
) -> Iterator[Step]:
    """Train a pack to the end of its steps, yielding after each.

    A run whose loss or gradient is not finite stops with the weights of its last good step; its
    mates go on.

    Args:
        tokens: the tokenised training split.
        start_step: steps done before, by a checkpoint the pack has loaded.
    """
    trainers = [config.trainer for config in pack.configs]
    trainer = trainers[0]  # what runs of a pack share: steps, batch sizes
    sizes = data.blocks(pack.configs)
    firsts = itertools.accumulate(sizes[:-1], initial=0)
    orders = [data.order_of(tokens, pack.configs[first], start_step) for first in firsts]
    micro = trainer.micro_batch_size or trainer.batch_size
    running = {run for run in range(pack.size) if pack.alive[run]}
    if not running:
        return
    stages = [
        Stages(config.stages, pack.owners(run).values()) for run, config in enumerate(pack.configs)
    ]

    def next_batch() -> _Taken:
        """What the runs see in a step, on its way to the device."""
        chosen = [next(order) for order in orders]
        batches = [data.batch(tokens, indices, None, pad_id) for indices in chosen]
        parts = [slice(first, first + micro) for first in range(0, trainer.batch_size, micro)]
        return _Taken(
            [
                pack.lay(
                    Batch.make(
                        [input_ids[part] for input_ids, _ in batches],
                        [labels[part] for _, labels in batches],
                        sizes,
                        classes=bool(tokens.labels),
                    )
                )
                for part in parts
            ],
            each([int((labels != data.IGNORED).sum()) for _, labels in batches], sizes),
            each([sum(len(tokens.input_ids[i]) for i in indices) for indices in chosen], sizes),
        )

    taken = next_batch() if start_step < trainer.num_steps else None
    for step in range(start_step, trainer.num_steps):
        now = [of_run.at(step) for of_run in stages]
        if step == start_step or any(stage.changes_at(step) for stage in now):
            _enter(pack, now, step)
        assert taken is not None
        losses = [
            pack.forward_backward(step, micro_step, laid, taken.num_targets)
            for micro_step, laid in enumerate(taken.laid)
        ]
        rates = [learning_rate(t, step) for t in trainers]
        norm_R = pack.update(rates)
        loss_R = torch.stack(losses).sum(0)
        num_tokens = taken.num_tokens
        # A GPU has still to do what was asked of it: the next batch is made meanwhile.
        taken = next_batch() if step + 1 < trainer.num_steps else None
        # The one wait for the device in a step: the loop must know whether to go on.
        loss, norm = torch.stack([loss_R, norm_R.to(loss_R.dtype)]).tolist()
        ended = [i for i in running if not (math.isfinite(loss[i]) and math.isfinite(norm[i]))]
        for run in ended:
            pack.stop(run)
            running.discard(run)
        yield Step(
            step=step + 1,
            lr=rates,
            loss=loss,
            grad_norm=norm,
            tokens=num_tokens,
            ended=ended,
            stages=[stage if stage.step == step else None for stage in now],
        )
        running = {run for run in running if pack.alive[run]}  # whoever reads may stop some
        if not running:
            return


def each(values: list[int], sizes: list[int]) -> list[int]:
    """The value of each block, once for every run of it."""
    return [value for value, size in zip(values, sizes, strict=True) for _ in range(size)]


def _enter(pack: ModulePack | StackedPack, stages: list[Stage], step: int) -> None:
    """Freeze and thaw what each run's stage says, and make sure that nothing else moves."""
    pack.train_only([stage.scales_at(step) for stage in stages])
    for run, stage in enumerate(stages):
        expected = {n for n, module in pack.owners(run).items() if module in stage.lr_scale}
        assert expected and pack.trainable(run) == expected, (
            f"from step {stage.step} on {sorted(expected)} train, and nothing else; "
            f"these differ: {sorted(pack.trainable(run) ^ expected)}"
        )
