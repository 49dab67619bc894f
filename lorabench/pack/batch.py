"""One micro-batch as a pack takes it: inputs, and the rows of hidden states that carry its loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorabench.data import IGNORED


@dataclass
class Batch:
    """Inputs of every run of a pack; one slab for all where the runs see the same examples.

    Shapes: S = 1 where shared, else R; N = B in a classification, whose rows are its examples.
    """

    input_ids_SBT: Tensor
    rows_SN: Tensor  # rows of the flattened (B, T) that predict a completion token
    targets_SN: Tensor  # that token, IGNORED where the example has fewer than the widest
    there_SNT: Tensor | None = None  # of a classification: which places hold a token

    @property
    def shared(self) -> bool:
        return self.input_ids_SBT.shape[0] == 1

    @classmethod
    def make(
        cls, input_ids: list[np.ndarray], labels: list[np.ndarray], width: int | None, device: str
    ) -> Batch:
        """From one (B, T) array a run, or a single one for all.

        Args:
            width: completion tokens of the longest example there can be, so that shapes do not
                depend on which examples a batch holds; None: a classification, whose labels stand
                at each example's last token.
        """
        if width is None:
            return cls._classification(np.stack(input_ids), np.stack(labels), device)
        chosen = [target_rows(one, width) for one in labels]
        return cls(
            torch.from_numpy(np.stack(input_ids)).to(device),
            torch.from_numpy(np.stack([rows for rows, _ in chosen])).to(device),
            torch.from_numpy(np.stack([targets for _, targets in chosen])).to(device),
        )

    @classmethod
    def _classification(cls, ids_SBT: np.ndarray, labels_SBT: np.ndarray, device: str) -> Batch:
        last_SB1 = (labels_SBT != IGNORED).argmax(-1)[..., None]
        targets_SB = np.take_along_axis(labels_SBT, last_SB1, -1)[..., 0]
        slabs, size, length = ids_SBT.shape
        rows_SB = np.tile(np.arange(size), (slabs, 1))
        there_SBT = np.arange(length) <= last_SB1
        arrays = (ids_SBT, rows_SB, targets_SB, there_SBT)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))


def target_rows(labels_BT: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the flattened (B, T) hidden states that predict the labels, and the labels.

    Position t predicts the token at t + 1, so the row of label (b, t) is b T + t - 1.
    """
    size, length = labels_BT.shape
    first_B1 = (labels_BT != IGNORED).argmax(1)[:, None]
    place_BW = first_B1 + np.arange(width)
    inside = place_BW < length
    place_BW = np.minimum(place_BW, length - 1)
    targets = np.where(inside, np.take_along_axis(labels_BT, place_BW, 1), IGNORED)
    rows = np.arange(size)[:, None] * length + np.maximum(place_BW - 1, 0)
    return rows.reshape(-1), targets.reshape(-1)
