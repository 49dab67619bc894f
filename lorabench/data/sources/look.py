"""What a data file holds, in one pass: for people who write a config for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorabench.config import SourceConfig
from lorabench.data.readers import Refused, rows
from lorabench.data.sources.found import find

NUM_EXAMPLES = 3


@dataclass
class Column:
    """What the cells of one column are."""

    types: dict[str, int] = field(default_factory=dict)  # Python's name of a type -> cells
    num_empty: int = 0  # null, missing, or blank text
    most_characters: int = 0  # of the cells that are text
    examples: list[Any] = field(default_factory=list)  # of the first rows where it is not empty


@dataclass
class Seen:
    """What lies at a path of data.source=path."""

    kind: str  # a value of readers.ENDINGS
    files: list[Path]
    num_rows: int = 0
    columns: dict[str, Column] = field(default_factory=dict)  # in the order of the file


def look(path: str | Path, sample_by: str = "document") -> Seen:
    """Return kind, columns, number of rows and examples of a file, a folder or a glob.

    Raises:
        Refused: It is none, or a row of it cannot be read; says where and what to do.
        OSError: It cannot be read.
    """
    found = find(SourceConfig(path=str(path)))
    if found.kind == "hub":
        law = "be a file, a folder or a glob of this machine"
        raise Refused(law, f"'{path}' does not exist", "correct the path")
    seen = Seen(found.kind, found.files)
    for file in found.files:
        for row in rows(file, kind=found.kind, sample_by=sample_by):
            if row.error:
                remedy = "correct or remove the row"
                raise Refused("hold readable rows", f"{row.where}: {row.error}", remedy)
            seen.num_rows += 1
            for name, cell in row.columns.items():
                _add(seen.columns.setdefault(name, Column()), cell)
    for column in seen.columns.values():  # where a row lacks it
        column.num_empty += seen.num_rows - sum(column.types.values())
    return seen


def _add(column: Column, cell: Any) -> None:
    kind = type(cell).__name__
    column.types[kind] = column.types.get(kind, 0) + 1
    if isinstance(cell, str):
        column.most_characters = max(column.most_characters, len(cell))
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        column.num_empty += 1
    elif len(column.examples) < NUM_EXAMPLES:
        column.examples.append(cell)
