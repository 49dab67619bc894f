"""The last feed-forward block on the rows that are read: the others end in nobody's loss.

Letters: S slabs (1 or R runs), B batch, T tokens, N rows that carry a loss, D model width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class ChosenRows(nn.Module):
    """A frozen block that sees each row by itself, on the chosen rows; the others get zero.

    Behind the last attention no row reads another, and the head reads the chosen ones alone.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.chosen: tuple[Tensor, Tensor, int] | None = None  # None: every row is read

    @contextmanager
    def on(self, rows_SN: Tensor, there_SN: Tensor, batch_size: int) -> Iterator[None]:
        """While a batch goes through the model.

        Args:
            rows_SN: of the flattened (B, T).
            there_SN: False where a row only fills the shape.
        """
        self.chosen = rows_SN, there_SN, batch_size
        try:
            yield
        finally:
            self.chosen = None

    def forward(self, x: Tensor) -> Tensor:
        if self.chosen is None:
            return self.block(x)
        rows_SN, there_SN, batch_size = self.chosen
        width = x.shape[-1]
        x_SND = x.reshape(x.shape[0] // batch_size, -1, width)
        if 4 * rows_SN.shape[1] > 3 * x_SND.shape[1]:
            return self.block(x)  # little to save
        index = rows_SN.expand(x_SND.shape[0], -1)[..., None].expand(-1, -1, width)
        y_SND = self.block(torch.gather(x_SND, 1, index)) * there_SN[..., None]
        # Added, not set: rows that only fill the shape may repeat a chosen one, and add nothing.
        return (
            torch.zeros_like(x_SND, dtype=y_SND.dtype).scatter_add(1, index, y_SND).reshape(x.shape)
        )


def choose_rows(body: nn.Module) -> ChosenRows | None:
    """Put ChosenRows around the last layer's feed-forward block, where there is one to be sure of.

    That is: a frozen block of linear layers and functions, nothing in it trained or routed.
    """
    for name in ("layers", "h"):
        layers: Any = getattr(body, name, None)
        block = getattr(layers[-1], "mlp", None) if isinstance(layers, nn.ModuleList) else None
        if block is not None and _is_plain(block):
            layers[-1].mlp = ChosenRows(block)
            return layers[-1].mlp
    return None


def _is_plain(block: nn.Module) -> bool:
    if any(p.requires_grad for p in block.parameters()) or list(block.parameters(recurse=False)):
        return False
    if len(inspect.signature(block.forward).parameters) != 1:  # Bloom's adds the residual itself
        return False
    inside = [module for module in block.modules() if module is not block]
    return all(
        not list(m.children()) and (type(m) in (nn.Linear, Conv1D) or not list(m.parameters()))
        for m in inside
    )
