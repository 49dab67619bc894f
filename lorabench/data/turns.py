"""Conversations as tokens: the whole text as the template writes it, and a loss on chosen turns."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from functools import cache
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
    template = template_of(tokenizer, cfg)
    kwargs = dict(cfg.chat_template_kwargs or {})
    placer = _Placer(tokenizer, stops, cfg.add_eos)
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
            try:
                found = placer.spans(encoded["input_ids"][i], encoded["offset_mapping"][i], places)
            except ValueError as error:
                raise ConfigErrors(
                    f"data.chat_template: must let each turn be told in the tokens; in that of "
                    f"'{tokenizer.name_or_path}', example {start + i + 1}, {text!r:.60}: {error}; "
                    "give another data.chat_template"
                ) from error
            yield start + i, Encoded(*found, *_loss(some[i], text, places))


class _Placer:
    """Finds the tokens of turns whose characters are known.

    Args:
        stops: ids that end a turn although the next turn begins with them.
    """

    def __init__(self, tokenizer: Any, stops: Collection[int], add_eos: bool) -> None:
        self.tokenizer, self.add_eos = tokenizer, add_eos
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = special | set(tokenizer.all_special_ids)
        # A template may mark a turn and leave out its end.
        self.stops = {*stops, tokenizer.eos_token_id} - {None}
        self.is_blank = cache(lambda token: not tokenizer.decode([token]).strip())

    def spans(
        self, ids: list[int], offsets: list[tuple[int, int]], places: list[list[int]]
    ) -> tuple[list[int], list[int]]:
        """Return the ids of an example and its spans, in tokens.

        Args:
            places: begin and end of each trained stretch, in characters, and the turn's number.
        Raises:
            ValueError: a turn has no end, or a token lies half in it.
        """
        lefts, rights = ([offset[side] for offset in offsets] for side in (0, 1))
        spans: list[int] = []
        turns = [turn for *_, turn in places]
        for (begin, end, turn), following in zip(places, [*turns[1:], None], strict=False):
            first = bisect_right(rights, begin)
            if first < len(ids) and lefts[first] < begin:
                if ids[first] not in self.special:
                    raise ValueError(_half(lefts[first], rights[first]))
                first += 1  # it takes in the spaces behind it: when the model must answer, too
            last = bisect_left(lefts, end, lo=first)
            while last > first and rights[last - 1] > end:  # it belongs to the next turn too
                last -= 1
            if first == last or not first:
                raise ValueError("a turn has no token, or nothing comes before it")
            if turn == following:  # a piece of it
                spans += [first, last]
                continue
            closing = last - 1
            while closing > first and self.is_blank(ids[closing]):
                closing -= 1
            if ids[closing] in self.special:
                last = closing + 1 if self.add_eos else last
            elif last < len(ids) and ids[last] in self.stops:
                last += 1
            elif following is None and last == len(ids):
                if self.add_eos:
                    ids, last = [*ids[: closing + 1], self.tokenizer.eos_token_id], closing + 2
            else:
                shown = self.tokenizer.decode(ids[max(first, last - 3) : last + 1])
                raise ValueError(
                    f"a turn must end with a special token, or the model never learns to stop; one "
                    f"ends with {shown!r}"
                )
            spans += [first, last]
        if self.add_eos and spans:
            ids = ids[: spans[-1]]
        return list(ids), spans


def _half(left: int, right: int) -> str:
    return (
        f"a token of characters {left} to {right} lies half in the opening of the answer and half "
        "in the answer, so the model would be asked otherwise than it is trained"
    )


def _loss(example: Example, text: str, places: list[list[int]]) -> tuple[str | None, str | None]:
    """Return what is left of a trained turn that the template takes text from, and its text."""
    if not places:
        return None, None
    found = json.loads(example.conversation)
    for number in found["train"]:
        turn = found["messages"][number]
        texts = [turn.get(key, "").strip() for key in ("reasoning_content", "content")]
        kept = "".join(text[begin:end] for begin, end, owner in places if owner == number)
        if not all(one in kept for one in texts):
            return kept.strip(), "\n\n".join(filter(None, texts))
    return None, None
