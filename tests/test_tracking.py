"""W&B as a mirror: its own reader finds the run's values, and its failures hurt no run."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import scores

from lorabench import cli, tracking
from lorabench.config import TrackerConfig

TINY = [
    "trainer=smoke",
    "trainer.num_threads=1",
    "target_modules=attention",
    "data.num_train=64",
    "data.num_validation=16",
    "data.num_test=16",
]
NOWHERE = "http://127.0.0.1:9"  # the discard port: refused at once


@pytest.fixture
def server(monkeypatch):
    """The client as it starts in a new process, with other variables; and its wait cut to 1 s."""
    import wandb

    def point(**variables: str | None) -> None:
        for name, value in variables.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(
                name, value
            )
        wandb.teardown()  # it reads the environment once

    def init(**arguments: Any) -> Any:
        arguments["settings"].init_timeout = 1
        return start(**arguments)

    start = wandb.init
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(tracking, "OFFLINE_SINCE", [])
    monkeypatch.setattr(tracking, "LIVE", set())
    yield point
    monkeypatch.undo()
    wandb.teardown()


def train(*arguments: str, multirun: bool = False) -> tuple[int, str]:
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = cli.main(["train", *["-m"] * multirun, *TINY, *arguments])
    return code, err.getvalue()


def inspect(file: Path) -> list[dict[str, Any]]:
    """The transactions of an offline file, read by the wandb client itself."""
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_kind(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row[kind] for row in rows if row["type"] == kind]


def offline_files(sweep: Path) -> dict[str, Path]:
    return {p.stem.removeprefix("run-"): p for p in sweep.glob("wandb/offline-run-*/run-*.wandb")}


def records(sweep: Path) -> dict[str, dict[str, Any]]:
    return {p.parent.name: json.loads(p.read_text()) for p in sweep.glob("*/record.json")}


def start(
    folder: Path, notify: Any, mode: str = "offline", run_id: str = "abc"
) -> tracking.NoTracker:
    return tracking.start(
        TrackerConfig(mode=mode),
        run_id=run_id,
        sweep="s",
        name="n",
        tags=[],
        config={},
        folder=folder,
        notify=notify,
    )


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one process, mirrored to offline files."""
    folder = tmp_path_factory.mktemp("tracked")
    code, err = train(
        "seed=0,1",
        "trainer.eval_every=2",
        "tracker.project=mine",
        "tracker.tags=[extra]",
        f"output_dir={folder}",
        multirun=True,
    )
    assert code == 0, err
    return folder / "default"


@pytest.fixture(scope="module")
def mirrored(sweep: Path) -> dict[str, list[dict[str, Any]]]:
    return {run_id: inspect(file) for run_id, file in offline_files(sweep).items()}


def test_two_runs_of_a_process_are_two_wandb_runs_of_the_same_ids(sweep, mirrored):
    assert len(mirrored) == 2
    assert set(mirrored) == set(records(sweep))
    assert len(list(sweep.glob("wandb/offline-run-*"))) == 2
    for run_id, rows in mirrored.items():
        assert {run["run_id"] for run in of_kind(rows, "run")} == {run_id}


def test_each_steps_values_are_those_of_metrics_jsonl(sweep, mirrored):
    """Equal, not close: both hold the same float64 as decimal text."""
    different = []
    for run_id, rows in mirrored.items():
        theirs = [
            {key: value for key, value in row["item"].items() if not key.startswith("_")}
            for row in of_kind(rows, "history")
        ]
        lines = (sweep / run_id / "metrics.jsonl").read_text().splitlines()
        ours = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
        assert theirs == ours
        assert [row["step"] for row in ours] == [1, 2, 2, 3, 4]  # eval_every=2 adds its own line
        assert sum("validation/nll" in row for row in ours) == 1
        different.append([row.get("train/loss") for row in ours])
    assert different[0] != different[1]  # two seeds: the runs are not one another's copy


def test_group_tags_job_type_and_config_are_the_runs(sweep, mirrored):
    found = records(sweep)
    for run_id, rows in mirrored.items():
        run = of_kind(rows, "run")[0]
        assert (
            run["run_group"] == "default"
            and run["project"] == "mine"
            and run["job_type"] == "train"
        )
        assert {"tiny-gemma", "head=exclude", "extra"} == set(run["tags"])
        config = dict(run["config"]["update"])
        config.pop("_wandb")
        assert config == found[run_id]["config"]
        assert run["display_name"] == f"seed={config['seed']}"


def test_the_summary_is_the_records(sweep, mirrored):
    found = records(sweep)
    for run_id, rows in mirrored.items():
        summary: dict[str, Any] = {}
        for update in of_kind(rows, "summary"):
            summary |= update["update"]
        for split in ("validation", "test"):
            for name, metric in scores(found[run_id])[split].items():
                assert summary[f"{split}/{name}"] == metric["value"]
        assert summary["trainable_parameters"] == found[run_id]["plan"]["trainable_parameters"]
        assert summary["train_seconds"] == found[run_id]["cost"]["train_seconds"]
        assert of_kind(rows, "exit")[0].get("exit_code", 0) == 0


def test_an_unreachable_server_leaves_the_runs_offline_and_says_so(tmp_path, server):
    server(WANDB_BASE_URL=NOWHERE, WANDB_API_KEY="f" * 40)
    code, err = train("seed=0,1", "tracker.mode=online", f"output_dir={tmp_path}", multirun=True)
    assert code == 0
    assert (
        err.count("wandb: online start failed") == 2
    )  # the first run tries, the second is told why not
    assert err.count("the run goes on offline") == 1 and err.count("this run is offline too") == 1
    sweep = tmp_path / "default"
    found = records(sweep)
    assert [one["status"] for one in found.values()] == ["finished", "finished"]
    files = offline_files(sweep)
    assert set(files) == set(found)  # under the run's own id, as `wandb sync` will send it
    run_id = next(iter(files))
    losses = [
        json.loads(line)["train/loss"]
        for line in (sweep / run_id / "metrics.jsonl").read_text().splitlines()
    ]
    assert [
        row["item"]["train/loss"] for row in of_kind(inspect(files[run_id]), "history")
    ] == losses


def test_without_a_key_the_run_goes_on_offline(tmp_path, server):
    server(
        WANDB_BASE_URL=NOWHERE, WANDB_API_KEY=None, HOME=str(tmp_path), NETRC=str(tmp_path / "none")
    )
    told: list[str] = []
    tracker = start(tmp_path, told.append, mode="online")
    tracker.log({"train/loss": 1.0}, 1)
    tracker.finish({"test/nll": 2.0})
    assert len(told) == 1 and "online start failed" in told[0] and "goes on offline" in told[0]
    assert list(offline_files(tmp_path)) == ["abc"]


def test_a_failed_start_leaves_the_open_runs_of_the_process_alone(tmp_path, server):
    server(WANDB_BASE_URL=NOWHERE, WANDB_API_KEY="f" * 40)
    told: list[str] = []
    first = start(tmp_path, told.append, run_id="first")
    first.log({"train/loss": 1.0}, 1)
    second = start(tmp_path, told.append, mode="online", run_id="second")
    second.log({"train/loss": 2.0}, 1)
    first.log({"train/loss": 3.0}, 2)
    first.finish({})
    second.finish({})
    assert len(told) == 1 and "goes on offline" in told[0]
    files = offline_files(tmp_path)
    assert set(files) == {"first", "second-offline"}  # the client holds the id of the failed start
    history = of_kind(inspect(files["first"]), "history")
    assert [row["item"]["train/loss"] for row in history] == [1.0, 3.0]


@pytest.mark.parametrize("method", ["log", "finish"])
def test_a_tracker_that_breaks_does_not_hurt_the_run(tmp_path, monkeypatch, method):
    from wandb.sdk.wandb_run import Run

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("the disk of W&B is full\nand more")

    monkeypatch.setattr(Run, method, broken)
    code, err = train(f"output_dir={tmp_path}")
    monkeypatch.undo()
    import wandb

    wandb.teardown()  # closes the run that could not be closed
    tracking.LIVE.clear()
    assert code == 0
    assert (
        err.count(f"wandb: {method} failed (the disk of W&B is full); the run goes on without it")
        == 1
    )
    assert "and more" not in err
    (found,) = records(tmp_path / "default").values()
    assert found["status"] == "finished" and scores(found)["test"]["nll"]["value"] > 0
    lines = (tmp_path / "default" / found["run_id"] / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4


def test_after_one_failure_a_run_is_left_alone():
    class Broken:
        calls = 0

        def log(self, _: dict) -> None:
            self.calls += 1
            raise ConnectionError

    told: list[str] = []
    run = Broken()
    tracker = tracking.WandbTracker(run, "nowhere", told.append)
    for step in range(3):
        tracker.log({"train/loss": 0.0}, step)
    tracker.finish({})
    assert run.calls == 1
    assert told == ["wandb: log failed (ConnectionError); the run goes on without it"]


def test_wandb_that_cannot_be_imported_is_said_and_done_without(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    told: list[str] = []
    tracker = start(tmp_path, told.append)
    assert type(tracker) is tracking.NoTracker
    assert len(told) == 1 and "cannot be imported" in told[0]


@pytest.mark.parametrize("settings", [TrackerConfig(kind="none"), TrackerConfig(mode="disabled")])
def test_no_tracker_writes_and_says_nothing(tmp_path, settings):
    told: list[str] = []
    tracker = tracking.start(
        settings,
        run_id="abc",
        sweep="s",
        name="n",
        tags=[],
        config={},
        folder=tmp_path / "s",
        notify=told.append,
    )
    tracker.log({"train/loss": 1.0}, 1)
    tracker.finish({})
    assert told == [] and list(tmp_path.iterdir()) == []
