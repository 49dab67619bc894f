"""Plain text, whose rows have one column, `text`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from lorabench.data.readers.opening import lines
from lorabench.data.readers.row import Row


def text_rows(blocks: Iterator[str], path: Path, sample_by: str) -> Iterator[Row]:
    """Yield the documents, paragraphs or lines of a text file that are not blank.

    Line ends are \\n afterwards, as in datasets' loader of text, from which the names come.

    Args:
        sample_by: document: the whole file; paragraph: what is between blank lines; line.
    """
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    ends = ((block, False) for block in blocks)
    blocks = (newlines.decode(*end) for end in chain(ends, [("", True)]))
    if sample_by == "document":
        text = "".join(blocks)
        if text.strip():
            yield Row(1, {"text": text}, str(path))
        return
    start, paragraph = 1, ""
    for number, line in enumerate(lines(blocks), 1):
        if sample_by == "line":
            if line.strip():
                yield Row(number, {"text": line.rstrip("\n")}, f"line {number} of {path}")
        elif line.strip():
            start, paragraph = (start, paragraph + line) if paragraph else (number, line)
        elif paragraph:
            yield Row(start, {"text": paragraph.rstrip("\n")}, f"line {start} of {path}")
            paragraph = ""
    if paragraph:
        yield Row(start, {"text": paragraph.rstrip("\n")}, f"line {start} of {path}")
