"""Dropout whose masks depend on the run, the step and the module alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorabench.adapters.inject import ADAPTER, lora_layers
from lorabench.adapters.seeding import key

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Clock:
    """Where a run is: what its dropout masks are keyed by."""

    seed: int
    step: int = 0
    micro_step: int = 0
    training: bool = False
    window: tuple[slice, int] | None = None  # while the head sees some of its rows: which, of all
    there: tuple[int, Tensor] | None = None  # of a padded batch: the run's rows, those with tokens


class KeyedDropout(nn.Module):
    """Dropout whose mask depends only on (seeds.dropout, step, micro-step, module).

    An extra evaluation, another run or a resume therefore leaves every mask as it was. Nothing is
    drawn for padding: the mask of a batch is the same however far it is padded.
    """

    def __init__(self, p: float, clock: Clock, name: str):
        super().__init__()
        self.p, self.clock, self.name = p, clock, name

    def mask(self, shape: torch.Size, device: torch.device) -> Tensor:
        """The kept positions, scaled by 1 / (1 - p); float32.

        Args:
            shape: of rows and their width, (..., D).
        """
        rows, there = math.prod(shape[:-1]), self.clock.there
        if self.clock.window is not None:
            chunk, total = self.clock.window
            return self._draw(total, shape[-1], device)[chunk].reshape(shape)
        if there is not None and there[0] == rows:
            drawn = self._draw(len(there[1]), shape[-1], device)
            return drawn.new_ones(rows, shape[-1]).index_copy(0, there[1], drawn).reshape(shape)
        return self._draw(rows, shape[-1], device).reshape(shape)

    def _draw(self, rows: int, width: int, device: torch.device) -> Tensor:
        seed = key("dropout", self.clock.seed, self.clock.step, self.clock.micro_step, self.name)
        generator = torch.Generator(device).manual_seed(seed)
        kept = torch.rand(rows, width, generator=generator, device=device) >= self.p
        return kept.float() / (1 - self.p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.clock.training:
            return x
        return x * self.mask(x.shape, x.device).to(x.dtype)


def key_dropout(wrapped: nn.Module, clock: Clock) -> None:
    """Replace PEFT's dropout modules by keyed ones."""
    for name, layer in lora_layers(wrapped).items():
        dropout = layer.lora_dropout[ADAPTER]
        if isinstance(dropout, nn.Dropout):
            layer.lora_dropout[ADAPTER] = KeyedDropout(dropout.p, clock, name)
