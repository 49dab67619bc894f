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

from lorabench.adapters import dropout
from lorabench.pack.rows import Rows, Spans, on_device
from lorabench.pack.storage import Members, Part, Stacked

ONE_SUM = 256  # terms of a product that are surely summed before it is added; MKL's blocks hold 384


class PackedDropout:
    """Which inputs of a layer each member drops: by the keys of its run, all members at once.

    Args:
        ps: of each member; 0: it drops nothing.
    """

    def __init__(self, name: str, ps: list[float], runs: list[int], clock: dropout.Clock):
        self.clock, self.index, self.ps = clock, clock.register(name), ps
        device = clock.device
        limits = [dropout.threshold(p) for p in ps]
        self.threshold_M = on_device(limits, device, torch.int32)
        self.inverse_M = on_device([1 / (1 - p) for p in ps], device)
        self.runs_M = on_device(runs, device)

    def kept(self, part: Part, width: int) -> Tensor | None:
        """The kept positions of each member's input, (M, N, D), bool; None where all are."""
        if not any(self.ps[part.stored]):
            return None
        runs_M = self.runs_M[part.stored]
        number_MN = self.clock.numbers_of(part.block.count, runs_M)
        keys_M2 = self.clock.keys_LR2[self.index].index_select(0, runs_M)
        return dropout.kept(number_MN, width, keys_M2, self.threshold_M[part.stored])

    def inverse(self, part: Part, dtype: torch.dtype) -> Tensor:
        """What kept inputs of each member are scaled by, (M, 1, 1)."""
        return self.inverse_M[part.stored, None, None].to(dtype)


class PackedLinear(nn.Module):
    """y = x W^T + b + scale B(A(dropout(x))), every run its own A, B, scale and dropout.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; PEFT's `lora.Linear` per run.
    """

    def __init__(
        self,
        base: nn.Linear | Conv1D,
        lora_a_MKD: Stacked,
        lora_b_MKO: Stacked,
        ranks: tuple[int, ...],
        dropout: PackedDropout | None,
        bias: PackedBias | None,
        spans: Spans,
    ):
        super().__init__()
        self.base, self.spans = base, spans
        self.members, self.lora_a, self.lora_b = lora_a_MKD.members, lora_a_MKD, lora_b_MKO
        self.ranks, self.dropout, self.bias_of_runs = ranks, dropout, bias

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
        kept: list[Tensor | None] = [None] * len(parts)
        if self.dropout is not None and self.dropout.clock.training:
            kept = [self.dropout.kept(part, x_PD.shape[-1]) for part in parts]
        a, b = self.lora_a, self.lora_b
        y_PO = _PackedLora.apply(
            x_PD, weight, bias, a.value, b.value, a.copy, b.copy, self, parts, *kept
        )
        if self.bias_of_runs is not None:
            y_PO = self.bias_of_runs(y_PO)
        return y_PO.reshape(*x.shape[:-1], y_PO.shape[-1])


class _PackedLora(torch.autograd.Function):
    """The products of PackedLinear, as few and as large as they can be.

    B comes scaled; gradients are those of A and B themselves, in their own precision.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_PD: Tensor,
        weight_OD: Tensor,
        bias_O: Tensor | None,
        a: Tensor,
        b: Tensor,
        a_copy: Tensor | None,
        b_copy: Tensor | None,
        layer: PackedLinear,
        parts: list[Part],
        *kept: Tensor | None,
    ) -> Tensor:
        a_MKD, b_MKO = a if a_copy is None else a_copy, b if b_copy is None else b_copy
        y_PO = F.linear(x_PD, weight_OD, bias_O)
        hidden = []
        for part, kept_MND in zip(parts, kept, strict=True):
            x_MND = part.take(x_PD)
            if kept_MND is not None:
                x_MND = x_MND * kept_MND
            h_MNK = torch.bmm(x_MND, part.own(a_MKD).transpose(1, 2))
            if kept_MND is not None:
                assert layer.dropout is not None
                h_MNK.mul_(layer.dropout.inverse(part, h_MNK.dtype))
            part.add_product(y_PO, h_MNK, part.own(b_MKO))
            hidden.append(h_MNK)
        # The input itself is kept, which the base's layers keep anyway.
        ctx.save_for_backward(x_PD, weight_OD, a_MKD, b_MKO, *hidden, *kept)
        ctx.layer, ctx.parts = layer, parts
        ctx.shapes, ctx.dtype = (a.shape, b.shape), a.dtype
        if bias_O is None:
            return y_PO
        # F.linear returned a view, which Falcon's in-place addition would be refused on.
        return torch.ops.aten._unsafe_view(y_PO, y_PO.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g_PO,) = grads
        g_PO = g_PO.contiguous()
        x_PD, weight_OD, a_MKD, b_MKO, *rest = ctx.saved_tensors
        layer, parts = ctx.layer, ctx.parts
        hidden, kept = rest[: len(parts)], rest[len(parts) :]
        inputs = [part.take(x_PD) for part in parts]
        outputs = [part.take(g_PO) for part in parts]
        gradients = []
        for i, part in enumerate(parts):
            gh_MNK = torch.bmm(outputs[i], part.own(b_MKO).transpose(1, 2))
            if kept[i] is not None:
                gh_MNK.mul_(layer.dropout.inverse(part, gh_MNK.dtype))
                inputs[i] = inputs[i] * kept[i]
            gradients.append(gh_MNK)
        ga = gb = gx_PD = None
        if ctx.needs_input_grad[3]:
            found = [
                product(gh.transpose(1, 2), x, ctx.dtype)
                for gh, x in zip(gradients, inputs, strict=True)
            ]
            ga = layer.members.gathered(parts, found, ctx.shapes[0])
        if ctx.needs_input_grad[4]:
            found = [
                product(h.transpose(1, 2), g, ctx.dtype)
                for h, g in zip(hidden, outputs, strict=True)
            ]
            gb = layer.members.gathered(parts, found, ctx.shapes[1])
            if layer.lora_b.scale_M11 is not None:
                gb.mul_(layer.lora_b.scale_M11)
        if ctx.needs_input_grad[0]:
            gx_PD = g_PO @ weight_OD
            # A mate's dropout must not change a run's bits: the product is added as it is made only
            # where that rounds as adding it afterwards does.
            exact = gx_PD.dtype in (torch.float32, torch.float64)
            for part, gh_MNK, kept_MND in zip(parts, gradients, kept, strict=True):
                own_sum = exact and part.rank is not None and part.rank <= ONE_SUM
                if kept_MND is None and isinstance(part.where, slice) and own_sum:
                    part.add_product(gx_PD, gh_MNK, part.own(a_MKD))
                else:
                    update = torch.bmm(gh_MNK, part.own(a_MKD))
                    part.add(gx_PD, update if kept_MND is None else update * kept_MND)
        return gx_PD, None, None, ga, gb, *(None,) * (4 + len(parts))


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in the precision that gradients have."""
    if left.dtype == dtype:
        return torch.bmm(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=dtype)
    return torch.bmm(left, right).to(dtype)


class PackedHead(nn.Module):
    """The output layer where some runs train a full copy of it (head=full)."""

    def __init__(
        self, base: nn.Module, weight_MOD: Stacked, bias_MO: Stacked | None, spans: Spans
    ):
        super().__init__()
        self.base, self.copies, self.biases, self.spans = base, weight_MOD, bias_MO, spans
        self.members = weight_MOD.members

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        x_PD, rows = self.spans.of(x)
        if torch.is_autocast_enabled(x.device.type):
            x_PD = x_PD.to(torch.get_autocast_dtype(x.device.type))
        parts = self.members.parts(rows)
        # The others' rows by the base; a LoRA of theirs is in it.
        others = None if self.members.is_all else self.spans.of(self.base(x))[0]
        biases = None if self.biases is None else self.biases.value
        copies = self.copies
        y_PO = _PackedCopies.apply(
            x_PD, others, copies.value, biases, copies.copy, self.members, parts
        )
        return y_PO.reshape(*x.shape[:-1], y_PO.shape[-1])


class _PackedCopies(torch.autograd.Function):
    """y = x W^T + b with one W, and one b where the head has any, a member."""

    @staticmethod
    def forward(
        ctx: Any,
        x_PD: Tensor,
        others_PO: Tensor | None,
        weight: Tensor,
        bias_MO: Tensor | None,
        weight_copy: Tensor | None,
        members: Members,
        parts: list[Part],
    ) -> Tensor:
        weight_MOD = weight if weight_copy is None else weight_copy
        ctx.save_for_backward(x_PD, weight_MOD)
        ctx.members, ctx.parts = members, parts
        ctx.shapes = weight.shape, None if bias_MO is None else bias_MO.shape
        ctx.dtype = weight.dtype
        if others_PO is None:
            y_PO = x_PD.new_empty(len(x_PD), weight_MOD.shape[1])
        else:
            y_PO = others_PO.to(x_PD.dtype, copy=True)
        for part in parts:
            own_MNO = torch.bmm(part.take(x_PD), part.own(weight_MOD).transpose(1, 2))
            if bias_MO is not None:
                own_MNO += part.own(bias_MO).to(own_MNO.dtype)[:, None]
            part.put(y_PO, own_MNO)
        return y_PO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g_PO,) = grads
        g_PO = g_PO.contiguous()
        x_PD, weight_MOD = ctx.saved_tensors
        members, parts = ctx.members, ctx.parts
        outputs = [part.take(g_PO) for part in parts]
        gx = others = gw = gb = None
        if ctx.needs_input_grad[2]:
            found = [
                product(g.transpose(1, 2), part.take(x_PD), ctx.dtype)
                for part, g in zip(parts, outputs, strict=True)
            ]
            gw = members.gathered(parts, found, ctx.shapes[0])
        if ctx.needs_input_grad[3]:
            sums = [g.sum(1).to(ctx.dtype) for g in outputs]
            gb = members.gathered(parts, sums, ctx.shapes[1])
        if ctx.needs_input_grad[0]:
            gx = torch.zeros_like(x_PD)
            for part, g in zip(parts, outputs, strict=True):
                part.add(gx, torch.bmm(g, part.own(weight_MOD)))
        if ctx.needs_input_grad[1]:
            others = g_PO.clone()
            for part in parts:
                part.put(others, 0.0)
        return gx, others, gw, gb, None, None, None


class PackedBias(nn.Module):
    """Adds each run's own bias; runs that do not train it have the base's."""

    def __init__(self, trained_MO: Stacked, base_O: Tensor, spans: Spans):
        super().__init__()
        self.trained, self.base, self.spans = trained_MO, base_O, spans
        self.members = trained_MO.members
        self.runs_M = on_device(self.members.runs, self.members.device)

    def forward(self, y: Tensor) -> Tensor:
        y_PO, rows = self.spans.of(y)
        biases = self.trained.value
        z_PO = _PackedBiases.apply(y_PO, biases, self.base, self.runs_M, self.members, rows)
        return z_PO.reshape(y.shape)


class _PackedBiases(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y_PO: Tensor,
        trained_MO: Tensor,
        base_O: Tensor,
        runs_M: Tensor,
        members: Members,
        rows: Rows,
    ) -> Tensor:
        ctx.members, ctx.rows = members, rows
        ctx.shape, ctx.dtype = trained_MO.shape, trained_MO.dtype
        bias_RO = base_O.to(y_PO.dtype).repeat(members.size, 1)
        bias_RO.index_copy_(0, runs_M, trained_MO.to(y_PO.dtype))
        z_PO = torch.empty_like(y_PO)
        for block in rows.blocks:
            bias = bias_RO[block.first_run : block.first_run + block.size, None]
            torch.add(block.of(y_PO), bias, out=block.of(z_PO))
        return z_PO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g_PO,) = grads
        gb = None
        if ctx.needs_input_grad[1]:
            g = g_PO.contiguous()
            parts = ctx.members.parts(ctx.rows)
            sums = [part.take(g).sum(1).to(ctx.dtype) for part in parts]
            gb = ctx.members.gathered(parts, sums, ctx.shape)
        return g_PO, gb, None, None, None, None


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
