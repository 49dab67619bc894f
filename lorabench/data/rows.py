"""What is read from one source, or from several that are mixed."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from lorabench.data.examples import Collector, Examples


class Rows:
    """What is read from one source: the rows as a table, and three numbers of each."""

    def __init__(self) -> None:
        self._rows = Collector()
        self._ids, self._prompts, self._places = array("Q"), array("Q"), array("d")

    @classmethod
    def joined(cls, chosen: Sequence[tuple[Rows, np.ndarray]]) -> Rows:
        """Return some rows of several sources as those of one, in that order."""
        import pyarrow as pa

        found, first, at = cls(), 0, []
        for rows, places in chosen:
            rows.finish()
            at.append(first + places)
            first += len(rows)
            found._ids.extend(np.array(rows._ids, np.uint64)[places].tolist())
        found.table = pa.concat_tables([rows.table for rows, _ in chosen])
        found.places = np.concatenate([rows.places[places] for rows, places in chosen])
        found.prompts = np.concatenate([rows.prompts[places] for rows, places in chosen])
        found.at = np.concatenate(at)
        return found

    def __len__(self) -> int:
        return len(self._ids)

    def add(
        self,
        prompt: str,
        completion: str,
        conversation: str = "",
        group: str | None = None,
        source: str = "",
    ) -> None:
        """Add an example; equal groups will be in the same split (None: the prompt)."""
        self._rows.add(prompt, completion, conversation, source)
        self._ids.append(_id(prompt, completion, conversation, 0))
        self._prompts.append(_number(prompt or completion))
        self._places.append(_place(prompt if group is None else group))

    def finish(self) -> None:
        """Nothing is added any more."""
        if hasattr(self, "table"):
            return
        self.table = self._rows.table()
        self.at = np.arange(len(self))  # the place of each row in the table
        self.places, self.prompts = np.array(self._places), np.array(self._prompts, np.uint64)

    def examples(self, rows: np.ndarray) -> Examples:
        """Return some of the rows, with ids that occur once among them."""
        self.finish()
        ids = np.array(self._ids, np.uint64)[rows]
        _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        seen: Counter[int] = Counter()
        for at in np.flatnonzero(counts[inverse] > 1):
            repeated = seen[first := int(ids[at])]
            seen[first] += 1
            if repeated:
                prompt, completion, conversation, _ = (
                    column[int(self.at[rows[at]])].as_py() for column in self.table.columns
                )
                ids[at] = _id(prompt, completion, conversation, repeated)
        return Examples(self.table, self.at[rows], ids)

    def first(self, count: int | None) -> tuple[Examples, np.ndarray]:
        """Return the first rows by id, and their places; the order is random but fixed."""
        every = self.examples(np.arange(len(self)))
        order = np.argsort(every.id_numbers, kind="stable")[:count]
        return Examples(self.table, self.at[order], every.id_numbers[order]), order


def identified(pairs: Iterable[tuple[str, str]]) -> Examples:
    """Return examples that are made, not read, in their order."""
    rows = Rows()
    for pair in pairs:
        rows.add(*pair)
    return rows.examples(np.arange(len(rows)))


def _place(group: str) -> float:
    """Return a number in [0, 1) that depends on the group alone: its hash as a fraction."""
    return _number(f"split\0{group}") / 2**64


def _id(prompt: str, completion: str, conversation: str, repeated: int) -> int:
    """Return an id that depends on content alone, and on how often it came before in its set."""
    what = [conversation] if conversation else [prompt, completion]
    return _number(json.dumps([*what, repeated]))


def hashes_of(texts: Iterable[str]) -> np.ndarray:
    """Return the first 64 bits of each text's sha256, uint64."""
    return np.array([_number(text) for text in texts], np.uint64)


def _number(text: str) -> int:
    """Return the first 64 bits of a text's sha256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
