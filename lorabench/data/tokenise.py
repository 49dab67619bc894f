"""Examples -> tokens, by the rules of their format."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Collection, Iterator, Sequence
from operator import itemgetter
from typing import Any

from lorabench.config import ConfigErrors, DataConfig, parts
from lorabench.data import turns
from lorabench.data.chat import chat
from lorabench.data.examples import Example, some
from lorabench.data.tokens import Encoded, Kept, Tokens


def tokenise(
    examples: Sequence[Example], tokenizer: Any, cfg: DataConfig, stops: Collection[int] = ()
) -> Tokens:
    """Return the token ids of every example that fits `max_length`.

    A prompt and its completion:
    - They are tokenised apart and joined. Tokenised together, a token may span
      both ("=" and "5" as "=5"): then the boundary is in the middle of a token, and the prompt's
      ids are not those the model gets when it must answer.
    - `add_bos`: one BOS opens the prompt, where the tokenizer itself opens a text with it and the
      prompt does not begin with it already.
    - `add_eos`: one EOS closes the completion.
    - `chat_template`: the prompt is a user turn with the opening of the assistant's; the
      completion is what the full conversation adds to it. BOS is the template's business. With
      `add_eos` the completion ends at the template's EOS, or, where it writes none, gets one.
      Today's date, where the template writes one, is always 26 July 2024.

    A conversation (messages, sharegpt): see `turns.encode`.

    A text is cut into pieces of `max_length`, each of which begins with the last token of the one
    before: every token but a text's first carries the loss once.

    What is longer is left out and counted, or, with `too_long=cut_prompt`, loses the left of what
    comes before its first span, but for a BOS.

    Args:
        stops: ids at which the base ends a generation; see `turns.encode`.
    Raises:
        ConfigErrors: no EOS, no chat template, a template whose full conversation does not begin
            with the prompt or whose turns cannot be told apart, a prompt of no tokens, no example
            that fits.
    """
    if cfg.add_eos and tokenizer.eos_token_id is None:
        raise ConfigErrors(
            "data.add_eos: must be false with a tokenizer that has no EOS token; "
            f"got true and '{tokenizer.name_or_path}'; set data.add_eos=false"
        )
    kept = Kept(cfg, tokenizer.bos_token_id)
    for index, encoded in _encoded(examples, tokenizer, cfg, stops):
        kept.add(index, examples[index], encoded)
    return kept.tokens(len(examples))


def _encoded(
    examples: Sequence[Example], tokenizer: Any, cfg: DataConfig, stops: Collection[int]
) -> Iterator[tuple[int, Encoded]]:
    """Yield each example's place and its tokens; a text's pieces one after the other."""
    if cfg.mixture:
        yield from _of_sources(examples, tokenizer, cfg, stops)
    elif cfg.format == "text":
        yield from _pieces(examples, tokenizer, cfg)
    elif cfg.format != "prompt_completion":
        yield from turns.encode(examples, tokenizer, cfg, stops)
    else:
        pairs = (
            chat(examples, tokenizer, cfg, encode_plain)
            if cfg.chat_template
            else _plain(examples, tokenizer, cfg)
        )
        for index, (prompt, completion, left) in enumerate(pairs):
            if not prompt:
                raise ConfigErrors(
                    "data.prompt: must give at least one token, to predict the completion from; "
                    f"got none for {examples[index].prompt!r}; give a prompt, or data.add_bos=true "
                    "with a tokenizer that adds BOS"
                )
            ids = [*prompt, *completion]
            yield index, Encoded(ids, [len(prompt), len(ids)] if completion else [], left)


def _of_sources(
    examples: Sequence[Example], tokenizer: Any, cfg: DataConfig, stops: Collection[int]
) -> Iterator[tuple[int, Encoded]]:
    """Yield the tokens of examples of a mixture, each by the rules of its source.

    A set with a path of its own is in no source: it follows `data`.
    """
    places: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        places.setdefault(example.source, []).append(index)
    views = parts.by_source(cfg) | {"": dataclasses.replace(cfg, mixture=[])}
    streams = [
        _placed(mine, _encoded(some(examples, mine), tokenizer, views[name], stops))
        for name, mine in places.items()
    ]
    yield from heapq.merge(*streams, key=itemgetter(0))


def _placed(
    places: Sequence[int], encoded: Iterator[tuple[int, Encoded]]
) -> Iterator[tuple[int, Encoded]]:
    """Yield tokens with the places that their examples have among all."""
    for index, one in encoded:
        yield places[index], one


def _pieces(
    examples: Sequence[Example], tokenizer: Any, cfg: DataConfig
) -> Iterator[tuple[int, Encoded]]:
    """Yield the pieces of each text; of one without a second token, an empty one."""
    opening = [tokenizer.bos_token_id] if cfg.add_bos and opens_with_bos(tokenizer) else []
    closing = [tokenizer.eos_token_id] if cfg.add_eos else []
    texts = encode_plain(tokenizer, [example.completion for example in examples])
    for index, text in enumerate(texts):
        ids = [*([] if text[:1] == opening else opening), *text, *closing]
        if not text or len(ids) < 2:
            yield index, Encoded([], [])
            continue
        step = cfg.max_length - 1
        for number, start in enumerate(range(0, len(ids) - 1, step)):
            piece = ids[start : start + cfg.max_length]
            yield index, Encoded(piece, [1, len(piece)], piece=f".{number}" if number else "")


def _plain(
    examples: Sequence[Example], tokenizer: Any, cfg: DataConfig
) -> list[tuple[list[int], list[int], str | None]]:
    """Return ids of prompt and completion; nothing of a completion's text can be lost here."""
    prompts = encode_plain(tokenizer, [example.prompt for example in examples])
    completions = encode_plain(tokenizer, [example.completion for example in examples])
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


def encode_plain(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids without special tokens; without the tokenizer's warning of long texts, we count them."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]
