"""What runs of one base share: its weights, tokenizer and tokenised data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorabench import data
from lorabench import model as base_model
from lorabench.config import Config
from lorabench.sweep import Job, Mistakes


@dataclass
class Shared:
    """The base, its tokenizer and the tokenised data of the last runs, kept for the next."""

    bases: dict[str, tuple[Any, str]] = field(default_factory=dict)  # model, checksum
    tokenizers: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, tuple[dict[str, data.Tokens], list[str]]] = field(default_factory=dict)

    def base(self, config: Config, device: str, classes: int = 0) -> tuple[Any, str]:
        key = repr((config.model, device, classes))
        if key not in self.bases:
            self.bases.clear()  # one frozen base at a time
            loaded = base_model.load(config.model, device, classes)
            self.bases[key] = (loaded, base_model.checksum(loaded))
        return self.bases[key]

    def tokenizer(self, config: Config) -> Any:
        key = repr((config.model.path, config.model.revision))
        if key not in self.tokenizers:
            self.tokenizers[key] = base_model.tokenizer(config.model)
        return self.tokenizers[key]

    def splits(
        self, config: Config, labels: list[str] | None = None
    ) -> tuple[dict[str, data.Tokens], list[str]]:
        """The tokenised splits, and what is to be said about them.

        Args:
            labels: of a classification.
        """
        key = _data_key(config, labels)
        if key not in self.tokens:
            self.tokens.clear()
            tokenizer = self.tokenizer(config)
            examples = data.load(config.data)
            found, notes = {}, list(examples.notes)
            for split in ("train", "validation", "test"):
                wanted = getattr(examples, split)
                tokens = (
                    data.classify(wanted, tokenizer, config.data, labels)
                    if labels
                    else data.tokenise(wanted, tokenizer, config.data)
                )
                found[split] = tokens
                notes += tokens.notes(split, config.data)
            self.tokens[key] = (found, notes)
        return self.tokens[key]


SHARED = Shared()


def check_data(jobs: list[Job]) -> None:
    """Read and tokenise the examples of all runs; those of the last are kept for it.

    Raises:
        ConfigErrors: nothing to read or too little, nothing that fits `max_length`, of any run.
    """
    alike: dict[str, list[Job]] = {}
    for job in jobs:
        alike.setdefault(_data_key(job.config, job.plan.labels), []).append(job)
    mistakes = Mistakes(len(jobs))
    for group in alike.values():
        with mistakes.of(*(job.label for job in group)):
            SHARED.splits(group[0].config, group[0].plan.labels)
    mistakes.refuse()


def _data_key(config: Config, labels: list[str] | None) -> str:
    return repr((config.model.path, config.model.revision, config.data, labels))
