"""Data files as rows: jsonl, json, csv, tsv, parquet and text, and .gz of each.

`rows` streams: it holds a block of the file, one row, or one batch of a parquet file. It imports
pyarrow for parquet only.

opening   bytes -> text: compression and encoding
objects   json
tables    csv, tsv and parquet
texts     plain text
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lorabench.data.readers.objects import file_rows, line_rows
from lorabench.data.readers.opening import Refused, opened, text_blocks
from lorabench.data.readers.row import Row
from lorabench.data.readers.tables import delimited_rows, parquet_rows
from lorabench.data.readers.texts import text_rows

__all__ = ["ENDINGS", "Refused", "Row", "kind_of", "rows"]

ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}


def kind_of(path: Path) -> str | None:
    """Return what a file's name says it is, a value of ENDINGS; None: nothing known."""
    return ENDINGS.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def rows(
    path: Path,
    digest: Any = None,
    *,
    kind: str | None = None,
    strict: bool = True,
    only: Collection[str] | None = None,
    sample_by: str = "document",
) -> Iterator[Row]:
    """Yield the rows of a file in its order; a row that cannot be read carries an error.

    After an error of syntax in json or csv nothing more can be told apart, and no row follows.

    Args:
        digest: A hashlib object; after the last row it has been fed with the file's bytes, those
            that the rows were read from.
        kind: A value of ENDINGS; None: what the name says.
        strict: For jsonl: refuse NaN and unpaired surrogates in unused columns too.
        only: For parquet: the columns to read; None, or one that is not there: all.
        sample_by: For text: what a row is: document, paragraph or line.
    Raises:
        Refused: The whole file cannot be read: encoding, compression, header, no such kind.
        OSError: It cannot be opened.
    """
    kind = kind or kind_of(path)
    unpack = path.name.lower().endswith(".gz")
    if kind is None:
        law = f"have a name that ends with {', '.join(ENDINGS)}, or .gz after one of them"
        raise Refused(law, f"got '{path}'", "rename the file")
    if kind == "parquet":
        yield from parquet_rows(path, unpack, digest, only)
        return
    with opened(path, unpack, digest) as file:
        blocks = text_blocks(file, path)
        if kind == "jsonl":
            yield from line_rows(blocks, path, strict)
        elif kind == "json":
            yield from file_rows(blocks, path)
        elif kind == "text":
            yield from text_rows(blocks, path, sample_by)
        else:
            yield from delimited_rows(blocks, path, "\t" if kind == "tsv" else ",")
