"""Tables: csv and tsv, whose cells are text, and parquet."""

from __future__ import annotations

import csv
import decimal
import hashlib
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from lorabench.data.readers.opening import BLOCK_BYTES, Refused, lines, opened
from lorabench.data.readers.row import Row

BATCH_ROWS = 1024
OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}


def delimited_rows(blocks: Iterator[str], path: Path, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a csv or tsv file below its header; every cell is text.

    Cells may be quoted and then hold delimiters and line breaks. Blank lines are left out. A
    row with too many or too few cells carries an error; an unbalanced quote ends the file.

    Raises:
        Refused: The header names a column twice, or is separated by something else.
    """
    csv.field_size_limit(sys.maxsize)  # 131,072 characters by default, less than a long document
    reader = csv.reader(lines(blocks), delimiter=delimiter, strict=True)
    header: list[str] = []
    number = 1
    try:
        for cells in reader:
            start, number = number, reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = _header(cells, path, delimiter)
                continue
            where = f"line {start} of {path}"
            if len(cells) == len(header):
                yield Row(start, dict(zip(header, cells, strict=True)), where)
            else:
                error = f"it has {len(cells)} cells, the header {len(header)}"
                yield Row(start, {}, where, f"{error}: quote cells that hold the delimiter")
    except csv.Error as error:
        reason = str(error)
        if "unexpected end of data" in reason:
            reason = "a quote is opened that no other one closes"
        elif "new-line character" in reason:
            reason = "a carriage return stands outside of quotes"
        yield Row(number, {}, f"line {number} of {path}", reason)


def _header(cells: list[str], path: Path, delimiter: str) -> list[str]:
    name, count = Counter(cells).most_common(1)[0]
    if count > 1:
        came = f"'{name}' stands {count} times in the first line of {path}"
        raise Refused("name every column once", came, "rename or remove the others")
    if len(cells) == 1:
        for other, plural in OTHER_DELIMITERS.items():
            if other in cells[0] and other != delimiter:
                law = f"have cells separated by {OTHER_DELIMITERS[delimiter]}"
                came = f"the first line of {path} has {plural}: {cells[0]!r:.40}"
                raise Refused(law, came, "save the file again, or name it .tsv if it has tabs")
    return cells


def parquet_rows(
    path: Path, unpack: bool, digest: Any, only: Collection[str] | None
) -> Iterator[Row]:
    """Yield the rows of a parquet file; nested values are lists and dicts.

    A decimal is its exact text. Timestamps, dates and bytes stay what pyarrow makes of them; where
    text is meant they are refused, because there is more than one way to write them.

    Args:
        unpack: Whether the file is compressed as a whole.
        digest: A hashlib object to feed with the file's bytes.
        only: Names of the columns to read; None, or one that is not there: all.
    Raises:
        Refused: It is no parquet file, or it changes while it is read.
    """
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() if unpack else open(path, "rb") as file:
        if unpack:  # parquet is read by seeking
            with opened(path, unpack, digest) as packed:
                shutil.copyfileobj(packed, file, BLOCK_BYTES)
        before = _hash(file, None if unpack else digest)
        try:
            table = parquet.ParquetFile(file)
            there = table.schema_arrow.names
            columns = list(only) if only is not None and set(only) <= set(there) else None
            number = 0
            for batch in table.iter_batches(BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    cells = {name: _plain(cell) for name, cell in row.items()}
                    yield Row(number, cells, f"row {number} of {path}")
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            reason = next(iter(str(error).splitlines()), "").rstrip(". ")
            came = f"'{path}' is none, or is torn: {reason}"
            raise Refused("be a parquet file", came, "write or fetch it again") from error
        if _hash(file) != before:
            came = f"'{path}' has other bytes now"
            raise Refused("not change while it is read", came, "run again once nothing writes")


def _plain(value: Any) -> Any:
    if isinstance(value, decimal.Decimal):
        return str(value)
    return value


def _hash(file: IO[bytes], digest: Any = None) -> bytes:
    """Return the sha256 of a whole file, and feed `digest` with it too."""
    own = hashlib.sha256()
    file.seek(0)
    while block := file.read(BLOCK_BYTES):
        own.update(block)
        if digest is not None:
            digest.update(block)
    file.seek(0)
    return own.digest()
