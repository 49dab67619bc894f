"""docs/record-format.md describes the files as they are: every field, key, column and status."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import recorded_runs, say
from pyarrow import parquet
from pydantic import BaseModel

from lorabench import base_scores, lengths, plan, record
from lorabench.evaluate import DEFINITIONS
from lorabench.sweep import folder

TEXT = (Path(__file__).parent.parent / "docs" / "record-format.md").read_text(encoding="utf-8")
FAST = [
    "tracker=none", "data.num_train=32", "data.num_validation=4", "data.num_test=8", "lora.r=2",
    "target_modules=attention", "trainer.batch_size=2", "trainer.num_threads=1", "trainer.steps=4",
    "trainer.eval_every=2",
]  # fmt: skip


def named(heading: str) -> list[str]:
    """The names in the first column of the table below a heading."""
    (section,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", TEXT, re.S | re.M)
    cells = re.findall(r"^\| (.*?) \|", section, re.M)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def models(module: Any) -> list[type[BaseModel]]:
    """The pydantic models that a module defines."""
    return [
        one
        for one in vars(module).values()
        if isinstance(one, type)
        and issubclass(one, BaseModel)
        and one.__module__ == module.__name__
        and one.model_fields
    ]


MODELS = [one for module in (record, base_scores, folder, plan, lengths) for one in models(module)]


def test_there_are_models_to_describe() -> None:
    assert len(MODELS) > 10


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_a_model_is_described_field_by_field(model: type[BaseModel]) -> None:
    """Fails for a field without a row and for a row without a field."""
    assert sorted(named(f"`{model.__name__}`")) == sorted(model.model_fields)


def test_statuses_and_versions_are_the_current_ones() -> None:
    assert set(named("Statuses")) == set(get_args(record.Status))
    assert f"`schema_version` | integer | version of this format, {record.SCHEMA_VERSION} " in TEXT
    assert f"version of this file's format, {folder.SCHEMA_VERSION} " in TEXT
    assert f"version of the format of this file: {base_scores.SCHEMA_VERSION} " in TEXT
    assert f"trained with, {record.ARITHMETIC_VERSION};" in TEXT


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of two runs that keep their best adapters."""
    out = tmp_path_factory.mktemp("described")
    chosen = ["trainer.keep=best", "objective=validation/exact_match"]
    assert say("train", "-m", *FAST, *chosen, "seed=0,1", f"output_dir={out}").code == 0
    return out / "default"


def test_a_folder_holds_nothing_else(sweep: Path) -> None:
    """Fails for a file that no table names."""
    known = {name.rstrip("/") for name in named("The sweep folder")}
    runs = {path.name for path, _ in recorded_runs(sweep.parent)}
    assert {path.name for path in sweep.iterdir()} - runs <= known
    known = {name.rstrip("/") for name in named("The run folder")}
    for run in runs:
        assert {path.name for path in (sweep / run).iterdir()} <= known


def test_a_record_holds_no_other_keys(sweep: Path) -> None:
    """Fails for a key that is written into a free-form part of the record and not described."""
    for _, entry in recorded_runs(sweep.parent):
        assert sorted(entry["provenance"]) == sorted(named("`provenance`"))
        assert sorted(entry["hashes"]) == sorted(named("`hashes`"))
        assert all(f"`{key}`" in TEXT for key in entry["provenance"]["determinism"])
        assert all(
            f"`{key}`" in TEXT for key in (*entry["plan"]["contents"], *entry["plan"]["pack"])
        )


def test_rows_and_columns_are_described(sweep: Path) -> None:
    keys, columns = set(), set()
    for path, entry in recorded_runs(sweep.parent):
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        keys |= {key for line in lines for key in json.loads(line)}
        columns |= set(parquet.read_schema(path / entry["evaluations"][-1]["predictions"]).names)
    keys = {key.replace("/exact_match", "/METRIC") for key in keys}
    assert keys == set(named("metrics.jsonl"))
    known = set(named("evaluations/\\<evaluation id\\>.parquet"))
    assert columns <= known
    # nll_per_token is computed from nll and num_tokens.
    assert set(DEFINITIONS) - {"nll_per_token"} <= known
