"""Dropout whose masks depend on the run, the step and the module alone."""

from __future__ import annotations

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


class KeyedDropout(nn.Module):
    """Dropout whose mask depends only on (seeds.dropout, step, micro-step, module).

    An extra evaluation, another run or a resume therefore leaves every mask as it was.
    """

    def __init__(self, p: float, clock: Clock, name: str):
        super().__init__()
        self.p, self.clock, self.name = p, clock, name

    def mask(self, shape: torch.Size, device: torch.device) -> Tensor:
        """The kept positions, scaled by 1 / (1 - p); float32."""
        seed = key("dropout", self.clock.seed, self.clock.step, self.clock.micro_step, self.name)
        generator = torch.Generator(device).manual_seed(seed)
        if self.clock.window is not None:
            chunk, rows = self.clock.window
            whole = torch.Size((*shape[:-2], rows, shape[-1]))
            kept = torch.rand(whole, generator=generator, device=device)[..., chunk, :] >= self.p
        else:
            kept = torch.rand(shape, generator=generator, device=device) >= self.p
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
