"""The training loop: pack -> stream of step metrics. Knows no files and no tracker."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lorabench import data
from lorabench.config import TrainerConfig
from lorabench.pack import ModulePack


@dataclass
class Step:
    """What one optimizer step did; lists hold one value a run of the pack."""

    step: int  # steps done, from 1
    lr: float
    loss: list[float]  # mean nll over the labelled tokens of the batch, nats
    grad_norm: list[float]  # before clipping
    tokens: int  # non-pad tokens of the batch, of one run


def learning_rate(trainer: TrainerConfig, step: int) -> float:
    """The learning rate of a step (from 0): transformers' schedules of the same names."""
    warmup, steps = trainer.warmup_steps, trainer.steps
    if step < warmup:
        return trainer.lr * step / max(1, warmup)
    if trainer.schedule == "constant":
        return trainer.lr
    done = (step - warmup) / max(1, steps - warmup)
    if trainer.schedule == "linear":
        return trainer.lr * max(0.0, 1.0 - done)
    return trainer.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


def train(
    pack: ModulePack, tokens: data.Tokens, pad_id: int, order: Iterator[np.ndarray], start_step: int
) -> Iterator[Step]:
    """Train a pack to the end of its steps, yielding after each.

    A run whose loss or gradient is not finite keeps the weights of its last good step.

    Args:
        tokens: the tokenised training split.
        order: indices into it, one array a step, beginning at start_step.
    """
    trainer = pack.config.trainer
    length = data.padded_length(tokens, pack.config.data.max_length)
    micro = trainer.micro_batch_size or trainer.batch_size
    for step in range(start_step, trainer.steps):
        indices = next(order)
        input_ids, labels = data.batch(tokens, indices, length, pad_id)
        num_targets = int((labels != -100).sum())
        losses = []
        for micro_step, first in enumerate(range(0, len(input_ids), micro)):
            part = slice(first, first + micro)
            losses.append(
                pack.forward_backward(
                    step,
                    micro_step,
                    torch.from_numpy(input_ids[part]).to(pack.device),
                    torch.from_numpy(labels[part]).to(pack.device),
                    num_targets,
                )
            )
        lr = learning_rate(trainer, step)
        grad_norm = pack.update(lr)
        yield Step(
            step=step + 1,
            lr=lr,
            loss=torch.stack(losses).sum(0).tolist(),
            grad_norm=grad_norm.tolist(),
            tokens=sum(len(tokens.input_ids[i]) for i in indices),
        )
