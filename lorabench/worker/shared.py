"""What the packs of a command share: the frozen base, its tokenizer, and the tokenised data.

Created by the command and handed down to whoever needs it. Everything is keyed by content, checked
against the plan when it is read, and dropped as soon as no pack needs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorabench import data, identity
from lorabench import model as base_model
from lorabench.base_scores import tokenizer_of
from lorabench.config import ConfigErrors, parts
from lorabench.lengths import Lengths, lengths_of
from lorabench.plan import Planner
from lorabench.sweep import Job, Mistakes


@dataclass
class Dataset:
    """The tokens of each split, and what a reader of the results should know about them."""

    tokens: dict[str, data.Tokens]
    notes: list[str]
    # Of a mixture: the source of each tokenised example, by split; a set of its own has none.
    sources: dict[str, list[str]] = field(default_factory=dict)
    template: str | None = None  # the chat template that made them; None: none did


class Shared:
    """One base and one data set at a time, each kept for the packs that follow."""

    def __init__(self, planner: Planner | None = None, words: Sequence[str] = ()):
        self.planner = planner or Planner()
        self.words = list(words)  # of the command, for the records
        self._bases: dict[str, tuple[Any, str]] = {}  # model, checksum
        self._tokenizers: dict[str, Any] = {}
        self._datasets: dict[str, Dataset] = {}
        self._lengths: dict[str, Lengths] = {}  # by what decides them

    def base(self, job: Job, device: str) -> tuple[Any, str]:
        """Return the frozen base of a run and the checksum of its tensors.

        Raises:
            ConfigErrors: its files are not those that the plan has seen.
        """
        key = _base_key(job)
        if key not in self._bases:
            self._bases.clear()
            classes = len(job.plan.labels)
            loaded = base_model.load_verified(job.config.model, device, classes, job.plan.contents)
            self._bases[key] = (loaded, base_model.checksum(loaded))
        return self._bases[key]

    def tokenizer(self, job: Job) -> Any:
        """Return the tokenizer of a run's base.

        Raises:
            ConfigErrors: its files are not those that the plan has seen.
        """
        key = _tokenizer_key(job)
        if key not in self._tokenizers:
            self._tokenizers.clear()
            self._tokenizers[key] = base_model.tokenizer_verified(
                job.config.model, job.plan.contents
            )
        return self._tokenizers[key]

    def dataset(self, job: Job) -> Dataset:
        """Return the tokenised splits of a run.

        Raises:
            ConfigErrors: the data are not those that the plan has seen; nothing to read or too
                little; nothing that fits `max_length`; tokens that the base does not have.
        """
        key = _data_key(job)
        if key not in self._datasets:
            self._datasets.clear()
            self._datasets[key] = self._read(job)
        return self._datasets[key]

    def _read(self, job: Job) -> Dataset:
        settings, labels, planned = job.config.data, job.plan.labels, job.plan.contents
        examples = data.load(settings)
        found = examples.hashes
        changed = [
            f"data.{split}: must still be the data that was planned, {planned[split][:12]}; what "
            f"was read is {hash[:12]}: it was edited in between; repeat the command"
            for split, hash in found.items()
            if hash != planned[split]
        ]
        if changed:
            raise ConfigErrors(changed)
        tokenizer = self.tokenizer(job)
        tokens, sources, notes = {}, {}, list(examples.notes)
        stops = json.loads(planned.get("stops", "[]"))
        views = dict.fromkeys(parts.SPLITS, settings) | data.named_views(settings)
        mistakes = []
        for split, view in views.items():
            chosen = examples.named[split] if split in examples.named else getattr(examples, split)
            key = parts.key_of(split)
            tokens[split] = data.tokenise_once(
                chosen, tokenizer, view, found[key], tokenizer_of(planned), stops, labels
            )
            notes += tokens[split].notes(key, view)
            mistakes.append(tokens[split].error(key, view))
            if settings.mixture and len(chosen) and chosen[0].source:
                every = [example.source for example in chosen]
                sources[split] = [every[index] for index in tokens[split].indices]
        if any(mistakes):
            raise ConfigErrors([mistake for mistake in mistakes if mistake])
        base = self.planner.skeleton(job.config.model, len(labels))
        used = set[int]().union(*(one.input_ids.distinct() for one in tokens.values()))
        base_model.check_tokens(job.config.model, tokenizer, base, used)
        return Dataset(tokens, notes, sources, data.text_used(tokenizer, settings))

    def check_data(self, jobs: list[Job]) -> list[str]:
        """Read and tokenise the examples of all runs; those of the first are kept.

        The plans of the jobs know the lengths of their examples from then on.

        Returns:
            What is to be said about them, each sentence once.
        Raises:
            ConfigErrors: what `dataset` refuses, of any run.
        """
        alike: dict[str, list[Job]] = {}
        for job in jobs:
            alike.setdefault(_data_key(job), []).append(job)
        mistakes, notes = Mistakes(len(jobs)), []
        for group in reversed(alike.values()):  # so that the first one's stay for its training
            with mistakes.of(*(job.label for job in group)):
                notes += self.dataset(group[0]).notes
                for job in group:
                    self._measure(job)
        mistakes.found = dict(reversed(mistakes.found.items()))
        mistakes.refuse()
        return list(dict.fromkeys(notes))

    def _measure(self, job: Job) -> None:
        import numpy as np

        if job.plan.lengths is not None:
            return
        config, padded = job.config, job.plan.padded is not None
        trainer = config.trainer
        decides = [
            _data_key(job), config.seeds.data, config.data.group_by_length, trainer.num_steps,
            trainer.batch_size, trainer.micro_batch_size, trainer.eval_examples,
            trainer.eval_batch_size, padded,
        ]  # fmt: skip
        key = json.dumps(decides)
        if key not in self._lengths:
            tokens = self.dataset(job).tokens
            scored = {
                split: tokens[split].input_ids.lengths[: trainer.eval_examples]
                for split in ("validation", "test")
            }
            sums = {split: int(lengths.sum()) for split, lengths in scored.items()}
            # Scored by length: the longest examples together.
            sums["scored"] = max(
                int(np.sort(lengths)[-trainer.eval_batch_size :].sum())
                for lengths in scored.values()
            )
            found = lengths_of(config, tokens["train"], padded)
            self._lengths[key] = found.model_copy(update=sums)
        job.plan = job.plan.model_copy(update={"lengths": self._lengths[key]})

    def keep_only(self, jobs: Iterable[Job]) -> None:
        """Drop what none of these runs needs."""
        wanted = list(jobs)
        for kept, key_of in (
            (self._bases, _base_key),
            (self._tokenizers, _tokenizer_key),
            (self._datasets, _data_key),
        ):
            needed = {key_of(job) for job in wanted}
            for key in set(kept) - needed:
                del kept[key]  # type: ignore[attr-defined]

    def drop_base(self) -> None:
        """Forget a base that is not what it was."""
        self._bases.clear()


def _base_key(job: Job) -> str:
    model, contents = job.config.model, job.plan.contents
    which = [contents[name] for name in ("hub", "revision", "weights")]
    where = [model.path, model.dtype, model.attn_implementation]
    return json.dumps([which, where, len(job.plan.labels), job.config.trainer.device])


def _tokenizer_key(job: Job) -> str:
    contents = job.plan.contents
    return json.dumps([job.config.model.path, contents["revision"], contents["tokenizer"]])


def _data_key(job: Job) -> str:
    settings, planned = job.config.data, job.plan.contents
    rules = [
        settings.format, settings.chat_template, settings.chat_template_kwargs, settings.add_bos,
        settings.add_eos, settings.max_length, settings.too_long, settings.allow_left_out,
        planned.get("chat_template"), planned.get("stops"),
    ]  # fmt: skip
    splits = ("train", *identity.splits_of(job.config))
    contents = [planned[parts.key_of(split)] for split in splits]
    names = parts.source_names(settings)  # scores are recorded under them
    return json.dumps([_tokenizer_key(job), contents, rules, job.plan.labels, names])
