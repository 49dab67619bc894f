"""Layers that serve every run of a pack at once: frozen base weights, one adapter a run.

Inputs come flattened, run by run: the first dimension is R B (or R N rows at the head).

Letters: R runs in the pack, M of them that train something here (members), N rows of one run,
D inputs, O outputs, K rank, padded to the largest of the members.

Padding a rank with zeros is exact: a padded row of A meets a zero column of B, so its gradient is
zero, and the other way round.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorabench.adapters import KeyedDropout
from lorabench.pack.storage import Stacked

ONE_SUM = 256  # terms of a product that are surely summed before it is added; MKL's blocks hold 384


class PackedLinear(nn.Module):
    """y = x W^T + b + scale B(A(dropout(x))), every run its own A, B, scale and dropout.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; PEFT's `lora.Linear` per run.
    """

    def __init__(
        self,
        base: nn.Linear | Conv1D,
        lora_a_MKD: Stacked,
        lora_b_MKO: Stacked,
        scale_M: Tensor,
        dropouts: list[KeyedDropout | None],
        anchor: Tensor,
        bias: PackedBias | None,
    ):
        super().__init__()
        self.base = base
        self.members, self.lora_a, self.lora_b = lora_a_MKD.members, lora_a_MKD, lora_b_MKO
        self.scale_M11 = scale_M[:, None, None]
        self.dropouts = dropouts
        self.anchor, self.bias_of_runs = anchor, bias

    @property
    def weight(self) -> Tensor:
        """The base weight: some architectures look at a layer's dtype or device through it."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x_RND = self.members.by_run(x)
        weight = self.base.weight.t() if isinstance(self.base, Conv1D) else self.base.weight
        bias = None if self.bias_of_runs is not None else self.base.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x_RND, weight = x_RND.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
        dropped = self._dropped(x_RND)
        # Without its anchor a frozen layer runs no backward that nobody below it asks for.
        anchor = self.anchor if self.lora_a.active else None
        y_RNO = _PackedLora.apply(x_RND, dropped, anchor, weight, bias, self)
        if self.bias_of_runs is not None:
            y_RNO = self.bias_of_runs(y_RNO)
        return y_RNO.reshape(*shape[:-1], y_RNO.shape[-1])

    def _dropped(self, x_RND: Tensor) -> Tensor | None:
        """The kept positions of each member's input, scaled, (M, N, D); None without dropout."""
        active = [d if d is not None and d.clock.training else None for d in self.dropouts]
        if not any(active):
            return None
        rows = x_RND.shape[1:]  # torch.rand fills by position: the numbers a run alone would draw
        return torch.stack(
            [
                torch.ones(rows, device=x_RND.device)
                if dropout is None
                else dropout.mask(rows, x_RND.device)
                for dropout in active
            ]
        ).to(x_RND.dtype)


class _PackedLora(torch.autograd.Function):
    """The products of PackedLinear, as few and as large as they can be."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RND: Tensor,
        mask_MND: Tensor | None,
        anchor: Tensor | None,
        weight_OD: Tensor,
        bias_O: Tensor | None,
        layer: PackedLinear,
    ) -> Tensor:
        y_RNO = F.linear(x_RND, weight_OD, bias_O)
        x_MND = layer.members.take(x_RND)
        if mask_MND is not None:
            x_MND = x_MND * mask_MND
        a_MKD, b_MKO = layer.lora_a.for_compute(), layer.lora_b.for_compute()
        h_MNK = torch.bmm(x_MND, a_MKD.transpose(1, 2)).mul_(layer.scale_M11.to(x_MND.dtype))
        where = layer.members.where
        if isinstance(where, slice):
            y_RNO[where].baddbmm_(h_MNK, b_MKO)
        else:
            y_RNO[where] = torch.baddbmm(y_RNO[where], h_MNK, b_MKO)
        # Without dropout the input itself is kept, which the base's layers keep anyway.
        ctx.save_for_backward(x_MND if mask_MND is not None else x_RND, h_MNK, mask_MND, weight_OD)
        ctx.layer = layer
        # With a bias F.linear returns a view, which Falcon's in-place addition would be refused on.
        return torch.ops.aten._unsafe_view(y_RNO, y_RNO.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g_RNO,) = grads
        x, h_MNK, mask_MND, weight_OD = ctx.saved_tensors
        layer = ctx.layer
        members = layer.members
        x_MND = x if mask_MND is not None else members.take(x)
        a_MKD, b_MKO = layer.lora_a.for_compute(), layer.lora_b.for_compute()
        g_MNO = members.take(g_RNO)
        gh_MNK = torch.bmm(g_MNO, b_MKO.transpose(1, 2)).mul_(layer.scale_M11.to(g_MNO.dtype))
        if layer.lora_a.active:
            layer.lora_b.add_product(h_MNK.transpose(1, 2), g_MNO)
            layer.lora_a.add_product(gh_MNK.transpose(1, 2), x_MND)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None
        gx_RND = g_RNO @ weight_OD
        # A mate's dropout must not change a run's bits: the product is added as it is made only
        # where that rounds as adding it afterwards does.
        exact = gx_RND.dtype in (torch.float32, torch.float64) and a_MKD.shape[1] <= ONE_SUM
        if mask_MND is None and isinstance(members.where, slice) and exact:
            gx_RND[members.where].baddbmm_(gh_MNK, a_MKD)
        else:
            update = torch.bmm(gh_MNK, a_MKD)
            gx_RND[members.where] += update if mask_MND is None else update * mask_MND
        return gx_RND, None, None, None, None, None


class PackedHead(nn.Module):
    """The output layer where some runs train a full copy of it (head=full)."""

    def __init__(
        self, base: nn.Module, weight_MOD: Stacked, bias_MO: Stacked | None, anchor: Tensor
    ):
        super().__init__()
        self.base, self.copies, self.biases, self.anchor = base, weight_MOD, bias_MO, anchor
        self.members = weight_MOD.members

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x_RND = self.members.by_run(x)
        if torch.is_autocast_enabled(x.device.type):
            x_RND = x_RND.to(torch.get_autocast_dtype(x.device.type))
        anchor = self.anchor if self.copies.active else None
        own = _PackedCopies.apply(self.members.take(x_RND), anchor, self)
        if self.members.is_all:
            y_RNO = own
        else:
            y_RNO = self.base(x).reshape(self.members.size, -1, own.shape[-1]).to(own.dtype)
            y_RNO = y_RNO.index_copy(0, torch.tensor(self.members.runs, device=x.device), own)
        return y_RNO.reshape(*shape[:-1], y_RNO.shape[-1])


class _PackedCopies(torch.autograd.Function):
    """y = x W^T + b with one W, and one b where the head has any, a member."""

    @staticmethod
    def forward(ctx: Any, x_MND: Tensor, anchor: Tensor | None, layer: PackedHead) -> Tensor:
        ctx.save_for_backward(x_MND)
        ctx.layer = layer
        y_MNO = torch.bmm(x_MND, layer.copies.for_compute().transpose(1, 2))
        if layer.biases is not None:
            y_MNO += layer.biases.value.to(y_MNO.dtype)[:, None]
        return y_MNO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g_MNO,) = grads
        (x_MND,) = ctx.saved_tensors
        if ctx.layer.copies.active:
            ctx.layer.copies.add_product(g_MNO.transpose(1, 2), x_MND)
            if ctx.layer.biases is not None:
                ctx.layer.biases.add(g_MNO.sum(1))
        gx = torch.bmm(g_MNO, ctx.layer.copies.for_compute()) if ctx.needs_input_grad[0] else None
        return gx, None, None


class PackedBias(nn.Module):
    """Adds each run's own bias; runs that do not train it have the base's."""

    def __init__(self, trained_MO: Stacked, base_O: Tensor, anchor: Tensor):
        super().__init__()
        self.trained, self.base, self.anchor = trained_MO, base_O, anchor
        self.members = trained_MO.members

    def forward(self, y_RNO: Tensor) -> Tensor:
        return _PackedBiases.apply(y_RNO, self.anchor if self.trained.active else None, self)


class _PackedBiases(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RNO: Tensor, anchor: Tensor | None, layer: PackedBias) -> Tensor:
        ctx.layer = layer
        bias_RO = layer.base.to(y_RNO.dtype).repeat(layer.members.size, 1)
        bias_RO[layer.members.where] = layer.trained.value.to(y_RNO.dtype)
        return y_RNO + bias_RO[:, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g_RNO,) = grads
        if ctx.layer.trained.active:
            ctx.layer.trained.add(ctx.layer.members.take(g_RNO).sum(1))
        return g_RNO, None, None


class PackedNorm(nn.Module):
    """A LayerNorm or an unadapted linear layer whose bias some runs train (bias=all)."""

    def __init__(self, base: nn.Module, bias: PackedBias):
        super().__init__()
        self.base, self.bias_of_runs = base, bias

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base, nn.LayerNorm):
            y = F.layer_norm(x, self.base.normalized_shape, self.base.weight, None, self.base.eps)
        elif isinstance(self.base, Conv1D):
            y = x @ self.base.weight
        else:
            assert isinstance(self.base, nn.Linear)
            y = F.linear(x, self.base.weight)
        y_RNO = self.bias_of_runs.members.by_run(y)
        return self.bias_of_runs(y_RNO).reshape(y.shape)


# What PackedNorm can compute without its bias: these alone, a subclass may compute otherwise.
BIAS_OWNERS = (nn.LayerNorm, nn.Linear, Conv1D)
