"""Prompts that somebody types, as the model saw those it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorabench.config import ConfigErrors, DataConfig
from lorabench.data.chat import template_of
from lorabench.data.rendering import render_all
from lorabench.data.tokens import _encode, opens_with_bos


def prompt_ids(prompts: Sequence[str], tokenizer: Any, cfg: DataConfig) -> list[list[int]]:
    """Return the token ids of prompts, by the rules of `tokenise`; nothing is left out or cut.

    With `data.chat_template` a prompt is a user turn, followed by the opening of the assistant's.

    Raises:
        ConfigErrors: A prompt gives no token; the chat template is missing or refuses a prompt.
    """
    if cfg.chat_template:
        # Some templates refuse an assistant turn without content; it is not used.
        pairs = [(prompt, "x") for prompt in prompts]
        rendered = render_all(template_of(tokenizer), tokenizer, pairs)
        found = _encode(tokenizer, [opened for opened, _ in rendered])
    else:
        found = _encode(tokenizer, list(prompts))
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
