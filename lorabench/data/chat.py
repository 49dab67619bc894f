"""Prompt and completion through the tokenizer's chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lorabench.config import ConfigErrors, DataConfig, nearest
from lorabench.data.rendering import render_pairs
from lorabench.data.templates import CONVERSATIONS

# Templates that come along, for bases without one, and the token that ends their turns.
BUILT_IN = {
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama3": "<|eot_id|>",
    "qwen": "<|im_end|>",
}
TEMPLATE_FILE = "chat_template.jinja"  # beside a saved adapter
# What a template gets for today's date, so that the same run has the same tokens on every day and
# in every time zone. Llama 3.1's template falls back to this date itself.
TODAY = datetime(2024, 7, 26)


def template_of(tokenizer: Any, cfg: DataConfig) -> str:
    """Return the template that `data.chat_template` names, with a fixed date for today's.

    That is one out of BUILT_IN, a file's, or the tokenizer's own: with true, and, of conversations,
    which cannot do without one, with false too.

    Raises:
        ConfigErrors: The tokenizer has none, or several and no default; a built-in one whose turns
            do not end with one token of this tokenizer.
    """
    if isinstance(cfg.chat_template, str):
        template = _given(tokenizer, cfg.chat_template)
    else:
        template = _own(tokenizer, may_do_without=cfg.format not in CONVERSATIONS)
    return _FIXED_DATE + template if "strftime_now" in template else template


def is_used(cfg: DataConfig) -> bool:
    """Return whether examples are made by a chat template."""
    return cfg.chat_template is not False or cfg.format in CONVERSATIONS


def text_used(tokenizer: Any, cfg: DataConfig) -> str | None:
    """Return the template that examples are made by, as it is saved with a run; None: by none.

    Raises:
        ConfigErrors: as `template_of`.
    """
    return template_of(tokenizer, cfg).removeprefix(_FIXED_DATE) if is_used(cfg) else None


def given_hash(cfg: DataConfig) -> str | None:
    """Return the sha256 of a template that is given as a name or a file; None: none is given.

    Raises:
        ConfigErrors: it cannot be read.
    """
    choice = cfg.chat_template
    return text_hash(given_text(choice)) if isinstance(choice, str) else None


def text_hash(text: str) -> str:
    """Return the sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def check(cfg: DataConfig) -> list[str]:
    """Return what is wrong with a template that is given as a name or a file."""
    try:
        given_hash(cfg)
    except ConfigErrors as error:
        return error.errors
    return []


def given_text(choice: str) -> str:
    """Return the text of a built-in template or of a file.

    Raises:
        ConfigErrors: it cannot be read.
    """
    if choice in BUILT_IN:
        return (Path(__file__).parent / "chat_templates" / f"{choice}.jinja").read_text("utf-8")
    known = ", ".join(BUILT_IN)
    path = Path(choice).expanduser()
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        there = [*BUILT_IN, *(map(str, path.parent.iterdir()) if path.parent.is_dir() else ())]
        close = nearest(choice, there)
        remedy = f"did you mean '{close[0]}'?" if close else "correct the path"
        raise ConfigErrors(
            f"data.chat_template: must be true, false, {known}, or a file with a template; "
            f"'{choice}' is none of them, seen from {Path.cwd()}; {remedy}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigErrors(
            f"data.chat_template: must be true, false, {known}, or a file with a template; "
            f"'{choice}': {why}; give another"
        ) from error


def _given(tokenizer: Any, choice: str) -> str:
    ending = BUILT_IN.get(choice)
    if ending is not None and len(tokenizer(ending, add_special_tokens=False)["input_ids"]) != 1:
        vocabulary = tokenizer.get_vocab()
        fit = [name for name, token in BUILT_IN.items() if token in vocabulary]
        raise ConfigErrors(
            f"data.chat_template: must end its turns with a token of the tokenizer; '{choice}' "
            f"ends them with {ending}, which '{tokenizer.name_or_path}' does not have; "
            + (f"use {' or '.join(fit)}" if fit else "give a file with a template of your own")
        )
    return given_text(choice)


def _own(tokenizer: Any, may_do_without: bool) -> str:
    if not tokenizer.chat_template:
        without = "set data.chat_template=false, " if may_do_without else ""
        raise ConfigErrors(
            "data.chat_template: must be false, or a template, with a tokenizer that has none of "
            f"its own; '{tokenizer.name_or_path}' has none; {without}give a template "
            f"({', '.join(BUILT_IN)}, or a file), or use an instruction-tuned model"
        )
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigErrors(
            f"data.chat_template: must have a template named 'default' where a tokenizer has "
            f"several; '{tokenizer.name_or_path}' has {', '.join(sorted(tokenizer.chat_template))};"
            f" name one so, or give a template ({', '.join(BUILT_IN)}, or a file)"
        ) from error


def _fixed_date() -> str:
    """Return a Jinja macro that hides transformers' strftime_now.

    A macro, for transformers (5.23) turns a function passed to a template into a string.
    """
    longhand = {code: f"%{code}" for code in "aAbBcdfGHIjmMpSuUVwWxXyYzZ"}
    longhand |= {"D": "%m/%d/%y", "e": "%d", "F": "%Y-%m-%d", "h": "%b", "R": "%H:%M"}
    longhand |= {"T": "%H:%M:%S"}
    fills = {f"%{code}": TODAY.strftime(format) for code, format in longhand.items()}
    fills |= {f"%-{code}": fills[f"%{code}"].lstrip("0") or "0" for code in "dHIjmMSUWy"}
    filled = "".join(f"|replace({code!r}, {text!r})" for code, text in fills.items())
    # The line break is the one that Jinja removes after a block (trim_blocks).
    return "{%- macro strftime_now(format) -%}{{ format" + filled + " }}{%- endmacro %}\n"


_FIXED_DATE = _fixed_date()


def chat(
    examples: Sequence[Any], tokenizer: Any, cfg: DataConfig, encode: Any
) -> list[tuple[list[int], list[int], str | None]]:
    """Return ids of prompt and completion, and what is left of a completion that loses text.

    Tokenising the rendered text without special tokens is what apply_chat_template does itself.

    Raises:
        ConfigErrors: No chat template, or one that does not render, or whose conversation does
            not begin with its prompt.
    """
    template = template_of(tokenizer, cfg)
    pairs = [(one.prompt, one.completion) for one in examples]
    rendered = render_pairs(template, tokenizer, pairs, cfg.chat_template_kwargs or {})
    prompts = encode(tokenizer, [opened for opened, _ in rendered])
    conversations = encode(tokenizer, [whole for _, whole in rendered])
    eos, found = tokenizer.eos_token_id, []
    for example, prompt, full, (opened, whole) in zip(
        examples, prompts, conversations, rendered, strict=True
    ):
        if full[: len(prompt)] != prompt:
            at = next(i for i, ids in enumerate(prompt) if full[i : i + 1] != [ids])
            gives, meant = (tokenizer.decode(ids[at : at + 5]) for ids in (full, prompt))
            raise ConfigErrors(
                "data.chat_template: must write a conversation that begins with its prompt; that "
                f"of '{tokenizer.name_or_path}' gives {gives!r} in place of {meant!r} at token "
                f"{at}; set data.chat_template=false and write the turns into data.prompt"
            )
        completion = full[len(prompt) :]
        if cfg.add_eos and example.completion:
            end = len(completion) - completion[::-1].index(eos) if eos in completion else None
            completion = [*completion, eos] if end is None else completion[:end]
        left = None
        if example.completion.strip() not in whole.removeprefix(opened):
            left = tokenizer.decode(completion, skip_special_tokens=True).strip()
        found.append((prompt, completion if example.completion else [], left))
    return found
