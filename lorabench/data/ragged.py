"""Lists of integers of different lengths, end to end in one array."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class Ragged:
    """E lists of integers, held in two arrays; either may lie in a memory-mapped file.

    Args:
        values: (N,) the integers of all lists, end to end.
        ends: (E,) where each list ends.
    """

    def __init__(self, values: np.ndarray, ends: np.ndarray) -> None:
        self.values = values
        self.ends = ends

    @classmethod
    def of(cls, lists: Iterable[Sequence[int]]) -> Ragged:
        """Return these lists."""
        kept = list(lists)
        count = sum(map(len, kept))
        values = np.fromiter(itertools.chain.from_iterable(kept), dtype=np.int32, count=count)
        return cls(values, np.cumsum([len(one) for one in kept], dtype=np.int64))

    @property
    def lengths(self) -> np.ndarray:
        """(E,) how many integers each list has."""
        return np.diff(self.ends, prepend=0)

    def row(self, index: int) -> np.ndarray:
        """Return one list as a view."""
        index = int(index)
        return self.values[int(self.ends[index - 1]) if index else 0 : int(self.ends[index])]

    def first(self, count: int) -> Ragged:
        """Return the first lists only."""
        ends = self.ends[:count]
        return Ragged(self.values[: int(ends[-1]) if len(ends) else 0], ends)

    def distinct(self) -> list[int]:
        """Return every integer that occurs, once."""
        found: set[int] = set()
        for start in range(0, len(self.values), 1 << 20):
            found.update(np.unique(self.values[start : start + (1 << 20)]).tolist())
        return sorted(found)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> list[int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.row(index % len(self)).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Equal to whatever holds the same lists."""
        if not isinstance(other, Ragged | list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(a == list(b) for a, b in zip(self, other))  # noqa: B905

    __hash__ = None  # type: ignore[assignment]
