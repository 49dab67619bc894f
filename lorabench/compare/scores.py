"""Per-example scores of runs, side by side: read from their predictions, paired by example."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorabench.record import Evaluation


@dataclass(frozen=True)
class Scores:
    """One metric of one run on one split.

    Args:
        examples: ids of the examples, shared by runs that were scored on the same ones.
        values: one an example; NaN where it was not asked or is not finite.
    """

    examples: tuple[str, ...]
    values: NDArray[np.float64]


class Reader:
    """Reads predictions; runs that were scored on the same examples share their ids."""

    def __init__(self, split: str, metric: str):
        self.split, self.metric = split, metric
        self._known: list[tuple[Any, tuple[str, ...]]] = []

    def read(self, folder: Path, evaluation: Evaluation) -> Scores | str:
        """Return a run's scores, or why there are none."""
        import pyarrow as pa
        from pyarrow import compute, parquet

        recorded = evaluation.predictions_sha256
        column = "nll" if self.metric == "nll_per_token" else self.metric
        try:
            content = (folder / evaluation.predictions).read_bytes()
            if recorded and hashlib.sha256(content).hexdigest() != recorded:
                return "its predictions are not those that were recorded"
            file = parquet.ParquetFile(pa.BufferReader(content))
            if column not in file.schema_arrow.names:
                return f"its predictions hold no {self.metric}"
            table = file.read(["split", "example", column], use_threads=False)
        except FileNotFoundError:
            return "its predictions are gone"
        except (OSError, pa.ArrowException):
            return "its predictions cannot be read"
        table = table.filter(compute.equal(table["split"], self.split))
        ids = table["example"].combine_chunks()
        values = table[column].cast(pa.float64()).to_numpy()
        return Scores(self._examples(ids), np.asarray(values, dtype=np.float64))

    def _examples(self, ids: Any) -> tuple[str, ...]:
        for known, examples in self._known:
            if ids.equals(known):
                return examples
        self._known.append((ids, _unlike(ids.to_pylist())))
        return self._known[-1][1]


def _unlike(ids: list[str]) -> tuple[str, ...]:
    """Ids of which none comes twice: equal examples are told apart by their count."""
    seen: dict[str, int] = {}
    found = []
    for one in ids:
        seen[one] = seen.get(one, 0) + 1
        found.append(one if seen[one] == 1 else f"{one}#{seen[one]}")
    return tuple(found)


def aligned(scores: Sequence[Scores]) -> NDArray[np.float64]:
    """Values of all on the examples that each of them has a value for, (len(scores), N)."""
    first = scores[0].examples
    if all(one.examples is first or one.examples == first for one in scores):
        table = np.stack([one.values for one in scores])
    else:
        places = [dict(zip(one.examples, range(len(one.examples)), strict=True)) for one in scores]
        shared = [name for name in first if all(name in one for one in places)]
        table = np.stack(
            [
                one.values[[place[name] for name in shared]]
                for one, place in zip(scores, places, strict=True)
            ]
        )
    return table[:, np.isfinite(table).all(0)]
