"""The training loop: pack -> stream of step metrics. Knows no files and no tracker."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lorabench import data
from lorabench.config import TrainerConfig
from lorabench.pack import Batch, ModulePack, StackedPack
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
    stage: Stage | None  # what trains from this step on, where that changed


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
    owners = list(pack.owners.values())
    stages = Stages(pack.configs[0].stages, owners)
    assert all(Stages(config.stages, owners).all == stages.all for config in pack.configs)
    for step in range(start_step, trainer.num_steps):
        stage = stages.at(step)
        if step in (start_step, stage.step):
            _enter(pack, stage)
        chosen = [next(order) for order in orders]
        batches = [data.batch(tokens, indices, None, pad_id) for indices in chosen]
        num_targets = [int((labels != data.IGNORED).sum()) for _, labels in batches]
        num_tokens = [sum(len(tokens.input_ids[i]) for i in indices) for indices in chosen]
        losses = []
        for micro_step, first in enumerate(range(0, trainer.batch_size, micro)):
            part = slice(first, first + micro)
            batch = Batch.make(
                [input_ids[part] for input_ids, _ in batches],
                [labels[part] for _, labels in batches],
                sizes,
                classes=bool(tokens.labels),
            )
            of_runs = each(num_targets, sizes)
            losses.append(pack.forward_backward(step, micro_step, batch, of_runs))
        rates = [learning_rate(t, step) for t in trainers]
        norm_R = pack.update(rates)
        loss_R = torch.stack(losses).sum(0)
        # One copy off the device a step: the loop must know whether to go on.
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
            tokens=each(num_tokens, sizes),
            ended=ended,
            stage=stage if stage.step == step else None,
        )
        running = {run for run in running if pack.alive[run]}  # whoever reads may stop some
        if not running:
            return


def each(values: list[int], sizes: list[int]) -> list[int]:
    """The value of each block, once for every run of it."""
    return [value for value, size in zip(values, sizes, strict=True) for _ in range(size)]


def _enter(pack: ModulePack | StackedPack, stage: Stage) -> None:
    """Freeze and thaw what a stage says, and make sure that nothing else moves."""
    pack.train_only(stage.lr_scale)
    expected = {name for name, module in pack.owners.items() if module in stage.lr_scale}
    assert expected and pack.trainable() == expected, (
        f"from step {stage.step} on {sorted(expected)} train, and nothing else; "
        f"these differ: {sorted(pack.trainable() ^ expected)}"
    )
