"""Layers that serve every run of a pack at once: frozen base weights, one adapter a run.

Inputs hold the rows of all runs end to end, run by run; `Spans` says how many are whose.

Letters: R runs in the pack, M of them that train something here (members), P rows of all runs,
N rows of one run, D inputs, O outputs, K rank: stored up to the largest of the members, computed to
each run's own or, on a GPU, to the largest.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorabench.adapters import KeyedDropout
from lorabench.pack.rows import Rows, Spans
from lorabench.pack.storage import Part, Stacked

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
        ranks: tuple[int, ...],
        dropouts: list[KeyedDropout | None],
        anchor: Tensor,
        bias: PackedBias | None,
        spans: Spans,
    ):
        super().__init__()
        self.base, self.spans = base, spans
        self.members, self.lora_a, self.lora_b = lora_a_MKD.members, lora_a_MKD, lora_b_MKO
        self.scale_M11, self.ranks = scale_M[:, None, None], ranks
        self.dropouts = dropouts
        self.anchor, self.bias_of_runs = anchor, bias

    @property
    def weight(self) -> Tensor:
        """The base weight: some architectures look at a layer's dtype or device through it."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        x_PD, rows = self.spans.of(x)
        weight = self.base.weight.t() if isinstance(self.base, Conv1D) else self.base.weight
        bias = None if self.bias_of_runs is not None else self.base.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x_PD, weight = x_PD.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
        parts = self.members.parts(rows, self.ranks)
        masks = [self._mask(part, x_PD) for part in parts]
        # Without its anchor a frozen layer runs no backward that nobody below it asks for.
        anchor = self.anchor if self.lora_a.active else None
        y_PO = _PackedLora.apply(x_PD, anchor, weight, bias, self, parts, masks)
        if self.bias_of_runs is not None:
            y_PO = self.bias_of_runs(y_PO)
        return y_PO.reshape(*x.shape[:-1], y_PO.shape[-1])

    def _mask(self, part: Part, x_PD: Tensor) -> Tensor | None:
        """The kept positions of each member's input, scaled, (M, N, D); None without dropout."""
        active = [
            dropout if dropout is not None and dropout.clock.training else None
            for dropout in self.dropouts[part.stored]
        ]
        if not any(active):
            return None
        # torch.rand fills by position: the numbers a run alone would draw.
        shape = torch.Size((part.block.count, x_PD.shape[-1]))
        return torch.stack(
            [
                torch.ones(shape, device=x_PD.device)
                if dropout is None
                else dropout.mask(shape, x_PD.device)
                for dropout in active
            ]
        ).to(x_PD.dtype)


class _PackedLora(torch.autograd.Function):
    """The products of PackedLinear, as few and as large as they can be."""

    @staticmethod
    def forward(
        ctx: Any,
        x_PD: Tensor,
        anchor: Tensor | None,
        weight_OD: Tensor,
        bias_O: Tensor | None,
        layer: PackedLinear,
        parts: list[Part],
        masks: list[Tensor | None],
    ) -> Tensor:
        y_PO = F.linear(x_PD, weight_OD, bias_O)
        a_MKD, b_MKO = layer.lora_a.for_compute(), layer.lora_b.for_compute()
        scale_M11 = layer.scale_M11.to(x_PD.dtype)
        hidden, dropped = [], []
        for part, mask_MND in zip(parts, masks, strict=True):
            x_MND = part.take(x_PD)
            if mask_MND is not None:
                x_MND = x_MND * mask_MND
            h_MNK = torch.bmm(x_MND, a_MKD[part.own].transpose(1, 2))
            h_MNK.mul_(scale_M11[part.stored])
            part.add_product(y_PO, h_MNK, b_MKO[part.own])
            hidden.append(h_MNK)
            # Without dropout the input itself is kept, which the base's layers keep anyway.
            dropped.append(None if mask_MND is None else x_MND)
        ctx.save_for_backward(x_PD, weight_OD, *hidden, *dropped, *masks)
        ctx.layer, ctx.parts = layer, parts
        # With a bias F.linear returns a view, which Falcon's in-place addition would be refused on.
        return torch.ops.aten._unsafe_view(y_PO, y_PO.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g_PO,) = grads
        g_PO = g_PO.contiguous()
        x_PD, weight_OD, *rest = ctx.saved_tensors
        layer, parts = ctx.layer, ctx.parts
        count = len(parts)
        hidden, dropped, masks = rest[:count], rest[count : 2 * count], rest[2 * count :]
        a_MKD, b_MKO = layer.lora_a.for_compute(), layer.lora_b.for_compute()
        scale_M11 = layer.scale_M11.to(g_PO.dtype)
        gradients = []
        for part in parts:
            gh_MNK = torch.bmm(part.take(g_PO), b_MKO[part.own].transpose(1, 2))
            gradients.append(gh_MNK.mul_(scale_M11[part.stored]))
        if layer.lora_a.active:
            layer.lora_b.add_products(
                [
                    (part.own, h_MNK.transpose(1, 2), part.take(g_PO))
                    for part, h_MNK in zip(parts, hidden, strict=True)
                ]
            )
            layer.lora_a.add_products(
                [
                    (part.own, gh.transpose(1, 2), part.take(x_PD) if x is None else x)
                    for part, gh, x in zip(parts, gradients, dropped, strict=True)
                ]
            )
        nothing = (None,) * 6
        if not ctx.needs_input_grad[0]:
            return None, *nothing
        gx_PD = g_PO @ weight_OD
        # A mate's dropout must not change a run's bits: the product is added as it is made only
        # where that rounds as adding it afterwards does.
        exact = gx_PD.dtype in (torch.float32, torch.float64)
        for part, gh_MNK, mask_MND in zip(parts, gradients, masks, strict=True):
            own_sum = exact and part.rank is not None and part.rank <= ONE_SUM
            if mask_MND is None and isinstance(part.where, slice) and own_sum:
                part.add_product(gx_PD, gh_MNK, a_MKD[part.own])
            else:
                update = torch.bmm(gh_MNK, a_MKD[part.own])
                part.add(gx_PD, update if mask_MND is None else update * mask_MND)
        return gx_PD, *nothing


class PackedHead(nn.Module):
    """The output layer where some runs train a full copy of it (head=full)."""

    def __init__(
        self,
        base: nn.Module,
        weight_MOD: Stacked,
        bias_MO: Stacked | None,
        anchor: Tensor,
        spans: Spans,
    ):
        super().__init__()
        self.base, self.copies, self.biases, self.anchor = base, weight_MOD, bias_MO, anchor
        self.spans = spans
        self.members = weight_MOD.members

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        x_PD, rows = self.spans.of(x)
        if torch.is_autocast_enabled(x.device.type):
            x_PD = x_PD.to(torch.get_autocast_dtype(x.device.type))
        anchor = self.anchor if self.copies.active else None
        parts = self.members.parts(rows)
        # The others' rows by the base; a LoRA of theirs is in it.
        others = None if self.members.is_all else self.spans.of(self.base(x))[0]
        y_PO = _PackedCopies.apply(x_PD, others, anchor, self, parts)
        return y_PO.reshape(*x.shape[:-1], y_PO.shape[-1])


class _PackedCopies(torch.autograd.Function):
    """y = x W^T + b with one W, and one b where the head has any, a member."""

    @staticmethod
    def forward(
        ctx: Any,
        x_PD: Tensor,
        others_PO: Tensor | None,
        anchor: Tensor | None,
        layer: PackedHead,
        parts: list[Part],
    ) -> Tensor:
        ctx.save_for_backward(x_PD)
        ctx.layer, ctx.parts = layer, parts
        copies_MDO = layer.copies.for_compute().transpose(1, 2)
        if others_PO is None:
            y_PO = x_PD.new_empty(len(x_PD), copies_MDO.shape[-1])
        else:
            y_PO = others_PO.to(x_PD.dtype, copy=True)
        for part in parts:
            own_MNO = torch.bmm(part.take(x_PD), copies_MDO[part.stored])
            if layer.biases is not None:
                own_MNO += layer.biases.value[part.stored].to(own_MNO.dtype)[:, None]
            part.block.of(y_PO)[part.where] = own_MNO
        return y_PO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g_PO,) = grads
        g_PO = g_PO.contiguous()
        (x_PD,) = ctx.saved_tensors
        layer, parts = ctx.layer, ctx.parts
        members = [(part, part.take(g_PO)) for part in parts]
        if layer.copies.active:
            layer.copies.add_products(
                [(part.stored, g.transpose(1, 2), part.take(x_PD)) for part, g in members]
            )
            if layer.biases is not None:
                layer.biases.add([(part.stored, g.sum(1)) for part, g in members])
        gx = others = None
        if ctx.needs_input_grad[0]:
            gx = torch.zeros_like(x_PD)
            for part, g in members:
                part.add(gx, torch.bmm(g, layer.copies.for_compute()[part.stored]))
        if ctx.needs_input_grad[1]:
            others = g_PO.clone()
            for part, _ in members:
                part.block.of(others)[part.where] = 0
        return gx, others, None, None, None


class PackedBias(nn.Module):
    """Adds each run's own bias; runs that do not train it have the base's."""

    def __init__(self, trained_MO: Stacked, base_O: Tensor, anchor: Tensor, spans: Spans):
        super().__init__()
        self.trained, self.base, self.anchor, self.spans = trained_MO, base_O, anchor, spans
        self.members = trained_MO.members

    def forward(self, y: Tensor) -> Tensor:
        y_PO, rows = self.spans.of(y)
        anchor = self.anchor if self.trained.active else None
        return _PackedBiases.apply(y_PO, anchor, self, rows).reshape(y.shape)


class _PackedBiases(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_PO: Tensor, anchor: Tensor | None, layer: PackedBias, rows: Rows
    ) -> Tensor:
        ctx.layer, ctx.rows = layer, rows
        bias_RO = layer.base.to(y_PO.dtype).repeat(layer.members.size, 1)
        bias_RO[layer.members.where] = layer.trained.value.to(y_PO.dtype)
        z_PO = torch.empty_like(y_PO)
        for block in rows.blocks:
            bias = bias_RO[block.first_run : block.first_run + block.size, None]
            torch.add(block.of(y_PO), bias, out=block.of(z_PO))
        return z_PO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g_PO,) = grads
        if ctx.layer.trained.active:
            g = g_PO.contiguous()
            parts = ctx.layer.members.parts(ctx.rows)
            ctx.layer.trained.add([(part.stored, part.take(g).sum(1)) for part in parts])
        return g_PO, None, None, None


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
        return self.bias_of_runs(y)


# What PackedNorm can compute without its bias: these alone, a subclass may compute otherwise.
BIAS_OWNERS = (nn.LayerNorm, nn.Linear, Conv1D)
