"""Templates over columns: what a split's prompt and completion are made of.

As `str.format`, but a field is a column's name and nothing more, and braces in the data are data.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

from lorabench.config import DataConfig, SourceConfig, did_you_mean

SPLITS = ("train", "validation", "test")
# The column of a conversation, by format, where data.messages does not say it.
CONVERSATIONS = {"messages": "messages", "sharegpt": "conversations"}
# The templates that make an example of a row; conversations have none.
PARTS = {"prompt_completion": ("prompt", "completion"), "text": ("text",)}


def own_sources(cfg: DataConfig) -> dict[str, SourceConfig]:
    """The splits that are read, not taken from train."""
    sources = {split: getattr(cfg, split) for split in SPLITS}
    return {split: source for split, source in sources.items() if source.path is not None}


def parse(template: str) -> list[tuple[str, str | None]]:
    """A template as (text, column) pairs.

    As `str.format`, but a field is a column's name and nothing more: no attributes, no indices.

    Raises:
        ValueError: it is no template; the reason.
    """
    parts = []
    for text, column, spec, conversion in string.Formatter().parse(template):
        if column is not None and (not column or spec or conversion):
            raise ValueError("between braces there must be the name of a column alone")
        parts.append((text, column))
    return parts


def render(parts: list[tuple[str, str | None]], row: dict[str, Any]) -> str:
    """The template filled in. Braces in the data are data."""
    return "".join(text if col is None else f"{text}{as_text(row[col])}" for text, col in parts)


def as_text(value: Any) -> str | None:
    """A cell as it goes into a template; None for what must not."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # a lone surrogate
            return None
        return value
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return str(value) if isinstance(value, int | float) else None


def template_of(cfg: DataConfig, split: str, part: str) -> tuple[str, str]:
    """Key and text of a template of a split: prompt, completion, or text."""
    own = getattr(getattr(cfg, split), part, None)
    return (f"data.{part}", getattr(cfg, part)) if own is None else (f"data.{split}.{part}", own)


def columns_of(cfg: DataConfig, split: str) -> tuple[dict[str, str], list[str]]:
    """The columns that a split needs, each with the key that asks for it; and bad templates."""
    columns: dict[str, str] = {}
    errors = []
    for part in PARTS.get(cfg.format, ()):
        key, template = template_of(cfg, split, part)
        try:
            named = [column for _, column in parse(template) if column is not None]
        except ValueError as error:
            errors.append(
                f"{key}: must be a template over columns, such as 'Q: {{question}}'; "
                f"got {template!r}: {error}; write a brace of the text twice"
            )
            continue
        if part != "prompt" and not named:
            errors.append(f"{key}: must name at least one column; got {template!r}")
        columns.update((column, key) for column in named)
    if cfg.format in CONVERSATIONS:
        columns[cfg.messages or CONVERSATIONS[cfg.format]] = "data.messages"
    if split == "train" and cfg.split_by is not None and len(own_sources(cfg)) < len(SPLITS):
        columns[cfg.split_by] = "data.split_by"
    return columns, errors


def unknown_columns(columns: dict[str, str], there: Sequence[str], where: str) -> list[str]:
    return [
        f"{key}: every column must be one of {', '.join(there)} ({where}); "
        f"unknown: {did_you_mean(column, there)}"
        for column, key in columns.items() if column not in there
    ]  # fmt: skip


def optional_columns(cfg: DataConfig) -> list[str]:
    """The columns that are used where they are there: beside a conversation."""
    return [name for name in (cfg.tools, "system") if name] if cfg.format in CONVERSATIONS else []


def row_error(row: dict[str, Any], columns: dict[str, str]) -> str:
    """Why a row cannot be used; empty if it can. Conversations are checked when they are read."""
    for column, key in columns.items():
        if column not in row:
            return f"no column '{column}'"
        if key != "data.messages" and as_text(row[column]) is None:
            return f"column '{column}' holds {row[column]!r:.40}"
    return ""
