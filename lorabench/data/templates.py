"""Templates over columns: what a split's prompt and completion are made of.

As `str.format`, but a field is a column's name and nothing more, and braces in the data are data.
A part in [[ ]] is left out where a column in it is empty: blank, null or not there. Four brackets
in a row stand for two of the text, as two braces stand for one.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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


class Part(NamedTuple):
    """A text and the column that follows it; None: the text alone."""

    text: str
    column: str | None


class Section(NamedTuple):
    """Neighbouring parts that are rendered together, or, if optional, left out together."""

    parts: list[Part]
    is_optional: bool = False


def parse(template: str) -> list[Section]:
    """Return the sections of a template.

    Raises:
        ValueError: it is no template; the reason.
    """
    sections = [Section([])]
    has_optional = "[[" in template  # if not, ]] is text, as it always was
    for text, column, spec, conversion in string.Formatter().parse(template):
        if column is not None and (not column or spec or conversion):
            raise ValueError("between braces there must be the name of a column alone")
        pieces = re.split(r"(\[{2,}|\]{2,})", text) if has_optional else [text]
        said = ""
        for piece in pieces:
            is_bracket = has_optional and len(piece) > 1 and set(piece) in ({"["}, {"]"})
            if not is_bracket:
                said += piece
                continue
            if len(piece) > 4:
                raise ValueError(f"{piece} can be read in several ways")
            if len(piece) == 4:
                said += piece[:2]
                continue
            opens = piece[0] == "["
            if opens == sections[-1].is_optional:
                raise ValueError("[[ must be closed by ]] before another one opens")
            if not opens:
                said += piece[2:]  # of ]]] the first is text, of [[[ the last
            sections[-1].parts.append(Part(said, None))
            sections.append(Section([], is_optional=opens))
            said = piece[2:] if opens else ""
        sections[-1].parts.append(Part(said, column))
    if sections[-1].is_optional:
        raise ValueError("[[ must be closed by ]]")
    if any(section.is_optional and not _columns([section]) for section in sections):
        raise ValueError("between [[ and ]] there must be a column; four brackets are two of text")
    return sections


def render(sections: list[Section], row: Mapping[str, Any]) -> str:
    """Return the template filled in. Braces and brackets in the data are data."""
    return "".join(
        text if column is None else f"{text}{as_text(row[column])}"
        for section in sections
        if not section.is_optional
        or all(not is_empty(row.get(column)) for column in _columns([section]))
        for text, column in section.parts
    )


def is_empty(value: Any) -> bool:
    """Return whether a cell is null or blank."""
    return value is None or (isinstance(value, str) and not value.strip())


def _columns(sections: list[Section]) -> list[str]:
    return [part.column for s in sections for part in s.parts if part.column is not None]


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


def row_error(row: Mapping[str, Any], wanted: Wanted) -> str:
    """Return why a row cannot be filled into templates; empty if it can."""
    for column in wanted.required():
        if column not in row:
            return f"no column '{column}'"
    for column in wanted.columns:
        if as_text(row[column]) is None:
            return f"column '{column}' holds {row[column]!r:.40}"
    for column in wanted.optional:
        value = row.get(column)
        if value is not None and as_text(value) is None:
            return f"column '{column}' holds {value!r:.40}"
    return ""


@dataclass(frozen=True)
class Wanted:
    """What is asked of the rows of a source.

    Args:
        columns: Columns that every row must have, each with the key that asks for it.
        optional: Columns that may be null or missing in a row, though not in all of them.
        raw: As `columns`, but whatever they hold is passed on; conversations.
        if_there: Names of columns that are passed on where they are there.
        error: Returns why a row cannot be used, or nothing. The default asks for text or a number
            in each column.
    """

    columns: dict[str, str]
    optional: dict[str, str] = field(default_factory=dict)
    raw: dict[str, str] = field(default_factory=dict)
    if_there: Sequence[str] = ()
    error: Callable[[Mapping[str, Any], Wanted], str] = row_error

    def key(self) -> tuple[Any, ...]:
        """Return what decides the outcome of a check, to remember it by."""
        groups = (self.columns, self.optional, self.raw)
        return (*(tuple(group.items()) for group in groups), tuple(self.if_there), self.error)

    def required(self) -> dict[str, str]:
        """Return the columns that every row must have."""
        return self.raw | self.columns

    def names(self) -> list[str]:
        """Return all columns that are used."""
        return list(dict.fromkeys([*self.required(), *self.optional, *self.if_there]))


def wanted_of(cfg: DataConfig, split: str) -> tuple[Wanted, list[str]]:
    """Return the columns that a split needs, and bad templates."""
    wanted = Wanted({})
    if cfg.format in CONVERSATIONS:
        column = cfg.messages or CONVERSATIONS[cfg.format]
        beside = [name for name in (cfg.tools, "system") if name]
        wanted = Wanted({}, raw={column: "data.messages"}, if_there=beside)
    errors = []
    for part in PARTS.get(cfg.format, ()):
        key, template = template_of(cfg, split, part)
        found, error = template_columns(key, template)
        if not error and part != "prompt" and not (found.columns or found.optional):
            error = f"{key}: must name at least one column; got {template!r}"
        errors += [error] if error else []
        wanted.columns.update(found.columns)
        wanted.optional.update(found.optional)
    if split == "train" and cfg.split_by is not None and len(own_sources(cfg)) < len(SPLITS):
        wanted.columns[cfg.split_by] = "data.split_by"
    for column in wanted.columns:
        wanted.optional.pop(column, None)
    return wanted, errors


def template_columns(key: str, template: str) -> tuple[Wanted, str]:
    """Return the columns of one template and why it is none; empty if it is."""
    try:
        sections = parse(template)
    except ValueError as error:
        brackets = "brackets" if "[[" in str(error) or "several" in str(error) else ""
        remedy = "put two brackets of the text as four" if brackets else (
            "write a brace of the text twice"
        )  # fmt: skip
        return Wanted({}), (
            f"{key}: must be a template over columns, such as 'Q: {{question}}'; "
            f"got {template!r}: {error}; {remedy}"
        )
    columns = _columns([section for section in sections if not section.is_optional])
    optional = _columns([section for section in sections if section.is_optional])
    return Wanted(dict.fromkeys(columns, key), dict.fromkeys(optional, key)), ""


def unknown_columns(columns: Mapping[str, str], there: Sequence[str], where: str) -> list[str]:
    """Return an error for each column that is not there."""
    return [
        f"{key}: every column must be one of {', '.join(there)} ({where}); "
        f"unknown: {did_you_mean(column, there)}"
        for column, key in columns.items() if column not in there
    ]  # fmt: skip
