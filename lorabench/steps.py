"""`trainer.epochs`, `trainer.warmup_ratio` and a stage's `from_epoch` as numbers of steps.

Only the training examples tell how many steps an epoch has. Whatever reads a config after planning
finds `steps`, `warmup_steps` and `from_step` set and the others null or gone, so that two spellings
are one run.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from lorabench import data
from lorabench import model as base_model
from lorabench.base_scores import tokenizer_of
from lorabench.config import Config, ConfigErrors, range_errors, steps_of_epochs


class Steps:
    """Counts training examples, once per data set and tokenizer of a command."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def resolved(self, config: Config) -> Config:
        """Return the config with epochs and warm-up ratio turned into steps.

        A stage begins after as many steps as a run of its `from_epoch` epochs would take.

        Source: transformers' Trainer.set_initial_training_values and
            TrainingArguments.get_warmup_steps.

        Raises:
            ConfigErrors: the data or the tokenizer cannot be read, or a stage begins too late.
        """
        trainer = config.trainer
        if trainer.epochs is not None:
            steps = steps_of_epochs(trainer.epochs, self._num_examples(config), trainer.batch_size)
            trainer = dataclasses.replace(trainer, steps=steps, epochs=None)
        if trainer.warmup_ratio is not None:
            warmup = math.ceil(trainer.num_steps * trainer.warmup_ratio)
            trainer = dataclasses.replace(trainer, warmup_steps=warmup, warmup_ratio=None)
        stages = [self._begun(entry, config) for entry in config.stages]
        if trainer is config.trainer and stages == config.stages:
            return config
        found = dataclasses.replace(config, trainer=trainer, stages=stages)
        if errors := range_errors(found):
            raise ConfigErrors([_by_epoch(error, config) for error in errors])
        return found

    def _begun(self, entry: dict[str, Any], config: Config) -> dict[str, Any]:
        """An entry of `stages` that begins at a step."""
        if entry.get("from_epoch") is None:
            return {key: value for key, value in entry.items() if key != "from_epoch"}
        size, num = config.trainer.batch_size, self._num_examples(config)
        step = steps_of_epochs(entry["from_epoch"], num, size)
        return {"from_step": step} | {k: v for k, v in entry.items() if not k.startswith("from_")}

    def _num_examples(self, config: Config) -> int:
        """Training examples that fit `data.max_length`, as a worker will read them."""
        key = json.dumps(
            [config.task, dataclasses.asdict(config.model), dataclasses.asdict(config.data)]
        )
        if key not in self._counts:
            contents = base_model.identity(config.model) | data.content_hashes(config.data)
            tokenizer = base_model.tokenizer_verified(config.model, contents)
            examples = data.load(config.data)
            labels, stops = None, list[int]()
            if config.task == "seq_cls":
                labels = data.labels_of(config.data, contents["train"])
            elif config.data.format in data.CONVERSATIONS:
                stops = list(base_model.stops(config.model))
            tokens = data.tokenise_once(
                examples.train, tokenizer, config.data, contents["train"], tokenizer_of(contents),
                stops, labels,
            )  # fmt: skip
            self._counts[key] = len(tokens)
        return self._counts[key]


def _by_epoch(error: str, config: Config) -> str:
    """An error about a stage's first step, with the epoch that this step comes from."""
    for i, entry in enumerate(config.stages):
        epoch = entry.get("from_epoch")
        if epoch is not None and error.startswith(f"stages[{i}].from_step:"):
            return f"{error} (from_epoch={epoch:g})"
    return error
