"""Predictions -> which examples each setting got right, and what it wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorabench import hashes
from lorabench.compare.scored import JUDGE
from lorabench.compare.tables import choose_evaluations
from lorabench.config import HIGHER_IS_BETTER
from lorabench.record import Evaluation, Record
from lorabench.report.curves import mean_of

RIGHT = ("answer", "answer_flexible", "exact_match", "accuracy")  # 1: right; the first there is
# The columns that hold what such a score is of; of other metrics the first that is there.
WRITTEN = {
    "answer": ("generated",), "answer_flexible": ("generated",), "gym": ("generated",),
    "exact_match": ("teacher_forced",), "accuracy": ("predicted",),
}  # fmt: skip
TEXTS = ("generated", "predicted", "teacher_forced")
LONGEST = 300  # characters of a text on the page
MOST_BYTES = 500_000  # of what was written, on the page; prompts and references come to it


@dataclass(frozen=True)
class Changes:
    """Per-example scores of settings on the test split.

    Args:
        metric: 0 or 1 an example if `is_right`, else any number.
        examples: ids of those that are shown.
        scores: mean over the seeds of each setting, (S, E); NaN: not scored.
        own: scores of the one run of each setting that the texts are of, (S, E).
        seeds: runs of each setting.
        gained: examples that are better in one setting than in another, of all examples, (S, S):
            from the row's setting to the column's. Right and wrong are right in half of the seeds.
        both: examples that two settings have scores of, (S, S).
        written: what one run of each setting wrote, (S, E), an index into `texts`; -1: nothing.
        texts: cut to LONGEST characters.
        num_examples: that were scored; not all of them may be shown.
        written_by: column that the texts are from; None: none.
        seed: whose texts they are; None: the settings share no seed.
    """

    metric: str
    is_right: bool
    higher_is_better: bool
    examples: list[str]
    scores: NDArray[np.float32]
    own: NDArray[np.float32]
    seeds: list[int]
    gained: NDArray[np.int64]
    both: NDArray[np.int64]
    written: NDArray[np.int32]
    texts: list[str]
    num_examples: int
    written_by: str | None
    seed: int | None

    @property
    def left_out(self) -> int:
        return self.num_examples - len(self.examples)


@dataclass(frozen=True)
class _Table:
    """A run's test examples."""

    seed: Any  # of the config
    ids: list[str]
    scores: NDArray[np.float64]
    texts: list[str | None]
    column: str | None


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
    found: dict[str, tuple[Path, Evaluation, Any]] = {
        one.run_id: (path, evaluation, one.config.get("seed"))
        for (path, one), evaluation in zip(finished, chosen["of_runs"], strict=True)
        if evaluation is not None
    }
    there = {name for _, one, _ in found.values() for name in one.splits[JUDGE].metrics}
    of_right = next((name for name in RIGHT if name in there), None)
    asked = of_right or metric
    if asked is None:
        return None
    tables = [
        [table for run in ids if run in found and (table := _table(*found[run], asked))]
        for ids in groups
    ]
    return _changes(tables, asked, of_right is not None)


def _table(folder: Path, evaluation: Evaluation, seed: Any, metric: str) -> _Table | None:
    """A run's test examples; None: they cannot be read, or are not what was recorded."""
    import pyarrow as pa
    from pyarrow import compute, parquet

    column = "nll" if metric == "nll_per_token" else metric
    place, recorded = folder / evaluation.predictions, evaluation.predictions_sha256
    try:
        if recorded and hashes.file_hash(place) != recorded:
            return None
        file = parquet.ParquetFile(place)
        names = file.schema_arrow.names
        if column not in names:
            return None
        text = next((name for name in WRITTEN.get(metric, TEXTS) if name in names), None)
        table = file.read(["split", "example", column, *([text] if text else [])])
    except (OSError, pa.ArrowException):
        return None
    table = table.filter(compute.equal(table["split"], JUDGE))
    ids = table["example"].to_pylist()
    values = np.asarray(table[column].cast(pa.float64()).to_numpy(), np.float64)
    texts = table[text].to_pylist() if text else [None] * len(ids)
    return _Table(seed, ids, values, texts, text)


def _changes(tables: list[list[_Table]], metric: str, is_right: bool) -> Changes | None:
    ids = list(dict.fromkeys(name for mine in tables for one in mine for name in one.ids))
    places = {name: place for place, name in enumerate(ids)}
    shape = len(tables), len(ids)
    scores, own = np.full(shape, np.nan), np.full(shape, np.nan)
    written = np.full(shape, -1, np.int32)
    texts: dict[str, int] = {}
    seed = _shared_seed(tables)
    column = None
    for i, mine in enumerate(tables):
        if not mine:
            continue
        every = np.full((len(mine), len(ids)), np.nan)
        for k, one in enumerate(mine):
            every[k, [places[name] for name in one.ids]] = one.scores
        scores[i] = mean_of(every, 0)
        k = next((k for k, one in enumerate(mine) if one.seed == seed), 0)
        own[i], column = every[k], column or mine[k].column
        for name, text in zip(mine[k].ids, mine[k].texts, strict=True):
            if text is not None:
                written[i, places[name]] = texts.setdefault(shortened(text), len(texts))
    if np.isfinite(scores).any(1).sum() < 2:
        return None
    higher = is_right or metric in HIGHER_IS_BETTER
    gained, both = _counts(scores, is_right, higher)
    kept, chosen = _within(scores, written, list(texts))
    order = {old: new for new, old in enumerate(chosen)}
    return Changes(
        metric,
        is_right,
        higher,
        [ids[i] for i in kept],
        scores[:, kept].astype(np.float32),
        own[:, kept].astype(np.float32),
        [len(mine) for mine in tables],
        gained,
        both,
        np.vectorize(lambda i: order.get(int(i), -1), otypes=[np.int32])(written[:, kept]),
        [list(texts)[i] for i in chosen],
        len(ids),
        column,
        seed,
    )


def _shared_seed(tables: list[list[_Table]]) -> Any:
    """The first seed that every setting has; None: there is none."""
    shared = set.intersection(*({one.seed for one in mine} for mine in tables if mine))
    return min(shared, default=None, key=str)


def _counts(
    scores: NDArray[np.float64], is_right: bool, higher_is_better: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many examples are better in one setting than in another, and scored in both, (S, S)."""
    known = np.isfinite(scores)
    values = (scores >= 0.5).astype(float) if is_right else scores * (1 if higher_is_better else -1)
    better = [
        ((values > one) & known & there).sum(1) for one, there in zip(values, known, strict=True)
    ]
    return np.array(better), known.astype(np.int64) @ known.astype(np.int64).T


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
    return np.where(np.isfinite(scores), scores, np.nan_to_num(mean_of(scores, 0)))


def shortened(text: str, longest: int = LONGEST) -> str:
    """A text that fits, with what was left out of it."""
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text) - longest:,} more)"


def number(value: float) -> float | None:
    """A number for JSON, which knows no NaN."""
    return round(float(value), 6) if math.isfinite(value) else None
