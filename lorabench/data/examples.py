"""Examples in an Arrow table with a string column each, in memory or, if they are many, on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np

from lorabench import arrays, cache

if TYPE_CHECKING:
    import pyarrow as pa

AT_ONCE = 4096  # rows of a record batch


class Example(NamedTuple):
    """What the model reads and what it should write."""

    prompt: str
    completion: str
    id: str  # 16 hex digits of the hash of both; a repetition within its set gets another
    conversation: str = ""  # of chat data: all of it, as JSON; see conversations.conversation
    source: str = ""  # of a mixture: which of its sources


class Examples(Sequence[Example]):
    """Some rows of a table, in an order of their own.

    Args:
        table: columns prompt, completion, conversation, source.
        rows: (E,) places in the table.
        ids: (E,) the ids as numbers, uint64.
    """

    def __init__(self, table: pa.Table, rows: np.ndarray, ids: np.ndarray) -> None:
        self.table, self.rows, self.id_numbers = table, rows, ids

    @classmethod
    def of(cls, pairs: Sequence[Sequence[str]], ids: np.ndarray) -> Examples:
        """Return a few examples, given as prompts and completions."""
        columns = {
            name: [pair[i] for pair in pairs] for i, name in enumerate(("prompt", "completion"))
        }
        empty = {name: [""] * len(pairs) for name in ("conversation", "source")}
        import pyarrow as pa

        table = pa.table({**columns, **empty}, schema=schema())
        return cls(table, np.arange(len(pairs)), ids)

    def first(self, count: int | None) -> Examples:
        """The first examples only; None: all."""
        return Examples(self.table, self.rows[:count], self.id_numbers[:count])

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return list(self._some(index))
        row = int(self.rows[index])
        prompt, completion, conversation, source = (
            column[row].as_py() for column in self.table.columns
        )
        id = f"{int(self.id_numbers[index]):016x}"
        return Example(prompt, completion, id, conversation, source)

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), AT_ONCE):
            yield from self._some(slice(start, start + AT_ONCE))

    def __eq__(self, other: object) -> bool:
        """Equal to whatever holds the same examples."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def _some(self, part: slice) -> Iterator[Example]:
        """Take many at once: a call to Arrow each is slow."""
        taken = self.table.take(arrays.numbers(self.rows[part]))
        columns = [column.to_pylist() for column in taken.columns]
        ids = (f"{int(number):016x}" for number in self.id_numbers[part])
        for prompt, completion, conversation, source, id in zip(*columns, ids, strict=True):
            yield Example(prompt, completion, id, conversation, source)


def some(examples: Sequence[Example], places: Sequence[int]) -> Sequence[Example]:
    """Return the examples at these places; those of a table stay there."""
    if isinstance(examples, Examples):
        return Examples(examples.table, examples.rows[places], examples.id_numbers[places])
    return [examples[place] for place in places]


def schema() -> pa.Schema:
    """A string column for each text of an example."""
    import pyarrow as pa

    names = ("prompt", "completion", "conversation", "source")
    return pa.schema([(name, pa.string()) for name in names])


class Collector:
    """Collects rows in Arrow's format, in a `cache.Spool`."""

    def __init__(self) -> None:
        import pyarrow as pa

        self._pa, self._schema, self._file = pa, schema(), cache.Spool()
        self._stream = pa.ipc.new_stream(self._file, self._schema)
        self._waiting: list[tuple[str, str, str, str]] = []
        self.count = 0

    def add(self, prompt: str, completion: str, conversation: str = "", source: str = "") -> None:
        self._waiting.append((prompt, completion, conversation, source))
        self.count += 1
        if len(self._waiting) == AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        columns = [arrays.strings(column) for column in zip(*self._waiting, strict=True)]
        if columns:
            self._stream.write_batch(self._pa.record_batch(columns, schema=self._schema))
        self._waiting.clear()

    def table(self) -> pa.Table:
        """Return what was collected; nothing can be added after that."""
        self._flush()
        self._stream.close()
        content = self._pa.py_buffer(self._file.content())
        return self._pa.ipc.open_stream(self._pa.BufferReader(content)).read_all()
