"""Prompts that somebody types, as the model saw those it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorabench.config import ConfigErrors, DataConfig
from lorabench.data.chat import template_of
from lorabench.data.encoding import encode_plain, opens_with_bos
from lorabench.data.rendering import render_pairs
from lorabench.data.templates import CONVERSATIONS


def prompt_ids(prompts: Sequence[str], tokenizer: Any, cfg: DataConfig) -> list[list[int]]:
    """Return the token ids of prompts, by the rules of `tokenise`; nothing is left out or cut.

    With `data.chat_template`, and of conversations, a prompt is a user turn, followed by the
    opening of the assistant's.

    Raises:
        ConfigErrors: A prompt gives no token; the chat template is missing or refuses a prompt.
    """
    if cfg.chat_template or cfg.format in CONVERSATIONS:
        # Some templates refuse an assistant turn without content; it is not used.
        pairs = [(prompt, "x") for prompt in prompts]
        template = template_of(tokenizer, cfg)
        rendered = render_pairs(template, tokenizer, pairs, cfg.chat_template_kwargs or {})
        found = encode_plain(tokenizer, [opened for opened, _ in rendered])
    else:
        found = encode_plain(tokenizer, list(prompts))
        if cfg.add_bos and opens_with_bos(tokenizer):
            bos = tokenizer.bos_token_id
            found = [ids if ids[:1] == [bos] else [bos, *ids] for ids in found]
    empty = [prompt for prompt, ids in zip(prompts, found, strict=True) if not ids]
    if empty:
        raise ConfigErrors(
            f"--prompt: must give at least one token to continue; got none for {empty[0]!r}; "
            f"write something"
        )
    return found
