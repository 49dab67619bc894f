"""Runs trained together over one base forward, and the optimizer that moves them.

A pack answers four calls of the training loop: `forward_backward`, `update`, `score` and `state`.
`ModulePack` is the pack of one on PEFT's own modules.

Letters: R runs in the pack, B batch, T tokens, D model width, V vocabulary, N rows = tokens that
carry a loss.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorabench import adapters
from lorabench import model as base_model
from lorabench.config import Config


class HeadRows:
    """Lets the head compute logits only for chosen rows, whatever the architecture does after it.

    A pre-hook on the head's module: (B, T, D) in, (N, D) on to the head.
    """

    def __init__(self, head: nn.Module):
        self.rows: Tensor | None = None
        head.register_forward_pre_hook(self._select)

    def _select(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.rows is None:
            return None
        hidden = inputs[0]
        return (hidden.reshape(-1, hidden.shape[-1])[self.rows], *inputs[1:])


def target_rows(labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the flattened (B, T) hidden states that predict a labelled token, and its id.

    Position t predicts the token at t + 1, so the row of label (b, t) is b T + t - 1.
    """
    rows = labels_BT[:, 1:].ne(-100).nonzero()
    length = labels_BT.shape[1]
    return rows[:, 0] * length + rows[:, 1], labels_BT[rows[:, 0], rows[:, 1] + 1]


def autocast(config: Config, device: str) -> AbstractContextManager[Any]:
    """The precision of the computation."""
    if config.trainer.dtype == "bfloat16":
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    return nullcontext()


class ModulePack:
    """One run on PEFT's own modules: whatever PEFT can train, this can."""

    def __init__(self, base: PreTrainedModel, config: Config, modules: list[str], device: str):
        self.config, self.device = config, device
        self.wrapped = adapters.attach(base, config, modules)
        self.clock = adapters.Clock(config.seeds.dropout)
        adapters.key_dropout(self.wrapped, self.clock)
        self.parameters = adapters.trainable(self.wrapped)
        self.tree = cast(Any, self.wrapped.get_base_model())
        self.tree.train()  # base dropouts are zero; checkpointing asks for training mode
        if config.trainer.gradient_checkpointing:
            enable = getattr(  # its name since transformers 5.23
                self.tree,
                "activation_checkpointing_enable",
                self.tree.gradient_checkpointing_enable,
            )
            enable({"use_reentrant": False})
        head = base_model.output_head(self.tree)
        assert head is not None, "a causal language model has an output head"
        self.head_rows = HeadRows(head[1])
        trainer = config.trainer
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=trainer.lr,
            betas=(trainer.beta1, trainer.beta2),
            eps=trainer.eps,
            weight_decay=trainer.weight_decay,
            fused=device != "mps",
        )

    @property
    def size(self) -> int:
        return 1

    def logits(self, input_ids_BT: Tensor, rows: Tensor) -> Tensor:
        """Logits of the chosen rows, (N, V), at least float32."""
        self.head_rows.rows = rows
        try:
            with autocast(self.config, self.device):
                logits = self.tree(input_ids=input_ids_BT, use_cache=False).logits
        finally:
            self.head_rows.rows = None
        return logits if logits.dtype == torch.float64 else logits.float()

    def forward_backward(
        self, step: int, micro_step: int, input_ids_BT: Tensor, labels_BT: Tensor, num_targets: int
    ) -> Tensor:
        """Add this micro-batch's gradient of (summed nll / num_targets); return that loss, (R,).

        Args:
            num_targets: labelled tokens of the whole batch, so that micro-batches weigh as in one.
        """
        self.clock.step, self.clock.micro_step, self.clock.training = step, micro_step, True
        rows, targets = target_rows(labels_BT)
        loss = F.cross_entropy(self.logits(input_ids_BT, rows), targets, reduction="sum")
        loss = loss / num_targets
        loss.backward()
        self.clock.training = False
        return loss.detach()[None]

    def update(self, lr: float) -> Tensor:
        """Clip, take one AdamW step, clear the gradients; return the norm before clipping, (R,)."""
        limit = self.config.trainer.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), float("inf") if limit is None else limit, foreach=True
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()[None]

    @torch.no_grad()
    def score(self, input_ids_BT: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher-forced scores of every labelled token.

        Returns:
            nll, (R, N); argmax ids, (R, N); example of each row, (N,).
        """
        rows, targets = target_rows(labels_BT)
        logits = self.logits(input_ids_BT, rows)
        nll = F.cross_entropy(logits, targets, reduction="none")
        return nll[None], logits.argmax(-1)[None], rows // input_ids_BT.shape[1]

    def state(self) -> dict[str, Tensor]:
        """Trained parameters and optimizer moments, by name."""
        found = dict(self.parameters)
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                found[f"{name}|{key}"] = value
        return {name: tensor.detach() for name, tensor in found.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])
            self.optimizer.state[parameter] = {
                key.partition("|")[2]: value.to(parameter.device)
                for key, value in state.items()
                if key.startswith(f"{name}|")
            }
