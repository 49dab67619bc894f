"""Results of PEFT's own benchmark as rows beside those of a sweep.

Every file is one run under one seed, so these rows are context for a comparison, never evidence in
a verdict. What a file says is read in `peft_results`. Imports without torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from lorabench.compare.peft_results import ForeignRow, row_of
from lorabench.compare.tables import spread
from lorabench.config import ConfigErrors

__all__ = ["ForeignRow", "intervals", "is_foreign", "read", "table_rows", "wilson"]

ONE_SEED = "one seed: no verdict between settings is possible"
HIGHER_IS_BETTER = {"accuracy", "dino_similarity"}  # of the metrics of these files
SHOWN = (
    "experiment", "peft_type", "model.path", "lora.r", "lora.lora_alpha", "target_modules.names",
)  # fmt: skip
MARK = re.compile(rb'"(run_info|peft_method)"\s*:')
MARK_BYTES = 65536  # of a file's beginning, where the mark must be


def is_foreign(path: Path) -> bool:
    """Return whether a JSON file, or any in a folder or one level below, looks like such a result.

    A file counts by its first 64 KB: one that was cut short is still recognised, and `read` says
    what is wrong with it.
    """
    return any(_is_marked(file) for file in _files(path))


def read(path: Path) -> list[ForeignRow]:
    """Return one row per JSON file of a folder and one level below, or that of one file.

    A file that cannot be used has a row with `error`; nothing about its content raises.

    Raises:
        ConfigErrors: there is no such path, or no JSON file in it.
    """
    rows = [row_of(file) for file in _files(path)]
    if not rows:
        raise ConfigErrors(
            f"folder: must hold result files (*.json) of PEFT's method_comparison, or be one; "
            f"'{path}' {'has none' if path.exists() else 'does not exist'}; "
            "give its results/ folder"
        )
    return rows


def table_rows(rows: Sequence[ForeignRow], keys: Sequence[str] = SHOWN) -> list[dict[str, Any]]:
    """Return rows without an error in the form of `lorabench.compare.table`'s, by experiment.

    Args:
        keys: of the setting to show.
    Returns:
        The keys of a row of `table`, None where the files know nothing of the kind, and `foreign`:
        verdict (why there is none), intervals by split, and what else the file says.
    """
    usable = [row for row in rows if row.error is None]
    return [
        _table_row(row, keys) for row in sorted(usable, key=lambda row: (row.name, str(row.path)))
    ]


def intervals(row: ForeignRow) -> dict[str, tuple[float, float]]:
    """Return the 95% interval of the accuracy, by split whose number of questions is known."""
    if row.error is not None:
        return {}
    return {
        split: wilson(values["accuracy"], row.num_examples[split])
        for split, values in row.metrics.items()
        if "accuracy" in values and split in row.num_examples
    }


def wilson(accuracy: float, num_examples: int, level: float = 0.05) -> tuple[float, float]:
    """Return Wilson's score interval of a share of right answers.

    It covers the choice of questions alone: not seeds, and not the sampling of answers.

    Args:
        accuracy: right answers over questions, in [0, 1].
        num_examples: questions, at least 1.
        level: 1 minus the confidence.
    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    if not (0 <= accuracy <= 1 and num_examples >= 1):
        raise ValueError(
            f"accuracy must be in [0, 1] of at least 1 question; got {accuracy} of {num_examples}"
        )
    z = NormalDist().inv_cdf(1 - level / 2)
    weight = 1 + z**2 / num_examples
    centre = (accuracy + z**2 / (2 * num_examples)) / weight
    variance = accuracy * (1 - accuracy) / num_examples + z**2 / (4 * num_examples**2)
    half = z * math.sqrt(variance) / weight
    return max(0.0, centre - half), min(1.0, centre + half)


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted([*path.glob("*.json"), *path.glob("*/*.json")])


def _is_marked(file: Path) -> bool:
    try:
        with open(file, "rb") as opened:
            return file.suffix == ".json" and bool(MARK.search(opened.read(MARK_BYTES)))
    except OSError:
        return False


def _table_row(row: ForeignRow, keys: Sequence[str]) -> dict[str, Any]:
    def alone(value: float | None) -> dict[str, Any] | None:
        return None if value is None else spread([float(value)])

    stack = ", ".join(f"{key} {value}" for key, value in row.versions.items() if value)
    return {
        "setting": {key: row.setting.get(key) for key in keys},
        "seeds": [] if row.seed is None else [row.seed],
        "metrics": {
            split: {name: spread([float(value)]) for name, value in values.items()}
            for split, values in row.metrics.items()
        },
        "trainable_parameters": row.trainable_parameters,
        "train_seconds": alone(row.train_seconds),
        "pack_size": None,
        "train_seconds_share": None,
        "total_seconds": alone(row.total_seconds),
        "tokens_per_second": alone(row.tokens_per_second),
        "peak_memory_bytes": alone(row.peak_memory_bytes),
        "other_stack": [f"PEFT's benchmark ({stack})" if stack else "PEFT's benchmark"],
        "runs": [str(row.path)],
        "foreign": {
            "verdict": ONE_SEED,
            "intervals": {
                split: {"low": low, "high": high, "num_examples": row.num_examples[split]}
                for split, (low, high) in intervals(row).items()
            },
            "name": row.name,
            "created": row.created,
            "peft_type": row.peft_type,
            "model": row.model,
            "total_parameters": row.total_parameters,
            "file_size_bytes": row.file_size_bytes,
            "versions": row.versions,
            "notes": list(row.notes),
        },
    }
