"""Prompt and completion as token ids, and the exact place where one ends and the other begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorabench.config import ConfigErrors, DataConfig
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
    label_ids: list[int] = field(default_factory=list)  # place in `labels`, one an example

    def __len__(self) -> int:
        return len(self.input_ids)

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


def tokenise(examples: Sequence[Example], tokenizer: Any, cfg: DataConfig) -> Tokens:
    """Prompt ids + completion ids of every example that fits `max_length`; nothing is cut.

    - Prompt and completion are tokenised apart and joined. Tokenised together, a token may span
      both ("=" and "5" as "=5"): then the boundary is in the middle of a token, and the prompt's
      ids are not those the model gets when it must answer.
    - `add_bos`: one BOS opens the prompt, where the tokenizer has one and the prompt does not
      begin with it already.
    - `add_eos`: one EOS closes the completion.
    - `chat_template`: the prompt is a user turn with the opening of the assistant's; the
      completion is what the full conversation adds to it. BOS is the template's business. With
      `add_eos` the completion ends at the template's EOS, or, where it writes none, gets one.

    Raises:
        ConfigErrors: no EOS, no chat template, a template whose full conversation does not begin
            with the prompt, a prompt of no tokens, no example that fits.
    """
    if cfg.add_eos and tokenizer.eos_token_id is None:
        raise ConfigErrors(
            "data.add_eos: must be false with a tokenizer that has no EOS token; "
            f"got true and '{tokenizer.name_or_path}'; set data.add_eos=false"
        )
    pairs = (_chat if cfg.chat_template else _plain)(examples, tokenizer, cfg)
    kept = Tokens([], [], [], [], 0, 0)
    shortest = None
    for index, (prompt, completion) in enumerate(pairs):
        if not prompt:
            message = (
                "data.prompt: must give at least one token, to predict the completion from; got "
                f"none for {examples[index].prompt!r}; give a prompt, or data.add_bos=true with a "
                "tokenizer that has a BOS token"
            )
            raise ConfigErrors(message)
        length = len(prompt) + len(completion)
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
    if not kept.input_ids:
        message = f"data.completion: must give tokens; got none from {len(examples)} examples"
        if shortest:
            message = (
                f"data.max_length: must let at least one of {len(examples)} examples through; got "
                f"{cfg.max_length}, the shortest has {shortest} tokens; raise data.max_length"
            )
        raise ConfigErrors(message)
    return kept


def _plain(examples: Sequence[Example], tokenizer: Any, cfg: DataConfig) -> list[tuple]:
    prompts = _encode(tokenizer, [example.prompt for example in examples])
    completions = _encode(tokenizer, [example.completion for example in examples])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if cfg.add_bos and bos is not None:
        prompts = [ids if ids[:1] == [bos] else [bos, *ids] for ids in prompts]
    if cfg.add_eos:
        completions = [[*ids, eos] if ids else ids for ids in completions]
    return list(zip(prompts, completions, strict=True))


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids without special tokens; without the tokenizer's warning of long texts, we count them."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _chat(examples: Sequence[Example], tokenizer: Any, cfg: DataConfig) -> list[tuple]:
    if not tokenizer.chat_template:
        raise ConfigErrors(
            "data.chat_template: must be false with a tokenizer that has no chat template; got "
            f"true and '{tokenizer.name_or_path}'; set data.chat_template=false or use an "
            "instruction-tuned model"
        )
    eos, pairs = tokenizer.eos_token_id, []
    for example in examples:
        turns = [{"role": "user", "content": example.prompt}]
        prompt = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        turns.append({"role": "assistant", "content": example.completion})
        full = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        if full[: len(prompt)] != prompt:
            at = next(i for i, ids in enumerate(prompt) if full[i : i + 1] != [ids])
            gives, meant = (tokenizer.decode(ids[at : at + 5]) for ids in (full, prompt))
            message = (
                "data.chat_template: must write a conversation that begins with its prompt; that "
                f"of '{tokenizer.name_or_path}' gives {gives!r} in place of {meant!r} at token "
                f"{at}; set data.chat_template=false and write the turns into data.prompt"
            )
            raise ConfigErrors(message)
        completion = full[len(prompt) :]
        if cfg.add_eos and example.completion:
            end = len(completion) - completion[::-1].index(eos) if eos in completion else None
            completion = [*completion, eos] if end is None else completion[:end]
        pairs.append((prompt, completion if example.completion else []))
    return pairs
