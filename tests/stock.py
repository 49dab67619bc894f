"""The two sides of packed = solo: packs of several runs, and each run by stock PEFT.

Stock PEFT is `get_peft_model` on a freshly loaded base and a hand-written loop, never another pack.
BERT is a decoder here, with a bias on its head; stock_classifier.py has the encoder.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from conftest import composed, stock_state
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

from lorabench import adapters, data, plan
from lorabench import model as base_model
from lorabench.config import Config, ModelConfig, lora_alpha
from lorabench.pack import ModulePack, StackedPack
from lorabench.train import train

TINY = ["tracker=none", "data.num_train=64", "data.num_validation=8", "data.num_test=8"]

OTHER_TRAINER = [
    "trainer.lr=2e-3",
    "trainer.weight_decay=0.1",
    "trainer.beta2=0.99",
    "trainer.max_grad_norm=null",
    "trainer.warmup_steps=3",
]
# Runs of one pack, mixed in everything a run has for itself.
MIXED = [
    ["lora.r=4", "head=exclude", "target_modules=all-linear"],
    ["lora.r=16", "head=lora", "target_modules=attention", "lora.use_rslora=true"],
    ["lora.r=64", "head=full", "target_modules=mlp", "lora.alpha_ratio=0.5", *OTHER_TRAINER],
    [
        "lora.r=8",
        "head=lora",
        "target_modules=custom",
        "target_modules.names=[{one},{two}]",
        "lora.rank_pattern={{{one}:12}}",
        "lora.alpha_pattern={{{two}:5}}",
        "trainer.schedule=constant",
    ],
]
NAMES = {"gpt2": ("c_attn", "c_fc"), "bert": ("query", "value")}
BIASES = {  # of the models that have some, run by run
    "qwen2": ["none", "lora_only", "none", "all"],
    "gpt2": ["all", "none", "lora_only", "all"],
    "bert": ["none", "none", "lora_only", "none"],
    # Not the keys': softmax undoes a bias of all keys, and its gradient is rounding alone.
    "opt": ["none", "none", "lora_only", "none"],
}


def mixture(kind: str, folder: Path, dropout: float, *common: str) -> list[Config]:
    """Four runs of different r, alpha, targets, head, bias and optimizer on one base.

    Runs that train a bias have weight decay, which must not reach it.

    Without dropout all see the same batch; with it each has its own data and half have none.
    """
    one, two = NAMES.get(kind, ("q_proj", "v_proj"))
    biases = BIASES.get(kind, ["none"] * len(MIXED))
    return [
        composed(
            *TINY,
            *common,
            "model=local",
            f"model.path={folder}",
            *(["model.attn_implementation=eager"] if kind == "gemma2" else []),
            *(["trainer.weight_decay=0.2"] if bias != "none" else []),
            *(w.format(one=one, two=two) for w in words),
            f"lora.bias={bias}",
            f"lora.lora_dropout={dropout if i % 2 else 0}",
            f"seeds.init={i}",
            f"seeds.dropout={i}",
            f"seeds.data={i if dropout else 0}",
        )
        for i, (words, bias) in enumerate(zip(MIXED, biases, strict=True))
    ]


# --- ours ------------------------------------------------------------------------------------


def packed(
    configs: list[Config],
    device: str = "cpu",
    planner: plan.Planner | None = None,
    compiled: bool = False,
) -> StackedPack:
    assert len(configs) > 1, "every case has a pack size above one"
    planner = planner or plan.Planner()
    plans = [planner.make(config) for config in configs]
    assert [one.alone for one in plans] == [None] * len(plans)
    base = base_model.load(configs[0].model, device)
    modules = [one.lora_modules for one in plans]
    skeleton = planner.skeleton(configs[0].model)
    return StackedPack(base, skeleton, configs, modules, device, compiled=compiled)


def copy_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def gradients(pack: StackedPack, run: int) -> dict[str, Tensor]:
    """A run's gradients under the names of its saved adapter."""
    return {place.state_name: pack._view(run, place, "grad") for place in pack.places[run]}


@cache
def embedded_tokenizer() -> Any:
    return base_model.tokenizer(ModelConfig(path="lorabench:tiny-gemma"))


def tokens_of(config: Config) -> tuple[data.Tokens, int]:
    # The embedded tokenizer for every architecture: AutoTokenizer rebuilds some classes by type.
    tokenizer = embedded_tokenizer()
    tokens = data.tokenise(data.load(config.data).train, tokenizer, config.data)
    return tokens, data.pad_id(tokenizer)


def train_pack(pack: ModulePack | StackedPack) -> list[list[float]]:
    """Losses, one list a run."""
    tokens, pad_id = tokens_of(pack.configs[0])
    return list(zip(*(step.loss for step in train(pack, tokens, pad_id)), strict=True))


# --- theirs ----------------------------------------------------------------------------------


def decayed(wrapped: nn.Module) -> set[int]:
    """Ids of the parameters that the HF Trainer decays, by its own choice."""
    from transformers import Trainer

    names = Trainer.get_decay_parameter_names(None, wrapped)  # type: ignore[arg-type]
    return {id(wrapped.get_parameter(name)) for name in names}


def decay_groups(wrapped: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The groups of `Trainer.create_optimizer`."""
    trained, decay = [p for p in wrapped.parameters() if p.requires_grad], decayed(wrapped)
    return [
        {"params": [p for p in trained if id(p) in decay], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in decay], "weight_decay": 0.0},
    ]


class OnRows(nn.Module):
    """A keyed dropout that draws for the rows lorabench computes, and leaves the others alone.

    lorabench draws nothing for padding, and hands the head only rows that predict a completion
    token; stock PEFT computes them all, and the others carry no loss.

    Args:
        rows: called for the rows drawn for, (B, T).
    """

    def __init__(self, keyed: adapters.KeyedDropout, rows: Callable[[], Tensor]):
        super().__init__()
        self.keyed, self.rows = keyed, rows

    def forward(self, x: Tensor) -> Tensor:
        there_BT = self.rows()
        if x.shape[:-1] != there_BT.shape:  # behind a pooler: a row an example
            return x * self.keyed.mask(x.shape).to(x.dtype)
        mask_ND = self.keyed.mask(torch.Size((int(there_BT.sum()), x.shape[-1])))
        spread_BTD = torch.ones_like(x)
        spread_BTD[there_BT] = mask_ND.to(x.dtype)
        return x * spread_BTD


class Stock:
    """One run as a user of PEFT writes it by hand."""

    def __init__(
        self,
        config: Config,
        initial: dict[str, Tensor],
        device: str = "cpu",
        planner: plan.Planner | None = None,
    ):
        from transformers import AutoModelForCausalLM

        self.config, self.device = config, device
        model: Any = AutoModelForCausalLM.from_pretrained(
            base_model.location(config.model),
            dtype=getattr(torch, base_model.settled(config).model.dtype),
            attn_implementation=config.model.attn_implementation,
        ).to(device)
        lora, planned = config.lora, (planner or plan.Planner()).make(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tied layers
            self.wrapped = get_peft_model(
                model,
                LoraConfig(
                    task_type="CAUSAL_LM",
                    r=lora.r,
                    lora_alpha=lora_alpha(lora),  # type: ignore[arg-type]
                    lora_dropout=lora.lora_dropout,
                    use_rslora=lora.use_rslora,
                    use_dora=lora.use_dora,
                    rank_pattern=dict(lora.rank_pattern or {}),
                    alpha_pattern=dict(lora.alpha_pattern or {}),
                    target_modules=planned.lora_modules,
                    modules_to_save=planned.saved_modules or None,
                    bias=lora.bias,  # type: ignore[arg-type]
                ),
            )
        self.load(initial)
        self.wrapped.eval()  # the base's own dropouts (GPT-2) are off, as in lorabench
        self.clock = adapters.Clock([config.seeds.dropout], device)
        self.clock.training = True
        adapters.key_dropout(self.wrapped, self.clock)
        self._key_dropout()
        self.parameters = {
            name.replace(".modules_to_save.default", "").replace(".default", ""): p
            for name, p in self.wrapped.named_parameters()
            if p.requires_grad
        }
        tokens, self.pad_id = tokens_of(config)
        self.tokens = tokens
        self.length = max(map(len, tokens.input_ids))
        trainer = config.trainer
        self.order = list(
            data.order(len(tokens), trainer.batch_size, config.seeds.data, trainer.steps)
        )

    def _key_dropout(self) -> None:
        """Lay each mask on the rows it is drawn for."""
        head, _ = base_model.output_head(self.wrapped.get_base_model()) or ("", None)
        for name, layer in adapters.lora_layers(self.wrapped).items():
            keyed: Any = layer.lora_dropout["default"]
            if isinstance(keyed, adapters.KeyedDropout):
                rows = self._predicting if name == head else lambda: self.real
                layer.lora_dropout["default"] = OnRows(keyed, rows)

    def _predicting(self) -> Tensor:
        found = torch.zeros_like(self.real)
        found[:, :-1] = self.labels[:, 1:] != data.IGNORED
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = set_peft_model_state_dict(self.wrapped, dict(state))  # 0.19 takes keys out
        assert not result.unexpected_keys

    def state(self) -> dict[str, Tensor]:
        return stock_state(self.wrapped)

    def loss(self, step: int) -> float:
        """Mean nll of the step's batch; its gradient is left in the parameters."""
        ids, labels = data.batch(self.tokens, self.order[step], self.length, self.pad_id)
        input_ids, targets = (torch.from_numpy(x).to(self.device) for x in (ids, labels))
        lengths = torch.tensor([len(self.tokens.input_ids[i]) for i in self.order[step]])
        real = (torch.arange(self.length) < lengths[:, None]).to(self.device)
        for parameter in self.parameters.values():
            parameter.grad = None
        micro = self.config.trainer.micro_batch_size or len(ids)
        count, total = int((targets != -100).sum()), 0.0
        for micro_step, first in enumerate(range(0, len(ids), micro)):
            self.clock.at(step, micro_step)
            rows = slice(first, first + micro)
            self.labels, self.real = targets[rows], real[rows]
            # The model's own loss upcasts to float32: spelt out, in the dtype of the model.
            logits = self.wrapped(input_ids=input_ids[rows]).logits[:, :-1]
            logits = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
            nll = nn.functional.cross_entropy(
                logits.flatten(0, 1), targets[rows, 1:].flatten(), reduction="sum"
            )
            (nll / count).backward()
            total += nll.item() / count
        return total

    def gradients(self, step: int) -> dict[str, Tensor]:
        self.loss(step)
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def optimizer(self) -> torch.optim.Optimizer:
        """torch's AdamW in the groups of the HF Trainer, or of PEFT's LoRA+."""
        trainer, ratio = self.config.trainer, self.config.lora.loraplus_lr_ratio
        betas, eps = (trainer.beta1, trainer.beta2), trainer.eps
        if ratio is None:
            groups = decay_groups(self.wrapped, trainer.weight_decay)
            return torch.optim.AdamW(groups, lr=trainer.lr, betas=betas, eps=eps)
        optimizer = create_loraplus_optimizer(
            self.wrapped,
            torch.optim.AdamW,
            lr=trainer.lr,
            loraplus_lr_ratio=ratio,
            loraplus_weight_decay=trainer.weight_decay,
            betas=betas,
            eps=eps,
        )
        group_a, embedding, *_ = optimizer.param_groups
        inside = {id(p) for n, p in self.parameters.items() if "lora_embedding_" in n}
        if not embedding["params"]:  # PEFT 0.19 looks for their layer under the parameter's name
            embedding["params"] = [p for p in group_a["params"] if id(p) in inside]
            group_a["params"] = [p for p in group_a["params"] if id(p) not in inside]
        assert {id(p) for p in embedding["params"]} == inside
        return optimizer

    def train(self) -> list[float]:
        from transformers import get_scheduler

        trainer, parameters = self.config.trainer, list(self.parameters.values())
        optimizer = self.optimizer()
        constant = trainer.schedule == "constant"
        schedule = "constant_with_warmup" if constant else trainer.schedule
        scheduler = get_scheduler(schedule, optimizer, trainer.warmup_steps, trainer.steps)
        losses = []
        for step in range(trainer.steps):
            losses.append(self.loss(step))
            if trainer.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, trainer.max_grad_norm)
            optimizer.step()
            scheduler.step()
        return losses
