"""Sweeps for pages: many runs, and texts that would break a careless page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from sweeps import EVALUATION, write_run

from lorabench import record
from lorabench.record import Exports, Record

SCRIPT = "</script><script>window.hacked=1</script>"
MARKUP = f"<img src=x onerror=window.hacked=1><b>bold</b>&amp;{SCRIPT}"
LONG = "long " * 2000  # 10 kB


def write_rows(run: Path, rows: list[dict[str, float]], tail: str = "") -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(lines + tail, encoding="utf-8")


def write_many(folder: Path, settings: int, seeds: int, examples: int = 100) -> None:
    """Runs with rows of 200 steps and scores of right and wrong."""
    rng = np.random.default_rng(0)
    ranks = [2**i for i in range(1, 40)]
    for place in range(settings):
        head, r = ("exclude", "lora")[place % 2], ranks[place // 2 % 10]
        dropout = (0.0, 0.1)[place // 20]
        for seed in range(seeds):
            right = (rng.random(examples) < 0.3 + 0.02 * place % 0.5).astype(np.int8)
            nll = rng.random(examples) + 1 / r
            run = write_run(
                folder, head, r, seed, {"nll": nll, "exact_match": right},
                config={"lora": {"r": r, "lora_dropout": dropout}}, name=f"{place:03}-{seed}",
                validation={"nll": float(nll.mean()), "exact_match": float(right.mean())},
            )  # fmt: skip
            add_texts(run, [f"text {place} {i}" for i in range(examples)])
            steps = np.arange(1, 201)
            losses = 3 * np.exp(-steps / 60) + rng.normal(0, 0.1, 200)
            write_rows(run, [
                {"step": int(s), "train/loss": float(x), "train/lr": 1e-3, "seconds": float(s)}
                for s, x in zip(steps, losses, strict=True)
            ])  # fmt: skip


def add_texts(run: Path, texts: list[str]) -> None:
    """Add what was written to the predictions, and their hash to the record."""
    import hashlib

    place = run / "evaluations" / f"{EVALUATION}.parquet"
    table = parquet.read_table(place)
    parquet.write_table(table.append_column("generated", pa.array(texts)), place)
    entry = record.read(run)
    assert entry is not None
    entry.evaluations[0].predictions_sha256 = hashlib.sha256(place.read_bytes()).hexdigest()
    entry.write(run)


def write_hostile(folder: Path, finished: bool) -> None:
    """Every text that a config, an error or data can bring in, as markup; scores that are NaN.

    Args:
        finished: whether any run has finished.
    """
    for seed in range(2):
        for place, head in enumerate((MARKUP, LONG)):
            values = {
                "nll": np.full(40, np.nan) if seed else np.linspace(0, 1, 40) + place,
                "exact_match": (np.arange(40) % (2 + place) == 0).astype(np.int8),
            }
            run = write_run(
                folder, head, 16, seed, values, name=f"{place}-{seed}",
                examples=[f"{MARKUP}{i}" for i in range(40)],
                config={"model": {"name": MARKUP}, "data": {"name": f"'\"{LONG}"}},
                validation={"nll": None},
            )  # fmt: skip
            add_texts(run, [f"{MARKUP} {LONG} \u2028 {i}" for i in range(40)])
            rows = [{"step": i, "train/loss": float("nan"), f"validation/{MARKUP}": 0.5 * i}
                    for i in range(1, 5)]  # fmt: skip
            write_rows(run, rows, tail='{"step": 5, "train/lo')
            entry = record.read(run)
            assert entry is not None
            entry.error = f"{MARKUP}: {LONG}"
            entry.notes = [MARKUP]
            entry.exports = Exports.none(MARKUP)
            entry.provenance = {"packages": {MARKUP: MARKUP}, "command": [MARKUP], "host": LONG}
            if not finished:
                entry.status, entry.evaluations = ("failed", "stopped")[place], []
            entry.write(run)


def records_in(folder: Path) -> list[tuple[Path, Record]]:
    return list(record.find(folder))
