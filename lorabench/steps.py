"""`trainer.epochs` and `trainer.warmup_ratio` as numbers of steps.

Only the training examples tell how many steps an epoch has. Whatever reads a config after planning
finds `steps` and `warmup_steps` set and the other two null, so that two spellings are one run.
"""

from __future__ import annotations

import dataclasses
import json
import math

from lorabench import data
from lorabench import model as base_model
from lorabench.config import Config, ConfigErrors, range_errors, steps_of_epochs


class Steps:
    """Counts training examples, once per data set and tokenizer of a command."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def resolved(self, config: Config) -> Config:
        """Return the config with epochs and warm-up ratio turned into steps.

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
        if trainer is config.trainer:
            return config
        found = dataclasses.replace(config, trainer=trainer)
        if errors := range_errors(found):
            raise ConfigErrors(errors)
        return found

    def _num_examples(self, config: Config) -> int:
        """Training examples that fit `data.max_length`, as a worker will read them."""
        key = json.dumps(
            [config.task, dataclasses.asdict(config.model), dataclasses.asdict(config.data)]
        )
        if key not in self._counts:
            contents = base_model.identity(config.model) | data.content_hashes(config.data)
            tokenizer = base_model.tokenizer_verified(config.model, contents)
            examples = data.load(config.data)
            if config.task == "seq_cls":
                labels = data.labels_of(config.data, contents["train"])
                tokens = data.classify(examples.train, tokenizer, config.data, labels)
            else:
                chats = config.data.format in data.CONVERSATIONS
                stops = base_model.stops(config.model) if chats else ()
                tokens = data.tokenise(examples.train, tokenizer, config.data, stops)
            self._counts[key] = len(tokens)
        return self._counts[key]
