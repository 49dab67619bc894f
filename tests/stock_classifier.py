"""Stock PEFT's side of task=seq_cls: AutoModelForSequenceClassification, SEQ_CLS, torch's AdamW."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as t
from conftest import stock_state
from equality import differences
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from stock import OnRows, copy_of, decay_groups
from torch import Tensor, nn

from lorabench import adapters, data, plan
from lorabench import model as base_model
from lorabench.config import Config, lora_alpha
from lorabench.pack import ModulePack, StackedPack
from lorabench.train import train

LABELS = ["a", "b", "c"]


def words_of(model: Path | str, texts: Path) -> list[str]:
    """The part of a command line that all runs here share."""
    return [
        "tracker=none", "task=seq_cls", "head=full", "data=jsonl", f"data.train.path={texts}",
        "data.metric=[nll,accuracy]", "data.max_length=24", "data.test_fraction=0.2",
        "model=local", f"model.path={model}",
    ]  # fmt: skip


# --- theirs ----------------------------------------------------------------------------------


@cache
def tokenizer_at(location: str) -> Any:
    return t.AutoTokenizer.from_pretrained(location)


def stock_model(config: Config) -> Any:
    """What a user of transformers loads: the head is random, another one in every process."""
    torch.manual_seed(random.randrange(10**6))
    model = t.AutoModelForSequenceClassification.from_pretrained(
        base_model.location(config.model),
        num_labels=len(LABELS),
        dtype=getattr(torch, base_model.settled(config).model.dtype),
    )
    model.config.pad_token_id = tokenizer_at(base_model.location(config.model)).pad_token_id
    return model


class Stock:
    """One run as a user of PEFT writes it by hand, with the tokenizer's own padding and mask."""

    def __init__(self, config: Config, initial: dict[str, Tensor], planner: plan.Planner):
        self.config = config
        lora = config.lora
        settings = LoraConfig(
            task_type="SEQ_CLS",
            r=lora.r,
            lora_alpha=lora_alpha(lora),  # type: ignore[arg-type]
            lora_dropout=lora.lora_dropout,
            use_rslora=lora.use_rslora,
            target_modules=planner.make(config).lora_modules,
            bias=lora.bias,  # type: ignore[arg-type]
        )
        self.wrapped = get_peft_model(stock_model(config), settings)
        assert not set_peft_model_state_dict(self.wrapped, dict(initial)).unexpected_keys
        self.wrapped.eval()  # the base's own dropouts are off, as in lorabench
        self.clock = adapters.Clock([config.seeds.dropout])
        self.clock.training = True
        adapters.key_dropout(self.wrapped, self.clock)
        for layer in adapters.lora_layers(self.wrapped).values():
            keyed: Any = layer.lora_dropout["default"]
            if isinstance(keyed, adapters.KeyedDropout):
                layer.lora_dropout["default"] = OnRows(keyed, lambda: self.real)
        self.parameters = [p for p in self.wrapped.parameters() if p.requires_grad]
        self.tokenizer = tokenizer_at(base_model.location(config.model))
        self.examples = data.load(config.data).train

    def state(self) -> dict[str, Tensor]:
        return stock_state(self.wrapped)

    def train(self, length: int, padding_side: str = "right") -> list[float]:
        trainer = self.config.trainer
        optimizer = torch.optim.AdamW(
            decay_groups(self.wrapped, trainer.weight_decay), lr=trainer.lr
        )
        scheduler = t.get_scheduler(trainer.schedule, optimizer, 0, trainer.steps)
        losses = []
        order = data.order(
            len(self.examples), trainer.batch_size, self.config.seeds.data, trainer.steps
        )
        micro = trainer.micro_batch_size or trainer.batch_size
        for step, indices in enumerate(order):
            optimizer.zero_grad()
            total = 0.0
            for micro_step, first in enumerate(range(0, len(indices), micro)):
                self.clock.at(step, micro_step)
                chosen = [self.examples[i] for i in indices[first : first + micro]]
                batch = self.tokenizer(
                    [example.prompt for example in chosen],
                    padding="max_length", max_length=length, return_tensors="pt",
                    padding_side=padding_side,
                )  # fmt: skip
                self.real = batch["attention_mask"].bool()
                assert not self.real.all(), "there is padding to get wrong"
                labels = torch.tensor([LABELS.index(example.completion) for example in chosen])
                loss = nn.functional.cross_entropy(
                    self.wrapped(**batch).logits, labels, reduction="sum"
                )
                (loss / len(indices)).backward()
                total += loss.item() / len(indices)
            losses.append(total)
            if trainer.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters, trainer.max_grad_norm)
            optimizer.step()
            scheduler.step()
        return losses


# --- ours ------------------------------------------------------------------------------------


def make_pack(
    configs: list[Config], solo: bool = False, planner: plan.Planner | None = None
) -> ModulePack | StackedPack:
    planner = planner or plan.Planner()
    plans = [planner.make(config) for config in configs]
    assert [one.alone for one in plans] == [None] * len(plans)
    assert [one.labels for one in plans] == [LABELS] * len(plans)
    base = base_model.load(configs[0].model, "cpu", len(LABELS))
    modules = [one.lora_modules for one in plans]
    if solo:
        return ModulePack(base, configs[0], modules[0], "cpu")
    skeleton = planner.skeleton(configs[0].model, len(LABELS))
    return StackedPack(base, skeleton, configs, modules, "cpu")


def compare_training(
    configs: list[Config], solo: bool = False, padding_side: str = "right"
) -> None:
    """Losses and trained weights of every run, against a run of its own by stock PEFT."""
    planner = plan.Planner()
    pack = make_pack(configs, solo, planner)
    initial = [copy_of(pack.adapter_state(run)) for run in range(pack.size)]
    tokenizer = base_model.tokenizer(configs[0].model)
    tokens = data.classify(data.load(configs[0].data).train, tokenizer, configs[0].data, LABELS)
    length = max(map(len, tokens.input_ids)) + 3
    steps = train(pack, tokens, data.pad_id(tokenizer))
    losses = list(zip(*(step.loss for step in steps), strict=True))
    stocks = (Stock(*pair, planner) for pair in zip(configs, initial, strict=True))
    trained = ((stock, stock.train(length, padding_side)) for stock in stocks)
    loss, (weights, name) = differences(pack, initial, losses, trained)
    # Float64 rounding (1e-16) of sums in another order, grown by AdamW's steps.
    assert loss < 1e-10
    assert weights < 1e-9, name
