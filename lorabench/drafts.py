"""A first data config and experiment config for a data file, from what the file holds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config import ConfigErrors

if TYPE_CHECKING:
    from lorabench.data.sources.look import Column, Seen

# Columns that public data sets use together, best known first: prompt, completion.
PAIRS = (
    ("prompt", "completion"), ("instruction", "output"), ("question", "answer"),
    ("prompt", "response"), ("instruction", "response"), ("query", "response"),
    ("question", "response"), ("prompt", "answer"), ("prompt", "output"), ("problem", "solution"),
    ("input", "output"), ("source", "target"), ("text", "label"),
)  # fmt: skip
TEXTS = ("text", "content", "document")
# The keys of a turn, by the format that a list of such turns is.
TURNS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
SHORT = 40  # characters of a completion that is likely to be written whole: exact_match
EXAMPLE = 60  # characters of an example in a comment
SCORED = (500, 1000)  # examples of validation and test, at most: scoring takes time
FEW = 50  # examples of each, at least, where a quarter of the rows gives as many


@dataclass
class Draft:
    """What a file is taken for."""

    format: str  # a value of data.format
    columns: dict[str, str]  # the keys of data that name columns
    is_short: bool = False  # completions are


def read(seen: Seen) -> Draft:
    """Return what the rows of a file are taken for, by the names and values of its columns.

    Raises:
        ConfigErrors: Nothing that is known; names the columns.
    """
    for name, column in _ordered(seen, ("messages", "conversations", "conversation")):
        for format, keys in TURNS.items():
            if column.examples and all(_is_turns(cell, keys) for cell in column.examples):
                return Draft(format, {"messages": name})
    usable = {
        name: column
        for name, column in seen.columns.items()
        if column.examples and not {*column.types} - {"str", "int", "float", "NoneType"}
        and not set("{}") & set(name)
    }  # fmt: skip
    lower = {name.lower(): name for name in usable}
    for prompt, completion in PAIRS:
        if prompt in lower and completion in lower:
            names = lower[prompt], lower[completion]
            return _pair(usable, *names, lower.get("input") if prompt == "instruction" else None)
    texts = {name: column for name, column in usable.items() if "str" in column.types}
    known = [lower[name] for name in TEXTS if lower.get(name) in texts]
    if known or len(texts) == 1:
        return Draft("text", {"text": f"{{{(known or list(texts))[0]}}}"})
    told = ", ".join(f"{name} ({_types(column)})" for name, column in seen.columns.items())
    raise ConfigErrors(
        f"FILE: must hold conversations, a prompt and a completion, or texts; got the columns "
        f"{told or 'none'}; rename two to prompt and completion, or write templates over them: "
        f"'data.prompt=\"{{COLUMN}}\"' 'data.completion=\"{{COLUMN}}\"' with data=path"
    )


def _ordered(seen: Seen, first: Sequence[str]) -> Iterator[tuple[str, Column]]:
    """Yield columns, those of known names first."""
    yield from ((name, seen.columns[name]) for name in first if name in seen.columns)
    yield from ((name, one) for name, one in seen.columns.items() if name not in first)


def _is_turns(cell: Any, keys: tuple[str, str]) -> bool:
    """Whether a cell is a list of turns, or the JSON text of one."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            return False
    return (
        isinstance(cell, list)
        and bool(cell)
        and all(isinstance(turn, dict) and keys[0] in turn for turn in cell)
        and any(keys[1] in turn for turn in cell)
    )


def _pair(columns: dict[str, Column], prompt: str, completion: str, more: str | None) -> Draft:
    """A prompt column and a completion column, with Alpaca's input where there is one."""
    template = f"{{{prompt}}}"
    if more is not None:
        template += f"[[\n\n{{{more}}}]]" if columns[more].num_empty else f"\n\n{{{more}}}"
    if (prompt, completion) != ("prompt", "completion"):
        template += "\n"  # else the completion would continue the last word
    most = max(columns[completion].most_characters, *(_width(columns[completion])))
    return Draft(
        "prompt_completion",
        {"prompt": template, "completion": f"{{{completion}}}"},
        is_short=most <= SHORT,
    )


def _width(column: Column) -> list[int]:
    return [0, *(len(str(cell)) for cell in column.examples)]


def _types(column: Column) -> str:
    names = {"str": "text", "NoneType": "null", "dict": "object", "int": "number"}
    return " or ".join(dict.fromkeys(names.get(one, one) for one in column.types)) or "empty"


# --- the files -------------------------------------------------------------------------------


def name_of(path: str) -> str:
    """Return a name for the configs of a file: one that Hydra reads as a name."""
    stem = Path(path).name.removesuffix(".gz").partition(".")[0]
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-")
    plain = re.match("[A-Za-z]", name) and name.lower() not in ("null", "true", "false", "none")
    return name if plain else f"data_{name}".rstrip("_")


def data_config(seen: Seen, draft: Draft, path: str, name: str) -> str:
    """Return the text of conf/data/NAME.yaml.

    Args:
        path: of the data, as it goes into data.train.path.
    """
    rows = f"{seen.num_rows:,} row{'s' if seen.num_rows != 1 else ''}"
    files = f" in {len(seen.files)} files" if len(seen.files) > 1 else ""
    lines = [f"# {_comment(path)}: {seen.kind}, {rows}{files}, as `lorabench init` found it."]
    lines += [f"#   {text}" for text in _described(seen)]
    lines += [f"name: {name}", "source: path"]
    if draft.format != "prompt_completion":
        lines.append(f"format: {draft.format}")
    lines += ["train:", f"  path: {_quoted(path)}"]
    share = _share(seen.num_rows)
    lines += [
        "validation:",
        "  path: null                # null: taken from train, as the next two lines say",
        "test:",
        "  path: null",
        f"validation_fraction: {share}",
        f"test_fraction: {share}",
    ]
    for key, most in zip(("num_validation", "num_test"), SCORED, strict=True):
        if share * seen.num_rows > most:
            lines.append(f"{key}: {most}          # of {share * seen.num_rows:,.0f}; null: all")
    lines += [f"{key}: {_quoted(value)}" for key, value in draft.columns.items()]
    lines += _FORMATS[draft.format]
    lines.append("max_length: 2048            # tokens; the plan counts examples that are longer")
    metrics = "[nll, nll_per_token, exact_match]" if draft.is_short else "[nll, nll_per_token]"
    return "\n".join([*lines, f"metric: {metrics}"]) + "\n"


_FORMATS = {
    "prompt_completion": ["chat_template: false        # true with an instruction-tuned model"],
    "messages": ["chat_template: true         # of the model; one without: chatml, gemma, ..."],
    "sharegpt": ["chat_template: true         # of the model; one without: chatml, gemma, ..."],
    "text": [],
}


def _share(rows: int) -> float:
    """The part of the rows for validation and for test: a twentieth, more of a few."""
    return max(0.05, min(0.25, round(FEW / max(rows, 1), 2)))


def _described(seen: Seen) -> Iterator[str]:
    """Yield a line per column: what it holds, how often it is empty, how long, an example."""
    width = max((len(_comment(name)) for name in seen.columns), default=0)
    for name, column in seen.columns.items():
        parts = [_types(column)]
        if column.num_empty:
            parts.append(f"{column.num_empty:,} empty")
        if column.most_characters:
            parts.append(f"at most {column.most_characters:,} characters")
        example = f"; {column.examples[0]!r:.{EXAMPLE}}" if column.examples else ""
        yield f"{_comment(name):{width}}  {', '.join(parts)}{_comment(example)}"


def experiment_config(path: str, name: str) -> str:
    """Return the text of conf/experiment/NAME.yaml: a first sweep over the rank."""
    return f"""\
# @package _global_
# A first sweep on {_comment(path)}: which rank does it need?
#   lorabench train -m experiment={name} model=ORG/NAME
# More to ask: head: exclude,lora   lora: r16,rslora   trainer.lr: 1e-4,2e-4   stages: ...
defaults:
  - override /data: {name}

sweep: {name}
hydra:
  sweeper:
    params:
      lora.r: 8,32
      seed: 0,1,2
"""


def _comment(text: str) -> str:
    """A text on one line."""
    return "".join(one if one.isprintable() else "?" for one in text)


def _quoted(text: str) -> str:
    """A text in YAML; "${" in it is not an interpolation."""
    return json.dumps(text.replace("${", "\\${"), ensure_ascii=False)
