"""The table of a sweep: pandas and statistics say what its numbers must be."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
import re
import statistics
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from lorabench import compare, show
from lorabench.intact import Checked
from lorabench.record import Cost, Evaluation, Metric, Record, Scores

NOTHING = compare.Answers("nll")  # verdicts are tested in test_verdicts.py
GRID = list(itertools.product(["lora", "exclude"], [64, 8, 16], [0, 1, 2]))
NAMES = {"nll": "nll/1", "exact_match": "exact_match/1"}


def scored(values: dict[str, float | None], **changes) -> Evaluation:
    """An evaluation with these values on validation and on test."""
    splits = {
        split: Scores(
            examples=f"the {split} examples",
            tokens="",
            metrics={
                name: Metric(value=value, num_examples=8, definition=NAMES[name])
                for name, value in values.items()
            },
        )
        for split in ("validation", "test")
    }
    content = {
        "id": "0123456789ab",
        "settings": {"eval_examples": None, "eval_batch_size": 32},
        "splits": splits,
        "predictions": "evaluations/0123456789ab.parquet",
        "predictions_sha256": "",
        "batch_size": 32,
        "ended": "2026-11-25T12:00:00Z",
    }
    return Evaluation(**(content | changes))


def entry(
    head: str,
    r: int,
    seed: int,
    values: dict[str, float | None],
    status: str = "finished",
    **config,
) -> Record:
    number = random.Random(f"{head}{r}{seed}")
    return Record(
        run_id=f"{head}-{r}-{seed}",
        sweep="s",
        status=status,
        provenance={},
        config={
            "head": {"policy": head},
            "lora": {"r": r, "bias": "none"},
            "seed": seed,
            "seeds": {"init": seed, "data": seed, "dropout": seed},
            "output_dir": f"o{seed}",
            "sweep": "s",
            "tracker": {"kind": "none", "tags": [str(seed)]},
            "trainer": {"steps": 4, "device": "cpu", "lr": 1e-3},
            "data": {"skills": ["greek"]},
            **config,
        },
        seeds={"init": seed, "data": seed, "dropout": seed},
        plan={"trainable_parameters": 1000 * r + len(head)},
        evaluations=[scored(values)],
        cost=Cost(
            train_seconds=number.uniform(1, 9),
            total_seconds=number.uniform(9, 19),
            tokens_per_second=number.uniform(1e3, 1e5),
            peak_memory_bytes=number.randrange(10**9),
        ),
    )


@pytest.fixture
def records() -> list[Record]:
    number = random.Random(0)
    found = [
        entry(*point, {"nll": number.uniform(1, 2), "exact_match": number.random()})
        for point in GRID
    ]
    number.shuffle(found)
    return found


def frame(records: list[Record]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "head": r.config["head"]["policy"],
                "r": r.config["lora"]["r"],
                "seed": r.config["seed"],
                "parameters": r.plan["trainable_parameters"],
                **r.cost.model_dump(),
                **{
                    f"{split}/{name}": m.value
                    for split, scores in r.metrics.items()
                    for name, m in scores.items()
                },
            }
            for r in records
        ]
    )


def printed(table: dict, monkeypatch, **console) -> str:
    out = io.StringIO()
    made = Console(file=out, width=200, highlight=False, markup=False, **console)
    monkeypatch.setattr(show.compared, "console", lambda: made)
    show.comparison(table, NOTHING, [Path("outputs/s")], False)
    return out.getvalue()


def test_a_model_has_one_column_whatever_its_group_holds(records, monkeypatch):
    for i, one in enumerate(records):
        name = ("small", "large")[i % 2]
        one.config["model"] = {"name": name, "path": f"/somewhere/{name}", "dtype": "float32"}
        one.config["stages"] = [] if i % 3 else [{"from_step": 0, "train": ["all"]}]
    text = printed(compare.table(records), monkeypatch)
    header = next(line for line in text.splitlines() if "test nll" in line)
    columns = [cell.strip() for cell in header.split("┃")]
    assert "model" in columns and "path" not in columns
    assert "/somewhere" not in text and " none " in text and "from step 0 all" in text
    records[0].config["model"]["path"] = "/elsewhere"  # the label no longer tells
    assert "/elsewhere" in printed(compare.table(records), monkeypatch)


def test_each_row_is_what_pandas_groups_by_setting(records):
    """Relative tolerance 1e-12: sums of three float64 in another order differ by a few 1e-16."""
    table = compare.table(records)
    groups = frame(records).groupby(["head", "r"])
    assert table["varied"] == ["head.policy", "lora.r"]
    assert len(table["rows"]) == len(groups) == 6
    for row in table["rows"]:
        group = groups.get_group((row["setting"]["head.policy"], row["setting"]["lora.r"]))
        columns = {
            f"{s}/{n}": spread
            for s, scores in row["metrics"].items()
            for n, spread in scores.items()
        }
        assert len(columns) == 4
        columns |= {
            name: row[name]
            for name in ("train_seconds", "total_seconds", "tokens_per_second", "peak_memory_bytes")
        }
        for name, spread in columns.items():
            assert spread["mean"] == pytest.approx(group[name].mean(), rel=1e-12)
            assert spread["sd"] == pytest.approx(group[name].std(ddof=1), rel=1e-12)
            assert (spread["min"], spread["max"], spread["n"]) == (
                group[name].min(),
                group[name].max(),
                3,
            )
        assert row["seeds"] == [0, 1, 2]
        assert row["trainable_parameters"] == group["parameters"].iloc[0]
        assert sorted(row["runs"]) == [
            f"{row['setting']['head.policy']}-{row['setting']['lora.r']}-{s}" for s in range(3)
        ]


@pytest.mark.parametrize(
    "values", [[1.0], [1.0, 2.0], [0.1] * 10, [1e8, 1e8 + 1, 1e8 + 2], [-3.5, 0.0, 7.25]]
)
def test_spread_agrees_with_statistics(values):
    """statistics computes in exact fractions; 1e-12 leaves room for the last bits of float64."""
    found = compare.spread(values)
    assert found["mean"] == pytest.approx(statistics.mean(values), rel=1e-12)
    if len(values) == 1:
        assert found["sd"] is None  # one value has no spread; 0 would say it is certain
    else:
        # absolute 1e-15: ten times 0.1 has no spread, and its mean may be off by one bit
        assert found["sd"] == pytest.approx(statistics.stdev(values), rel=1e-12, abs=1e-15)


def test_rows_are_in_the_order_of_numbers_not_of_texts(records):
    rows = compare.table(records)["rows"]
    assert [tuple(row["setting"].values()) for row in rows] == [
        (head, r) for head in ("exclude", "lora") for r in (8, 16, 64)
    ]


def test_values_of_several_kinds_are_ordered_without_an_error():
    records = [entry("lora", 8, 0, {}, stages=stage) for stage in (None, "b", 10, 9.5, ["x"], True)]
    for i, one in enumerate(records):
        one.run_id = str(i)
    rows = compare.table(records)["rows"]
    assert [row["setting"]["stages"] for row in rows][:2] == [9.5, 10]
    assert len(rows) == 6


@pytest.mark.parametrize(
    "key",
    [
        "seed",
        "seeds.init",
        "output_dir",
        "sweep",
        "tracker.kind",
        "trainer.device",
        "trainer.checkpoint_every",
        "trainer.checkpoint_minutes",
    ],
)
def test_seeds_and_places_make_no_setting(key):
    one, two = entry("lora", 8, 0, {"nll": 1.0}), entry("lora", 8, 1, {"nll": 2.0})
    group, _, name = key.rpartition(".")
    (two.config[group] if group else two.config)[name] = 7
    table = compare.table([one, two])
    assert table["varied"] == [] and len(table["rows"]) == 1
    assert table["rows"][0]["metrics"]["test"]["nll"]["mean"] == 1.5


def test_of_two_runs_of_one_setting_and_seeds_the_newer_is_in_the_table():
    one, two = entry("lora", 8, 0, {"nll": 1.0}), entry("lora", 8, 0, {"nll": 2.0})
    one.ended, two.ended = "2026-11-25T12:00:00Z", "2026-11-25T13:00:00Z"
    (row,) = compare.table([two, one])["rows"]
    assert row["metrics"]["test"]["nll"]["mean"] == 2.0 and row["seeds"] == [0]


@pytest.mark.parametrize(
    ("group", "name"), [("trainer", "lr"), ("data", "skills"), ("lora", "bias")]
)
def test_everything_else_does(group, name):
    one, two = entry("lora", 8, 0, {"nll": 1.0}), entry("lora", 8, 1, {"nll": 2.0})
    two.config[group][name] = ["other"]
    table = compare.table([one, two])
    assert table["varied"] == [f"{group}.{name}"] and len(table["rows"]) == 2


def test_runs_that_did_not_finish_are_left_out_and_named(records):
    statuses = ["running", "failed", "stopped", "interrupted"]
    for one, status in zip(records, statuses, strict=False):
        one.status = status
        one.evaluations = []
    table = compare.table(records)
    assert table["left_out"] == {
        status: [one.run_id] for one, status in zip(records, statuses, strict=False)
    }
    finished = {one.run_id for one in records[4:]}
    assert {run for row in table["rows"] for run in row["runs"]} == finished
    assert sum(row["train_seconds"]["n"] for row in table["rows"]) == len(GRID) - 4
    assert {run["run_id"]: run["status"] for run in table["runs"]} == {
        r.run_id: r.status for r in records
    }


def test_a_value_that_is_not_finite_is_left_out_and_counted(records, monkeypatch):
    bad = next(r for r in records if r.run_id == "lora-8-1")
    bad.metrics["test"]["nll"].value = None
    table = compare.table(records)
    row = next(row for row in table["rows"] if "lora-8-1" in row["runs"])
    rest = [r.metrics["test"]["nll"].value for r in records if r.run_id in ("lora-8-0", "lora-8-2")]
    assert row["metrics"]["test"]["nll"]["n"] == 2
    assert row["metrics"]["test"]["nll"]["mean"] == pytest.approx(statistics.mean(rest), rel=1e-12)
    text = printed(table, monkeypatch)
    assert text.count("(2 of 3 finite)") == 1


def test_json_has_rows_and_runs_and_is_strict(records, capsys):
    records[0].status = "failed"
    records[1].cost.tokens_per_second = math.nan
    show.comparison(compare.table(records), NOTHING, [Path("outputs/s")], True)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert {"rows", "runs"} <= set(content)
    assert len(content["rows"]) == 6 and len(content["runs"]) == len(GRID)
    row, run = content["rows"][0], content["runs"][0]
    assert {
        "setting",
        "seeds",
        "metrics",
        "trainable_parameters",
        "train_seconds",
        "peak_memory_bytes",
        "runs",
    } <= set(row)
    assert {"run_id", "setting", "seeds", "status", "metrics", "cost"} <= set(run)
    values = frame(records).query("head == 'exclude' and r == 8 and seed == 0")["test/nll"]
    (one,) = [r for r in content["runs"] if r["run_id"] == "exclude-8-0"]
    assert one["metrics"]["test"]["nll"] == values.item()


def test_the_printed_table_holds_each_setting_once(records, monkeypatch):
    records[0].status = "failed"
    table = compare.table(records)
    text = printed(table, monkeypatch)
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in text.splitlines()
        if line.startswith("│")
    ]
    assert [[row[0].removesuffix(" *"), row[1]] for row in rows] == [
        [h, str(r)] for h in ("exclude", "lora") for r in (8, 16, 64)
    ]
    for row, cells in zip(table["rows"], rows, strict=True):
        for spread in row["metrics"]["test"].values():
            # Here a run scores the same on validation and test.
            assert cells.count(f"{spread['mean']:.4f} ± {spread['sd']:.4f}") == 2
        assert str(row["train_seconds"]["n"]) in cells
    assert f"left out, failed: {records[0].run_id}" in text


def test_the_best_setting_on_validation_is_marked_and_no_other(records, monkeypatch):
    """Whatever its test scores are: choosing is not judging."""
    for one in records:
        nll = one.evaluations[-1].splits["validation"].metrics["nll"]
        one.evaluations[-1].splits["validation"].metrics["nll"] = nll.model_copy(
            update={"value": 3 - nll.value}
        )
    text = printed(compare.table(records), monkeypatch)
    groups = frame(records).groupby(["head", "r"])
    best = groups["validation/nll"].mean().idxmin()
    assert best != groups["test/nll"].mean().idxmin()
    body = [line for line in text.splitlines() if line.startswith("│")]
    marked = [[cell.strip() for cell in line.split("│")[1:-1]] for line in body if " * " in line]
    assert [(row[0].removesuffix(" *"), int(row[1])) for row in marked] == [best]
    assert "* the best on validation nll; test judges" in text


def test_no_finished_run_says_where_to_look(records, monkeypatch):
    for one in records:
        one.status = "failed"
    text = printed(compare.table(records), monkeypatch)
    assert "no run has finished" in text and "lorabench runs outputs/s" in text


def test_brackets_of_errors_and_values_are_printed_as_they_are(records, capsys):
    """rich reads [x] as markup, and raises on [/x]."""
    records[0].status, records[0].error = "failed", "KeyError: [/x] [q_proj]"
    show.runs([Checked(Path("outputs/s") / one.run_id, one, {}) for one in records], False)
    assert "KeyError: [/x] [q_proj]" in capsys.readouterr().out


def listed(records: list[Record], as_json: bool, statuses: list[str], capsys) -> str:
    entries = [Checked(Path("outputs/s") / one.run_id, one, {}) for one in records]
    show.runs(entries, as_json, statuses)
    return capsys.readouterr().out


def test_runs_are_listed_in_the_order_that_pandas_sorts_them(records, capsys):
    """By setting, numbers by size (8, 16, 64), then by seed; not by the hash that names a run."""
    wanted = frame(records).sort_values(["head", "r", "seed"])
    ids = [f"{one.head}-{one.r}-{one.seed}" for one in wanted.itertuples()]
    text = listed(records, False, [], capsys)
    assert re.findall(r"(?:lora|exclude)-\d+-\d", text) == ids
    rows = json.loads(listed(records, True, [], capsys))
    assert [row["run_id"] for row in rows] == ids


def test_runs_of_a_status_keep_the_setting_that_tells_them_from_the_others(records, capsys):
    """One failed run alone varies in nothing: its setting is told among all runs."""
    failed, stopped, *_ = records
    failed.status, stopped.status = "failed", "interrupted"
    (row,) = json.loads(listed(records, True, ["failed"], capsys))
    assert row["run_id"] == failed.run_id and row["setting"] == {
        "head.policy": failed.config["head"]["policy"], "lora.r": failed.config["lora"]["r"]
    }  # fmt: skip
    text = listed(records, False, ["failed", "interrupted"], capsys)
    assert f"{len(records)} runs, 2 of them failed or interrupted" in text
    assert failed.run_id in text and stopped.run_id in text and " head " in text
    assert not any(one.run_id in text for one in records[2:])
    assert json.loads(listed(records, True, ["planned"], capsys)) == []
