"""Sweeps for pages: many runs, and texts that would break a careless page."""

from __future__ import annotations

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from sweeps import EVALUATION, write_run

from lorabench import record
from lorabench.record import Exports, Record

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# CI installs one, and says that its tests must not be skipped.
needs_browser = pytest.mark.skipif(
    BROWSER is None and os.environ.get("LORABENCH_BROWSER") != "required",
    reason="no Chromium is installed: the page is not looked at",
)
SCRIPT = "</script><script>window.hacked=1</script>"
MARKUP = f"<img src=x onerror=window.hacked=1><b>bold</b>&amp;{SCRIPT}"
LONG = "long " * 2000  # 10 kB


class Parsed(HTMLParser):
    """Texts of a page, what it would load, and its data."""

    def __init__(self, text: str):
        super().__init__()
        self.inside: list[str] = []
        self.texts: list[str] = []
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.tags: list[str] = []
        self.data: Any = None
        self.is_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.loads += [v for k in ("src", "href", "action", "data") if (v := found.get(k))]
        assert not any(name.startswith("on") for name in found), "no handlers in attributes"
        if tag in ("script", "style"):
            self.inside.append(tag)
        self.is_data = found.get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.texts.append(data)
        elif self.inside[-1] == "script":
            if self.is_data:
                self.data = json.loads(data)
            self.scripts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


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
    parquet.write_table(table.append_column("teacher_forced", pa.array(texts)), place)
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
