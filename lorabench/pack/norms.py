"""Frozen RMS norms with a backward written by hand: half of autograd's passes over memory."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily


class FrozenRMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * w, in the dtype of x.

    In lower precision a GPU takes torch's own kernel, which rounds once where the architectures
    round once or twice; a CPU takes the architecture's module.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(self, base: nn.Module, weight_D: Tensor, eps: float):
        super().__init__()
        self.base, self.eps = base, eps
        self.is_stored = weight_D is base.weight  # and not made of it
        exact = weight_D.dtype == torch.float64
        self.register_buffer("weight_D", weight_D if exact else weight_D.float(), persistent=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.float32, torch.float64):
            return self.in_one_kernel(x) if x.is_cuda else self.base(x)
        return _RMSNorm.apply(x, self.weight_D.to(x.dtype), self.eps)


    def in_one_kernel(self, x: Tensor) -> Tensor:
        """In one or, where the weight needs more precision than x has, three passes over memory."""
        if self.is_stored:
            return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
        weight_D: Tensor = self.weight_D  # type: ignore[assignment]
        return F.rms_norm(x.float(), x.shape[-1:], weight_D, self.eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """The architectures' own products and sums, in autograd's order: in float32 the same bits.

    Another order would be as good; but a step that overshoots turns its rounding into 1e-2 of a
    loss within ten steps, and runs could no longer be held against stock PEFT's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, inverse, weight_D)
        return (x * inverse).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, weight_D = ctx.saved_tensors
        g = grads[0] * weight_D
        # Autograd's own -0.5 and 2 cancel without a rounding.
        along = (g * x).sum(-1, keepdim=True) * inverse.pow(3)
        return g.mul_(inverse).sub_(x * (along / x.shape[-1])), None, None


@torch.no_grad()
def fuse_norms(tree: nn.Module) -> None:
    """Put a FrozenRMSNorm around every RMS norm, where it is shown to compute the same."""
    for name, module in list(tree.named_modules()):
        if not type(module).__name__.endswith("RMSNorm") or isinstance(module, FrozenRMSNorm):
            continue
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        weight = getattr(module, "weight", None)
        if eps is None or weight is None or weight.dim() != 1 or weight.requires_grad:
            continue
        if len(inspect.signature(module.forward).parameters) != 1:
            continue  # a gated one, say
        for added in (0, 1):  # Gemma's stores w - 1
            if _same(module, weight, added, float(eps)):
                fast = FrozenRMSNorm(module, _added(weight, added), float(eps))
                tree.set_submodule(name, fast)
                break


def _added(weight: Tensor, added: int) -> Tensor:
    """The factor: what is stored, or more, in at least float32, as the architectures add it."""
    if not added:
        return weight
    return (weight if weight.dtype == torch.float64 else weight.float()) + added


def _same(module: nn.Module, weight: Tensor, added: int, eps: float) -> bool:
    """Whether FrozenRMSNorm computes the same for rows around one, far above and near eps."""
    with unset_fake_temporarily():  # a traced base has shapes alone: any values tell
        if isinstance(weight, FakeTensor):
            weight = torch.linspace(0.5, 1.5, len(weight), dtype=weight.dtype)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(6, len(weight), generator=generator).to(weight.device)
        x *= torch.tensor([1, 1, 100, 100, 1e-3, 1e-3], device=weight.device)[:, None]
        expected = torch.func.functional_call(module, {"weight": weight}, x)
        found = FrozenRMSNorm(module, _added(weight, added), eps)(x)
        return torch.allclose(expected.double(), found.double(), rtol=1e-5, atol=1e-6)
