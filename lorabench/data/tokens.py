"""Prompt and completion as token ids, and the exact place where one ends and the other begins."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lorabench.config import ConfigErrors, DataConfig
from lorabench.data.chat import chat
from lorabench.data.splits import Example


@dataclass
class Tokens:
    """The examples that were kept; a completion runs from its start to the end of its list."""

    input_ids: list[list[int]]
    completion_start: list[int]
    ids: list[str]  # Example.id
    indices: list[int]  # places in the list of examples
    num_too_long: int  # left out: longer than data.max_length tokens
    num_empty: int  # left out: the completion gave no token
    # Of a classification, whose completions are no tokens but labels; else empty:
    labels: list[str] = field(default_factory=list)  # the classes
    label_ids: list[int] = field(default_factory=list)  # place in `labels`, one per example
    # For the notes:
    num_examples: int = 0  # before any was left out
    longest: int = 0  # tokens of the longest example, those left out included
    num_losing_text: int = 0  # kept, but the chat template removes text of the completion
    first_loss: tuple[str, str] | None = None  # such a completion, and what is left of it

    def __len__(self) -> int:
        return len(self.input_ids)

    def notes(self, split: str, cfg: DataConfig) -> list[str]:
        """Return what a user should know about the examples left out or changed, in sentences."""
        found, total = [], self.num_examples
        if self.num_too_long:
            left = total - self.num_too_long - self.num_empty
            found.append(
                f"data.{split}: {left} of {total} examples are left; {self.num_too_long} were left "
                f"out because they are longer than data.max_length={cfg.max_length} tokens; "
                f"data.max_length={self.longest} would keep them all"
            )
        if self.num_empty:
            found.append(
                f"data.{split}: {self.num_empty} of {total} examples were left out because their "
                "completion gives no token; fill it in, or remove them"
            )
        if self.first_loss:
            before, after = (_shortened(text) for text in self.first_loss)
            found.append(
                f"data.{split}: the chat template removes text from {self.num_losing_text} of "
                f"{total} completions, which is not trained on; the first, {before}, becomes "
                f"{after}; to keep all text, set data.chat_template=false and write the turns into "
                "data.prompt"
            )
        return found

    def hash(self) -> str:
        """Return the sha256 of exactly what is trained on.

        Hashed are little-endian int64: the number of examples; of each, the number of its ids and
        the ids; the completion starts; the number of label ids and the label ids.
        """
        digest = hashlib.sha256()
        for numbers in (
            [len(self)],
            *([len(ids), *ids] for ids in self.input_ids),
            self.completion_start,
            [len(self.label_ids), *self.label_ids],
        ):
            digest.update(np.asarray(numbers, dtype="<i8").tobytes())
        return digest.hexdigest()

    def first(self, count: int) -> Tokens:
        """The first examples only."""
        return replace(
            self,
            input_ids=self.input_ids[:count],
            completion_start=self.completion_start[:count],
            ids=self.ids[:count],
            indices=self.indices[:count],
            label_ids=self.label_ids[:count],
        )


def _shortened(text: str, width: int = 60) -> str:
    return repr(text if len(text) <= width else f"{text[: width - 3]}...")


def tokenise(examples: Sequence[Example], tokenizer: Any, cfg: DataConfig) -> Tokens:
    """Return prompt ids + completion ids of every example that fits `max_length`; nothing is cut.

    - Prompt and completion are tokenised apart and joined. Tokenised together, a token may span
      both ("=" and "5" as "=5"): then the boundary is in the middle of a token, and the prompt's
      ids are not those the model gets when it must answer.
    - `add_bos`: one BOS opens the prompt, where the tokenizer itself opens a text with it and the
      prompt does not begin with it already.
    - `add_eos`: one EOS closes the completion.
    - `chat_template`: the prompt is a user turn with the opening of the assistant's; the
      completion is what the full conversation adds to it. BOS is the template's business. With
      `add_eos` the completion ends at the template's EOS, or, where it writes none, gets one.
      Today's date, where the template writes one, is always 26 July 2024.

    Raises:
        ConfigErrors: no EOS, no chat template, a template whose full conversation does not begin
            with the prompt, a prompt of no tokens, no example that fits.
    """
    if cfg.add_eos and tokenizer.eos_token_id is None:
        raise ConfigErrors(
            "data.add_eos: must be false with a tokenizer that has no EOS token; "
            f"got true and '{tokenizer.name_or_path}'; set data.add_eos=false"
        )
    if cfg.chat_template:
        encoded = chat(examples, tokenizer, cfg, _encode)
    else:
        encoded = _plain(examples, tokenizer, cfg)
    kept = Tokens([], [], [], [], 0, 0, num_examples=len(examples))
    shortest = None
    for index, (prompt, completion, left) in enumerate(encoded):
        if not prompt:
            message = (
                "data.prompt: must give at least one token, to predict the completion from; got "
                f"none for {examples[index].prompt!r}; give a prompt, or data.add_bos=true with a "
                "tokenizer that adds BOS"
            )
            raise ConfigErrors(message)
        length = len(prompt) + len(completion)
        kept.longest = max(kept.longest, length)
        if not completion:
            kept.num_empty += 1
        elif length > cfg.max_length:
            kept.num_too_long += 1
            shortest = min(shortest or length, length)
        else:
            kept.input_ids.append([*prompt, *completion])
            kept.completion_start.append(len(prompt))
            kept.ids.append(examples[index].id)
            kept.indices.append(index)
            if left is not None:
                kept.num_losing_text += 1
                kept.first_loss = kept.first_loss or (examples[index].completion, left)
    if not kept.input_ids:
        message = f"data.completion: must give tokens; got none from {len(examples)} examples"
        if shortest:
            message = (
                f"data.max_length: must let at least one of {len(examples)} examples through; got "
                f"{cfg.max_length}, the shortest has {shortest} tokens; raise data.max_length"
            )
        raise ConfigErrors(message)
    return kept


def _plain(
    examples: Sequence[Example], tokenizer: Any, cfg: DataConfig
) -> list[tuple[list[int], list[int], str | None]]:
    """Return ids of prompt and completion; nothing of a completion's text can be lost here."""
    prompts = _encode(tokenizer, [example.prompt for example in examples])
    completions = _encode(tokenizer, [example.completion for example in examples])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if cfg.add_bos and opens_with_bos(tokenizer):
        prompts = [ids if ids[:1] == [bos] else [bos, *ids] for ids in prompts]
    if cfg.add_eos:
        completions = [[*ids, eos] if ids else ids for ids in completions]
    return [(*pair, None) for pair in zip(prompts, completions, strict=True)]


def opens_with_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer itself opens a text with BOS.

    Having a bos_token is no sign of it: GPT-2's, Pythia's and SmolLM's have one and add none, so
    their models have not seen a text that begins with it.
    """
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids without special tokens; without the tokenizer's warning of long texts, we count them."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]
