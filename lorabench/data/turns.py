"""Conversations as tokens: the whole text as the template writes it, and a loss on chosen turns."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from typing import Any

from lorabench.config import ConfigErrors, DataConfig
from lorabench.data.chat import template_of
from lorabench.data.examples import Example
from lorabench.data.rendering import render_conversations
from lorabench.data.tokens import Encoded

AT_ONCE = 1000  # conversations that are rendered by one process


def encode(
    examples: Sequence[Example], tokenizer: Any, cfg: DataConfig, stops: Collection[int] = ()
) -> Iterator[tuple[int, Encoded]]:
    """Yield each conversation's place and its tokens.

    - The template renders the whole conversation once; its text is tokenised once, without special
      tokens of the tokenizer's own, as apply_chat_template does.
    - A turn that is trained on carries the loss from behind the opening of the answer, which is the
      prompt when the model must write it, to the token that ends it.
    - `add_eos`: a span ends with its end-of-turn token, without what the template writes behind it
      (mostly a line break), and the example ends with its last span. If the template ends the last
      turn without such a token, EOS is added.
    - A template may leave the end of a turn to the beginning of the next one, as GLM's: that token
      then ends the span, if the base stops at it.

    Args:
        stops: ids at which the base ends a generation, from its generation_config.json.
    Raises:
        ConfigErrors: no chat template, a template that refuses a conversation or whose turns cannot
            be told apart, a token that lies half in a turn, a turn that has no end.
    """
    if not tokenizer.is_fast:
        raise ConfigErrors(
            f"data.format: must be prompt_completion or text with a tokenizer written in Python; "
            f"got {cfg.format} and '{tokenizer.name_or_path}', which does not tell the place of a "
            "token in its text; save the tokenizer as tokenizer.json"
        )
    template = template_of(tokenizer, cfg.chat_template)
    kwargs = dict(cfg.chat_template_kwargs or {})
    ends = _ends(tokenizer)
    for start in range(0, len(examples), AT_ONCE):
        some = [examples[i] for i in range(start, min(start + AT_ONCE, len(examples)))]
        rendered = render_conversations(template, tokenizer, [e.conversation for e in some], kwargs)
        encoded = tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for i, (text, places) in enumerate(rendered):
            ids, offsets = encoded["input_ids"][i], encoded["offset_mapping"][i]
            try:
                found = _spans(ids, offsets, places, (ends, stops), tokenizer, cfg.add_eos)
            except ValueError as error:
                raise ConfigErrors(
                    f"data.chat_template: must let each turn be told in the tokens; in that of "
                    f"'{tokenizer.name_or_path}', example {start + i + 1}, {text!r:.60}: {error}; "
                    "give another data.chat_template"
                ) from error
            yield start + i, Encoded(*found, _left(some[i], text, places))


def _spans(
    ids: list[int],
    offsets: list[tuple[int, int]],
    places: list[list[int]],
    ends: tuple[Collection[int], Collection[int]],
    tokenizer: Any,
    add_eos: bool,
) -> tuple[list[int], list[int]]:
    """Return the ids of the example and its spans, in tokens.

    Args:
        places: begin and end of each trained turn, in characters.
        ends: ids that can end a turn; those that may do so at the beginning of the next one.
    """
    spans: list[int] = []
    for number, (begin, end) in enumerate(places):
        first = _first(offsets, begin)
        last = next((t for t in range(first, len(ids)) if offsets[t][0] >= end), len(ids))
        while last > first and offsets[last - 1][1] > end:  # it belongs to the next turn too
            last -= 1
        if first == last or not first:
            raise ValueError("a turn has no token, or nothing comes before it")
        closing = last - 1
        while closing > first and _is_blank(ids[closing], tokenizer):
            closing -= 1
        if ids[closing] in ends[0]:
            last = closing + 1 if add_eos else last
        elif last < len(ids) and ids[last] in ends[1]:
            last += 1
        elif number + 1 == len(places) and last == len(ids):
            if add_eos:
                ids, last = [*ids[: closing + 1], tokenizer.eos_token_id], closing + 2
        else:
            shown = tokenizer.decode(ids[max(first, last - 3) : last + 1])
            raise ValueError(
                f"a turn must end with a special token, or the model never learns to stop; one "
                f"ends with {shown!r}"
            )
        spans += [first, last]
    if add_eos and spans:
        ids = ids[: spans[-1]]
    return list(ids), spans


def _first(offsets: list[tuple[int, int]], begin: int) -> int:
    """The first token of a turn that begins at a character.

    Raises:
        ValueError: a token lies on both sides of the beginning.
    """
    for token, (left, right) in enumerate(offsets):
        if right <= begin:
            continue
        if left < begin:
            raise ValueError(
                f"a token of characters {left} to {right} lies half in the opening of the answer "
                "and half in the answer, so the model would be asked otherwise than it is trained"
            )
        return token
    return len(offsets)


@lru_cache(maxsize=1 << 12)
def _decoded(token: int, tokenizer: Any) -> str:
    return str(tokenizer.decode([token]))


def _is_blank(token: int, tokenizer: Any) -> bool:
    return not _decoded(token, tokenizer).strip()


def _ends(tokenizer: Any) -> frozenset[int]:
    """Ids that can end a turn: the special tokens."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(special | set(tokenizer.all_special_ids))


def _left(example: Example, text: str, places: list[list[int]]) -> str | None:
    """What is left of the last turn if the template removes text of a trained one, or None."""
    found = json.loads(example.conversation)
    said = (found["messages"][place]["content"].strip() for place in found["train"])
    return None if all(one in text for one in said) else text[slice(*places[-1])].strip()
