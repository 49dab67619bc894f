"""The pack of one on PEFT's own modules: whatever PEFT can train, this can.

Letters: R runs in the pack (here 1), B batch, T tokens, N rows that carry a loss, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lorabench import adapters
from lorabench import model as base_model
from lorabench.config import Config
from lorabench.pack import probe
from lorabench.pack.batch import Batch, Laid
from lorabench.pack.classes import ClassHead
from lorabench.pack.head import RowHead
from lorabench.pack.rows import Spans


def autocast(config: Config, device: str) -> AbstractContextManager[Any]:
    """The precision of the computation."""
    if config.trainer.dtype == "bfloat16":
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def without_generation_config(tree: Any) -> Iterator[None]:
    """Hide the base's generation_config.json from generate().

    It fills every setting from there that its caller leaves unset (repetition_penalty, min_length,
    ...), also those of a generation_config that is passed.
    """
    theirs, tree.generation_config = tree.generation_config, GenerationConfig()
    try:
        yield
    finally:
        tree.generation_config = theirs


def enable_checkpointing(tree: Any) -> None:
    """Recompute each layer's activations in the backward pass."""
    enable = getattr(  # its name since transformers 5.23
        tree, "activation_checkpointing_enable", tree.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})


def make_head(
    tree: Any, clock: adapters.Clock, config: Config, spans: Spans
) -> RowHead | ClassHead:
    """What turns the body's result into losses, by task."""
    if config.task == "seq_cls":
        return ClassHead(tree, spans)
    return RowHead(tree, clock, spans, recomputed=config.trainer.gradient_checkpointing)


class ModulePack:
    """One run, injected by PEFT."""

    def __init__(self, base: PreTrainedModel, config: Config, modules: list[str], device: str):
        self.configs, self.device = [config], device
        self.wrapped = self._attach(base, modules)
        self.initial: dict[str, Tensor] | None = None
        if config.lora.init in adapters.CHANGES_BASE:
            state = adapters.adapter_state(self.wrapped)
            self.initial = {name: tensor.detach().clone() for name, tensor in state.items()}
        self.clock = adapters.Clock([config.seeds.dropout], device)
        adapters.key_dropout(self.wrapped, self.clock)
        self.parameters = adapters.trainable(self.wrapped)
        self._owners = {name: adapters.owner(name) for name in self.parameters}
        self.decayed = adapters.decayed(self.wrapped)
        self.lr_factors = adapters.lr_factors(self.parameters, config)
        self.alive = [True]
        self.tree = cast(Any, self.wrapped.get_base_model())
        self.tree.train()  # base dropouts are zero; checkpointing asks for training mode
        if config.trainer.gradient_checkpointing:
            enable_checkpointing(self.tree)
        self._lay_out(base)
        trainer = config.trainer
        self.optimizer = torch.optim.AdamW(
            self._groups(dict.fromkeys(self._owners.values(), 1.0)),
            lr=trainer.lr,
            betas=(trainer.beta1, trainer.beta2),
            eps=trainer.eps,
            fused=device != "mps",
        )

    def _attach(self, base: PreTrainedModel, modules: list[str]) -> PeftModel:
        return adapters.attach(base, self.configs[0], modules)

    @classmethod
    def of_saved(
        cls, base: PreTrainedModel, config: Config, folder: Path, device: str
    ) -> ModulePack:
        """Put a saved adapter on its base by plain PEFT, to be scored; it cannot train further."""
        wrapped = adapters.reload(base, folder)
        pack = cls._to_score(base, wrapped.get_base_model(), config, device)
        pack.wrapped, pack.initial = wrapped, None
        return pack

    @classmethod
    def of_base(cls, base: PreTrainedModel, config: Config, device: str) -> ModulePack:
        """Return the base without any adapter, to be scored as runs are; the base is left alone."""
        return cls._to_score(base, base_model.share(base), config, device)

    @classmethod
    def _to_score(cls, base: PreTrainedModel, tree: Any, config: Config, device: str) -> ModulePack:
        pack = cls.__new__(cls)
        pack.configs, pack.device, pack.alive = [config], device, [True]
        pack.clock = adapters.Clock([config.seeds.dropout], device)
        pack.tree = tree
        pack._lay_out(base)
        return pack

    def _lay_out(self, base: PreTrainedModel) -> None:
        self.end_to_end = probe.suits(base)
        self.head = make_head(self.tree, self.clock, self.configs[0], Spans(1))

    def lay(self, batch: Batch) -> Laid:
        """A batch as this pack takes it, on the device: can be made while it computes another."""
        return Laid(batch, self.end_to_end, "input", self.device)

    @property
    def size(self) -> int:
        return 1

    def owners(self, run: int) -> dict[str, str]:
        """The module of everything the run trains, by the name of the parameter."""
        return self._owners

    def trainable(self, run: int) -> set[str]:
        """What a step would move now: any parameter, the base's too, that takes a gradient."""
        return {name for name, p in self.wrapped.named_parameters() if p.requires_grad}

    def train_only(self, lr_scales: Sequence[dict[str, float]]) -> None:
        """Freeze every module that is not here; the others train at this part of the run's rate.

        Frozen parameters are in no group and get no gradient; their optimizer state stays.
        """
        (lr_scale,) = lr_scales
        for name, parameter in self.parameters.items():  # never a module: that thaws its base
            parameter.requires_grad_(self._owners[name] in lr_scale)
        self.optimizer.param_groups.clear()
        for group in self._groups(lr_scale):
            self.optimizer.add_param_group(group)

    def _groups(self, lr_scale: dict[str, float]) -> list[dict[str, Any]]:
        """The optimizer's groups: what trains, by its part of the rate and whether it decays."""
        found: dict[tuple[float, bool], list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            if self._owners[name] in lr_scale:
                scale = lr_scale[self._owners[name]] * self.lr_factors[name]
                key = scale, name in self.decayed
                found.setdefault(key, []).append(parameter)
        decay = self.configs[0].trainer.weight_decay
        return [
            {"params": parameters, "lr_scale": scale, "weight_decay": decay if decays else 0.0}
            for (scale, decays), parameters in found.items()
        ]

    def modules(self, run: int) -> list[str]:
        """Modules the run trains."""
        return list(dict.fromkeys(self._owners.values()))

    def forward_backward(
        self, step: int, micro_step: int, batch: Batch | Laid, num_targets: list[int]
    ) -> Tensor:
        """Add this micro-batch's gradient of (summed nll / num_targets); return that loss, (R,).

        Args:
            num_targets: labelled tokens of the whole batch, so that micro-batches weigh as in one.
        """
        laid = batch if isinstance(batch, Laid) else self.lay(batch)
        self.clock.at(step, micro_step)
        self.clock.numbers_RN, self.clock.training = laid.numbers_RN, True
        try:
            with laid.attention(self.tree):
                with autocast(self.configs[0], self.device):
                    loss_1 = self.head.loss(self.head.hidden(laid), laid, num_targets)
                loss_1.sum().backward()
        finally:
            self.clock.training = False
        return loss_1.detach()

    def update(self, lr: list[float]) -> Tensor:
        """Clip, take one AdamW step, clear the gradients; return the norm before clipping, (R,)."""
        limit = self.configs[0].trainer.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), float("inf") if limit is None else limit, foreach=True
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr[0] * group["lr_scale"]
        if self.alive[0]:
            self._step(norm)
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()[None]

    def _step(self, norm: Tensor) -> None:
        """Move the run if its gradient is finite."""
        optimizer: Any = self.optimizer
        if optimizer.defaults["fused"]:  # the kernel reads it on the device, as for a GradScaler
            optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).to(torch.float32)
            optimizer.step()
        elif norm.isfinite():
            optimizer.step()

    def stop(self, run: int) -> None:
        """The run keeps its weights and no longer moves."""
        self.alive[run] = False

    @torch.no_grad()
    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Teacher-forced nll and argmax of every row, (R, N) each."""
        laid = self.lay(batch)
        with laid.attention(self.tree), autocast(self.configs[0], self.device):
            (nll,), (best,) = self.head.scored(self.head.hidden(laid), laid)
            return nll, best

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Logits of every row, (R, N, V)."""
        laid = self.lay(batch)
        with laid.attention(self.tree), autocast(self.configs[0], self.device):
            (logits,) = self.head.logits(self.head.hidden(laid), laid)
            return logits

    @torch.no_grad()
    def generate(self, input_ids_BL: Tensor, mask_BL: Tensor, **settings: Any) -> Tensor:
        """Greedy continuations, (R, B, L')."""
        self.tree.eval()
        try:
            with autocast(self.configs[0], self.device), without_generation_config(self.tree):
                written = self.tree.generate(
                    input_ids=input_ids_BL, attention_mask=mask_BL, **settings
                )
        finally:
            self.tree.train()
        return written[None]

    def adapter_state(self, run: int) -> dict[str, Tensor]:
        """What a saved adapter holds, under PEFT's names."""
        return self._saved()[0]

    def _saved(self) -> tuple[dict[str, Tensor], Any]:
        state = adapters.adapter_state(self.wrapped)
        settings: Any = self.wrapped.peft_config[adapters.ADAPTER]
        if self.initial is None:
            return state, settings
        return adapters.as_plain_lora(state, self.initial, settings)

    def settings(self, run: int) -> Any:
        """PEFT's own config of the run."""
        return self._saved()[1]

    def fingerprint(self, run: int) -> list[Any]:
        """Names and shapes of what the run trains."""
        return [[name, list(p.shape)] for name, p in self.parameters.items()]

    def state(self, run: int) -> dict[str, Tensor]:
        """Trained parameters and optimizer moments, by name."""
        found = dict(self.parameters)
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                found[f"{name}|{key}"] = value
        return {name: tensor.detach() for name, tensor in found.items()}

    @torch.no_grad()
    def load_state(self, run: int, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])
            self.optimizer.state[parameter] = {
                key.partition("|")[2]: value.to(parameter.device)
                for key, value in state.items()
                if key.startswith(f"{name}|")
            }
