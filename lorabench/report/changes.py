"""Predictions -> which examples each setting got right, and what it wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorabench.compare.scored import JUDGE
from lorabench.compare.tables import choose_evaluations
from lorabench.config import HIGHER_IS_BETTER
from lorabench.record import Evaluation, Record

RIGHT = ("answer", "answer_flexible", "exact_match", "accuracy")  # 1: right; the first there is
WRITTEN = ("generated", "predicted", "teacher_forced")  # columns with text; the first there is
LONGEST = 300  # characters of a text on the page
MOST_BYTES = 500_000  # of what was written, on the page; prompts and references come to it


@dataclass(frozen=True)
class Changes:
    """Per-example scores of settings on the test split.

    Args:
        metric: 0 or 1 an example if `is_right`, else any number.
        examples: ids.
        scores: mean over the seeds of each setting, (S, E); NaN: not scored.
        seeds: runs of each setting.
        written: what one seed of each setting wrote, (S, E), an index into `texts`; -1: nothing.
        texts: cut to LONGEST characters.
        left_out: examples that are not here; `num_examples` were scored.
        written_by: column that the texts are from; None: none.
    """

    metric: str
    is_right: bool
    higher_is_better: bool
    examples: list[str]
    scores: NDArray[np.float32]
    seeds: list[int]
    written: NDArray[np.int32]
    texts: list[str]
    num_examples: int
    written_by: str | None

    @property
    def left_out(self) -> int:
        return self.num_examples - len(self.examples)


def changes_of(
    runs: Sequence[tuple[Path, Record]], groups: Sequence[Sequence[str]], metric: str | None
) -> Changes | None:
    """Return what changed between settings; None: no two settings were scored on the same examples.

    Args:
        runs: folders and records.
        groups: of each setting, the ids of its runs.
        metric: that the verdicts are on, for runs that have none of right and wrong.
    """
    finished = [(path, one) for path, one in runs if one.status == "finished"]
    chosen = choose_evaluations([one for _, one in finished]).get(JUDGE)
    if chosen is None or len(groups) < 2:
        return None
    found: dict[str, tuple[Path, Evaluation]] = {
        one.run_id: (path, evaluation)
        for (path, one), evaluation in zip(finished, chosen["of_runs"], strict=True)
        if evaluation is not None
    }
    there = {name for _, one in found.values() for name in one.splits[JUDGE].metrics}
    of_right = next((name for name in RIGHT if name in there), None)
    asked = of_right or metric
    if asked is None:
        return None
    tables = [
        [table for run in ids if run in found and (table := _table(*found[run], asked))]
        for ids in groups
    ]
    return _changes(tables, asked, of_right is not None)


def _table(folder: Path, evaluation: Evaluation, metric: str) -> dict[str, Any] | None:
    """Ids, scores and texts of a run's test examples; None: they cannot be read."""
    import pyarrow as pa
    from pyarrow import compute, parquet

    column = "nll" if metric == "nll_per_token" else metric
    try:
        file = parquet.ParquetFile(folder / evaluation.predictions)
        names = file.schema_arrow.names
        if column not in names:
            return None
        text = next((name for name in WRITTEN if name in names), None)
        table = file.read(["split", "example", column, *([text] if text else [])])
    except (OSError, pa.ArrowException):
        return None
    table = table.filter(compute.equal(table["split"], JUDGE))
    return {
        "ids": table["example"].to_pylist(),
        "scores": np.asarray(table[column].cast(pa.float64()).to_numpy(), np.float64),
        "texts": table[text].to_pylist() if text else None,
        "column": text,
    }


def _changes(tables: list[list[dict[str, Any]]], metric: str, is_right: bool) -> Changes | None:
    first = next((one for mine in tables for one in mine), None)
    if first is None:
        return None
    ids: list[str] = list(dict.fromkeys(first["ids"]))
    places = {name: place for place, name in enumerate(ids)}
    scores = np.full((len(tables), len(ids)), np.nan)
    texts: dict[str, int] = {}
    written = np.full((len(tables), len(ids)), -1, np.int32)
    for i, mine in enumerate(tables):
        own = np.full((len(mine), len(ids)), np.nan)
        for k, one in enumerate(mine):
            known = [places.get(name, -1) for name in one["ids"]]
            inside = np.array(known) >= 0
            own[k, np.array(known)[inside]] = one["scores"][inside]
        if mine:
            count = np.isfinite(own).sum(0)
            total = np.nansum(own, 0)
            scores[i] = np.divide(total, count, out=np.full(len(ids), np.nan), where=count > 0)
            for name, text in zip(mine[0]["ids"], mine[0]["texts"] or (), strict=False):
                if name in places and text is not None:
                    written[i, places[name]] = texts.setdefault(shortened(text), len(texts))
    if np.isfinite(scores).any(1).sum() < 2:
        return None
    kept, chosen = _within(scores, written, list(texts))
    order = {old: new for new, old in enumerate(chosen)}
    return Changes(
        metric,
        is_right,
        is_right or metric in HIGHER_IS_BETTER,
        [ids[i] for i in kept],
        scores[:, kept].astype(np.float32),
        [len(mine) for mine in tables],
        np.vectorize(lambda i: order.get(int(i), -1), otypes=[np.int32])(written[:, kept]),
        [list(texts)[i] for i in chosen],
        len(ids),
        first["column"],
    )


def _within(
    scores: NDArray[np.float64], written: NDArray[np.int32], texts: list[str]
) -> tuple[list[int], list[int]]:
    """Examples and texts that fit the page: those first whose scores differ most."""
    low, high = np.nanmin(_filled(scores), 0), np.nanmax(_filled(scores), 0)
    by_spread = np.argsort(-(high - low), kind="stable")
    kept: list[int] = []
    seen: dict[int, None] = {}
    total = 0
    for i in by_spread:
        own = [int(one) for one in written[:, i] if one >= 0 and int(one) not in seen]
        total += sum(len(texts[one].encode()) + 4 for one in dict.fromkeys(own))
        total += 12 * len(scores)
        if total > MOST_BYTES and kept:
            break
        kept.append(int(i))
        seen |= dict.fromkeys(own)
    return sorted(kept), list(seen)


def _filled(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same with each example's mean where it was not scored."""
    count = np.isfinite(scores).sum(0)
    mean = np.divide(np.nansum(scores, 0), count, out=np.zeros(scores.shape[1]), where=count > 0)
    return np.where(np.isfinite(scores), scores, mean)


def shortened(text: str, longest: int = LONGEST) -> str:
    """A text that fits, with what was left out of it."""
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text) - longest:,} more)"


def number(value: float) -> float | None:
    """A number for JSON, which knows no NaN."""
    return round(float(value), 6) if math.isfinite(value) else None
