"""Runs on a mixture with named test sets, through the command line; against pandas' means."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from conftest import predictions, records, say, scores
from sources import write
from test_evaluations import no_training
from test_mixture import SIZES, mixed, rows

from lorabench import data
from lorabench.config.schema import NamedSetConfig

FAST = [
    "tracker=none", "lora.r=2", "data.max_length=64", "target_modules=attention",
    "trainer.batch_size=2",
    "trainer.num_threads=1", "trainer.steps=3", "data.validation_fraction=0.2",
    "data.test_fraction=0.2", "hydra.output_subdir=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a mixture of two files, with a named test set and retention."""
    out = tmp_path_factory.mktemp("mixed")
    for name, count in SIZES.items():
        write(out / f"{name}.jsonl", rows(name, count))
    text = [{"text": f"the old words {i}"} for i in range(9)] + [{"text": "maths 1 is 1"}]
    write(out / "old.jsonl", text)
    mixture = f"data.mixture=[{{path: '{out}/maths.jsonl'}},{{path: '{out}/words.jsonl', num: 50}}]"
    said = say(
        "train", *FAST, "data=jsonl", mixture, f"output_dir={out}/outputs",
        f"data.tests={{chat: {{path: '{out}/chat.jsonl', num: 12}}}}",
        f"data.retention={{path: '{out}/old.jsonl', format: text}}",
    )  # fmt: skip
    assert said.code == 0, said.err
    return out


def test_scores_by_split_and_source_are_those_of_the_predictions(finished: Path) -> None:
    """Pandas' means of what was written, by split and by source."""
    (run,) = (path.parent for path in finished.glob("outputs/*/*/record.json"))
    (entry,) = records(finished / "outputs").values()
    table = pd.read_parquet(predictions(run))
    assert set(table["split"]) == {"validation", "test", "chat", "retention"}
    (base,) = (json.loads(p.read_text()) for p in finished.glob("outputs/*/base/*.json"))
    of_base = pd.read_parquet(next(finished.glob("outputs/*/base/*.parquet")))
    for recorded, frame in ((entry["evaluations"][-1], table), (base["evaluation"], of_base)):
        for split, found in recorded["splits"].items():
            mine = frame[frame["split"] == split]
            names = ["nll"] if split == "retention" else ["nll", "exact_match"]
            assert sorted(found["metrics"]) == sorted(names)
            for name in names:
                # float64 sums in another order
                assert found["metrics"][name]["value"] == pytest.approx(
                    mine[name].mean(), rel=1e-12
                )
                assert found["metrics"][name]["num_examples"] == len(mine)
            sources = mine.dropna(subset="source").groupby("source")
            assert sorted(found["sources"]) == sorted(sources.groups)
            for source, part in sources:
                for name in names:
                    value = found["sources"][source][name]
                    assert value["value"] == pytest.approx(part[name].mean(), rel=1e-12)
                    assert value["num_examples"] == len(part)
    assert set(table[table["split"] == "test"]["source"]) == {"maths.jsonl", "words.jsonl"}
    assert set(entry["evaluations"][-1]["splits"]["chat"]["metrics"]) == {"nll", "exact_match"}
    assert (table["split"] == "chat").sum() == 12
    assert (
        entry["evaluations"][-1]["splits"]["retention"]["examples"]
        == (entry["plan"]["contents"]["retention"])
    )


def test_compare_shows_gain_and_forgetting_against_the_base(finished: Path) -> None:
    """Pandas' means of what run and untrained base were predicted to score."""
    (run,) = (path.parent for path in finished.glob("outputs/*/*/record.json"))
    of_run = pd.read_parquet(predictions(run)).groupby("split")["nll"].mean()
    base = next(finished.glob("outputs/*/base/*.parquet"))
    of_base = pd.read_parquet(base).groupby("split")["nll"].mean()
    found = json.loads(say("compare", run.parent, "--json").out)
    (row,) = found["rows"]
    # float64 sums in another order, of losses near 10
    assert row["gain"]["mean"] == pytest.approx(of_base["test"] - of_run["test"], abs=1e-9)
    lost = of_run["retention"] - of_base["retention"]
    assert row["forgetting"]["mean"] == pytest.approx(lost, abs=1e-9) and lost != 0
    assert row["gain"]["metric"] == row["forgetting"]["metric"] == "nll"
    shown = say("compare", run.parent).out
    for name in ("gain nll", "forgetting nll", "retention nll ↓", "chat nll ↓", "test nll ↓"):
        assert name in shown
    assert f"{lost:.4f}" in shown and f"{of_run['chat']:.4f}" in shown


def test_a_named_set_that_is_in_train_is_told(finished: Path) -> None:
    """Texts of retention that were trained on hide what is forgotten; test sets overstate."""
    config = mixed(
        {"path": f"{finished}/maths.jsonl"},
        tests={"again": NamedSetConfig(path=f"{finished}/maths.jsonl")},
        retention=NamedSetConfig(path=f"{finished}/maths.jsonl", num=1000),
    )
    found = data.load(config)
    told = {note.partition(":")[0]: note for note in found.notes}
    assert (
        f"{len(found.train)} of 60 prompts are in the training set too" in told["data.tests.again"]
    )
    assert "overstate" in told["data.tests.again"]
    (of_retention,) = [note for note in found.notes if "hides what training makes" in note]
    assert of_retention.startswith(f"data.retention: {len(found.train)} of 60 prompts")
    assert "data.retention: has 60 examples, fewer than num=1000 asks for" in "".join(found.notes)


def test_evaluate_adds_sets_without_training(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "outputs"
    said = say("train", *FAST, "data.num_train=16", "data.num_validation=4", "data.num_test=4",
               f"output_dir={out}")  # fmt: skip
    assert said.code == 0, said.err
    before = records(out)
    no_training(monkeypatch)
    said = say("evaluate", out / "default", f"data.retention.path={finished}/maths.jsonl",
               f"data.tests={{w: {{path: '{finished}/words.jsonl', num: 3}}}}")  # fmt: skip
    assert said.code == 0, said.err
    after = records(out)
    assert list(after) == list(before)
    (run,), (old,) = after.values(), before.values()
    assert run["hashes"] == old["hashes"] and len(run["evaluations"]) == 2
    found = scores(run)
    assert set(found) == {"validation", "test", "w", "retention"}
    assert set(found["retention"]) == {"nll", "exact_match"}
    assert found["w"]["nll"]["num_examples"] == 3
    assert found["test"] == {name: value for name, value in scores(old)["test"].items()}
