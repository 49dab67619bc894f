"""JSON: one object per line, an array of objects, or one object that holds such an array.

Read with `json`, not with datasets' reader: that one turns "2020-01-01" into a datetime, 1 beside
2.5 into 1.0, and a long integer into a float.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from lorabench.data.readers.opening import Refused, lines
from lorabench.data.readers.row import Row

SPACE = re.compile(r"[ \t\n\r]*")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # the only way into JSON that is valid Unicode
# A JSON file that begins with an object is looked at this far, to see what follows the object.
LOOK_CHARACTERS = 1 << 24
# One object with such a list is a row of chat data, no wrapper around rows.
CONVERSATIONS = ("messages", "conversations", "conversation")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key '{key}' occurs twice in one object")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


LENIENT = json.JSONDecoder(object_pairs_hook=_unique)
STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number)


def line_rows(blocks: Iterator[str], path: Path, strict: bool) -> Iterator[Row]:
    """Yield the object of each line that is not blank; of a bad line, a row with its error.

    Args:
        strict: Refuse NaN, Infinity and unpaired surrogates in every column, not only in those
            that are used.
    """
    decoder = STRICT if strict else LENIENT
    for number, line in enumerate(lines(blocks), 1):
        text = line.strip(" \t\r\n")
        if not text:
            continue
        where = f"line {number} of {path}"
        try:
            value = decoder.decode(text)
        except (ValueError, RecursionError) as error:
            yield Row(number, {}, where, _reason(error))
        else:
            yield _row(number, value, where, text if strict else "")


def file_rows(blocks: Iterator[str], path: Path) -> Iterator[Row]:
    """Yield the objects of a .json file, one after another, without holding the others.

    They are the elements of an array, or of the only list of objects that a single object holds,
    or objects that follow one another (JSON lines). A syntax error ends the file: the last row
    carries it.
    """
    scanner = _Scanner(blocks)
    try:
        if scanner.peek() == "[":
            yield from _elements(scanner, path)
        elif scanner.peek() == "{":
            yield from _objects(scanner, path)
        elif scanner.peek():
            yield Row(1, {}, f"line {scanner.line(scanner.at)} of {path}", "no object and no array")
            return
        if scanner.peek():
            yield Row(
                0,
                {},
                f"line {scanner.line(scanner.at)} of {path}",
                "text after the end of the data",
            )
    except (ValueError, RecursionError) as error:
        if isinstance(error, Refused):
            raise
        at = error.pos if isinstance(error, json.JSONDecodeError) else scanner.at
        yield Row(0, {}, f"line {scanner.line(at)} of {path}", _reason(error))


def _objects(scanner: _Scanner, path: Path) -> Iterator[Row]:
    """Yield the rows of a file that begins with an object."""
    if not scanner.is_value_within(LOOK_CHARACTERS):
        yield from _members(scanner, path)
        return
    start, value, text = scanner.value()
    if scanner.peek() == "{":
        number = 1
        yield _row(number, value, f"line {start} of {path}", text)
        while scanner.peek() == "{":
            number += 1
            start, value, text = scanner.value()
            yield _row(number, value, f"line {start} of {path}", text)
        return
    wrapped = [key for key, item in value.items() if _is_list_of_objects(item)]
    if not wrapped or wrapped[0] in CONVERSATIONS:
        yield _row(1, value, f"line {start} of {path}", text)
        return
    _only_one(wrapped, path)
    for number, item in enumerate(value[wrapped[0]], 1):
        yield _row(number, item, f"row {number} of '{wrapped[0]}' in {path}", text)


def _members(scanner: _Scanner, path: Path) -> Iterator[Row]:
    """Yield the rows of one large object: the elements of its only list of objects."""
    scanner.take("{")
    wrapped: list[str] = []
    while scanner.peek() != "}":
        key = scanner.value()[1]
        scanner.take(":")
        if scanner.peek() != "[":
            scanner.value()
        else:
            for row in _elements(scanner, path):
                if row.error and key not in wrapped:
                    continue  # a list of something else
                if row.number == 1:
                    wrapped.append(key)
                    _only_one(wrapped, path)
                yield row
        if scanner.peek() != "}":
            scanner.take(",")
    scanner.take("}")
    if not wrapped:
        yield Row(0, {}, str(path), "it is one object without a list of objects")


def _elements(scanner: _Scanner, path: Path) -> Iterator[Row]:
    scanner.take("[")
    number = 0
    while scanner.peek() != "]":
        number += 1
        line, value, text = scanner.value()
        yield _row(number, value, f"row {number} of {path} (line {line})", text)
        if scanner.peek() != "]":
            scanner.take(",")
    scanner.take("]")


def _is_list_of_objects(value: Any) -> bool:
    return bool(value) and isinstance(value, list) and isinstance(value[0], dict)


def _only_one(keys: list[str], path: Path) -> None:
    if len(keys) > 1:
        raise Refused(
            "hold one list of objects",
            f"{path} holds '{keys[0]}' and '{keys[1]}'",
            "put the rows of one of them into a file of their own",
        )


def _row(number: int, value: Any, where: str, text: str) -> Row:
    """Return a parsed value as a row; `text` is its JSON, where surrogates are to be found."""
    if not isinstance(value, dict):
        return Row(number, {}, where, f"it is {value!r:.40}")
    if text and SURROGATE.search(text):
        for column, cell in value.items():
            try:
                json.dumps([column, cell], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                error = f"column {column!a:.40} holds an unpaired surrogate: {cell!a:.40}"
                return Row(number, {}, where, error)
    return Row(number, value, where)


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        found = error.doc[error.pos : error.pos + 20]
        return f"{error.msg} at {found!r}" if found else f"{error.msg} at its end"
    return str(error)


class _Scanner:
    """Reads JSON values from text that comes in blocks, and holds one block of it."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self.blocks = blocks
        self.text, self.at, self.is_all = "", 0, False
        self.lines, self.counted = 1, 0  # the line of text[counted]

    def peek(self) -> str:
        """Go to the next character that is not space and return it; "" at the end."""
        while True:
            if found := SPACE.match(self.text, self.at):
                self.at = found.end()
            if self.at < len(self.text) or self.is_all:
                return self.text[self.at : self.at + 1]
            self._more(1)

    def take(self, expected: str) -> None:
        """Go past a character of the syntax. Raises json.JSONDecodeError if another one comes."""
        if self.peek() != expected:
            raise json.JSONDecodeError(f"Expecting '{expected}'", self.text, self.at)
        self.at += 1

    def value(self) -> tuple[int, Any, str]:
        """Return the line on which the next value begins, the value, and its text.

        Raises:
            ValueError: It is no JSON; a json.JSONDecodeError knows the place.
        """
        self.peek()
        line = self.line(self.at)
        while (found := self._decoded()) is None:
            self._more(len(self.text) - self.at)
        value, end = found
        text = self.text[self.at : end]
        self.at = end
        return line, value, text

    def is_value_within(self, most: int) -> bool:
        """Return whether the next value is complete, or wrong, within so many characters."""
        self.peek()
        try:
            while self._decoded() is None:
                if len(self.text) - self.at > most:
                    return False
                self._more(len(self.text) - self.at)
        except (ValueError, RecursionError):
            pass
        return True

    def line(self, at: int) -> int:
        """Return the line of a place that is not before one already asked for."""
        self.lines += self.text.count("\n", self.counted, at)
        self.counted = max(self.counted, at)
        return self.lines

    def _decoded(self) -> tuple[Any, int] | None:
        """Return the value at this place and its end; None if it goes on after the text held."""
        try:
            value, end = STRICT.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            is_cut = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated")
            if self.is_all or not is_cut:
                raise
            return None
        return (value, end) if end < len(self.text) or self.is_all else None  # 12 may become 123

    def _more(self, characters: int) -> None:
        """Forget what was read, and read at least so many characters more if there are any."""
        self.line(self.at)
        new = [self.text[self.at :]]
        while characters > 0 and not self.is_all:
            block = next(self.blocks, "")
            self.is_all = not block
            new.append(block)
            characters -= len(block)
        self.counted -= self.at
        self.text, self.at = "".join(new), 0
