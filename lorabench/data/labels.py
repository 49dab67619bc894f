"""Classification: the prompt is the text, the completion its label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorabench.config import ConfigErrors, DataConfig, and_more, did_you_mean, parts
from lorabench.data.examples import Example
from lorabench.data.hashes import combined
from lorabench.data.splits import load
from lorabench.data.templates import SPLITS
from lorabench.data.tokens import AT_ONCE, Encoded, Kept, Tokens

_KNOWN: dict[str, list[str]] = {}


def labels_of(cfg: DataConfig, content: str) -> list[str]:
    """The classes in the order of their numbers: `data.labels`, or train's completions, sorted.

    Args:
        content: `content_hash(cfg)`; the data are read once for all runs that share it.
    Raises:
        ConfigErrors: fewer than two, or a completion of any set that is none of them.
    """
    if (known := _KNOWN.get(repr((cfg, content)))) is not None:
        return known
    examples = load(cfg)
    found = sorted({example.completion for example in examples.train})
    labels = found if cfg.labels is None else list(cfg.labels)
    if len(labels) < 2:
        raise ConfigErrors(
            f"data.labels: must be at least two; every example of data.train has "
            f"{labels[0]!r}; give other data, or all labels as data.labels=[...]"
        )
    errors = []
    sets = {split: getattr(examples, split) for split in SPLITS} | {
        parts.key_of(name): named for name, named in examples.named.items()
    }
    for split, chosen in sets.items():
        unknown = [e for e in chosen if e.completion not in labels]
        if unknown:
            prompts = and_more(f"{example.prompt!r:.60}" for example in unknown)
            shown = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
            errors.append(
                f"data.{split}: every completion must be one of the {len(labels)} labels "
                f"({shown}); got {did_you_mean(unknown[0].completion, labels)} for the prompt "
                f"{prompts}; fix the label or add it to data.labels"
            )
    if errors:
        raise ConfigErrors(errors)
    # Keyed by what was read: another hash than `content` if the data have changed since.
    _KNOWN[repr((cfg, combined(examples.hashes)))] = labels
    return labels


def classify(
    examples: Sequence[Example], tokenizer: Any, cfg: DataConfig, labels: list[str]
) -> Tokens:
    """Prompt ids with the tokenizer's own special tokens, and the number of each label.

    What is longer than `max_length` is left out and counted, never cut.

    Raises:
        ConfigErrors: a prompt of no tokens, no example that fits.
    """
    kept = Kept(cfg, tokenizer.bos_token_id)
    number = {label: place for place, label in enumerate(labels)}
    label_ids = []
    for start in range(0, len(examples), AT_ONCE):
        some = [examples[i] for i in range(start, min(start + AT_ONCE, len(examples)))]
        encoded = tokenizer(
            [example.prompt for example in some],
            add_special_tokens=True,
            return_attention_mask=False,
            verbose=False,  # of long texts: they are counted here
        )["input_ids"]
        for index, (example, ids) in enumerate(zip(some, encoded, strict=True), start):
            if not ids:
                raise ConfigErrors(
                    f"data.prompt: must give at least one token to classify; got none for "
                    f"{example.prompt!r}; give a text, or leave the example out"
                )
            # The completion is no text: an empty span behind the prompt.
            if kept.add(index, example, Encoded(ids, [len(ids), len(ids)])):
                label_ids.append(number[example.completion])
    return replace(kept.tokens(len(examples)), labels=labels, label_ids=label_ids)
