"""W&B as a mirror: its own reader finds the run's values, and its failures hurt no run."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import scores
from processes import start_call, wait_for

from lorabench import cli, record, tracking
from lorabench.config import TrackerConfig
from lorabench.tracking import limits

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

    monkeypatch.setattr(limits, "INIT_SECONDS", 1.0)
    yield point
    monkeypatch.undo()
    wandb.teardown()


def train(*arguments: str, multirun: bool = False) -> tuple[int, str]:
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = cli.main(["train", *["-m"] * multirun, *TINY, *arguments])
    return code, err.getvalue()


def inspect(file: Path) -> list[dict[str, Any]]:
    """The transactions of an offline file, read by the wandb client itself, in a fork."""
    from wandb.cli.cli import cli as wandb_cli

    def read() -> Any:
        with pytest.raises(SystemExit) as end:
            wandb_cli(["leet", "inspect", "--json", str(file)])
        return end.value.code

    process = start_call(file.with_suffix(".inspected"), read)
    assert process.wait(60) == 0, process.said
    return [json.loads(line) for line in process.said.splitlines()]


def of_kind(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row[kind] for row in rows if row["type"] == kind]


def without_own_keys(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged: the client adds keys that begin with an underscore."""
    return [
        {key: value for key, value in row["item"].items() if not key.startswith("_")}
        for row in of_kind(rows, "history")
    ]


def history(file: Path) -> list[dict[str, Any]]:
    """What was logged to an offline file."""
    return without_own_keys(inspect(file))


def metrics(sweep: Path, run_id: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, as a tracker gets them."""
    lines = (sweep / run_id / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def log(sweep: Path, tracker: tracking.NoTracker, run_id: str, step: int) -> None:
    """One row to metrics.jsonl and to the tracker, as a run does it."""
    (sweep / run_id).mkdir(exist_ok=True)
    with open(sweep / run_id / "metrics.jsonl", "a") as file:
        record.append_line(file, {"step": step, "train/loss": step / 3, "seconds": 0.5})
    tracker.log({"train/loss": step / 3}, step)


def sync_command(said: str) -> list[str]:
    """The command that sends what is missing."""
    (command,) = re.findall(r"this sends them: (lorabench sync .*)", said)
    return shlex.split(command)


def offline_files(sweep: Path) -> dict[str, Path]:
    return {p.stem.removeprefix("run-"): p for p in sweep.glob("wandb/offline-run-*/run-*.wandb")}


def records(sweep: Path) -> dict[str, dict[str, Any]]:
    return {p.parent.name: json.loads(p.read_text()) for p in sweep.glob("*/record.json")}


def mirrored_run(
    folder: Path, notify: Any, settings: TrackerConfig, run_id: str = "abc"
) -> tracking.Mirrored:
    config = {"hashes": {}}
    return tracking.Mirrored(settings, run_id, "s", "n", [], config, folder, notify)


def start(
    folder: Path, notify: Any, mode: str = "offline", run_id: str = "abc"
) -> tracking.NoTracker:
    return tracking.start(mirrored_run(folder, notify, TrackerConfig(mode=mode), run_id))


def live(folder: Path) -> Any:
    """The runs that are open in the client."""
    return tracking.backend("wandb", folder).live  # type: ignore[attr-defined]


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
        ours = metrics(sweep, run_id)
        assert without_own_keys(rows) == ours
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
        assert found[run_id]["config"].items() <= config.items()
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


@pytest.mark.slow
def test_an_unreachable_server_leaves_the_runs_offline_and_says_so(tmp_path, server):
    server(WANDB_BASE_URL=NOWHERE, WANDB_API_KEY="f" * 40)
    code, err = train("seed=0,1", "tracker.mode=online", f"output_dir={tmp_path}", multirun=True)
    assert code == 0
    assert err.count("wandb: online start failed") == 1  # one run tries, for all
    sweep = tmp_path / "default"
    found = records(sweep)
    assert [one["status"] for one in found.values()] == ["finished", "finished"]
    files = offline_files(sweep)
    assert set(files) == set(found)  # under the run's own id, as `wandb sync` will send it
    for run_id, file in files.items():
        assert history(file) == metrics(sweep, run_id)
    assert sync_command(err) == ["lorabench", "sync", str(sweep)]
    assert "2 of 2 runs are not wholly at the server" in err


def test_without_a_key_the_run_goes_on_offline(tmp_path, server):
    server(
        WANDB_BASE_URL=NOWHERE, WANDB_API_KEY=None, HOME=str(tmp_path), NETRC=str(tmp_path / "none")
    )
    told: list[str] = []
    with tracking.of_command():
        tracker = start(tmp_path, told.append, mode="online")
        tracker.log({"train/loss": 1.0}, 1)
        tracking.finish_all([(tracker, {"test/nll": 2.0}, False)])
    assert len(told) == 1 and "online start failed" in told[0] and "go on offline" in told[0]
    assert list(offline_files(tmp_path)) == ["abc"]


@pytest.mark.slow
def test_a_failed_start_leaves_the_open_runs_of_the_process_alone(tmp_path, server, capsys):
    server(WANDB_BASE_URL=NOWHERE, WANDB_API_KEY="f" * 40)
    told: list[str] = []
    with tracking.of_command():
        first = start(tmp_path, told.append, run_id="first")
        wait_for(lambda: live(tmp_path))
        second = start(tmp_path, told.append, mode="online", run_id="second")
        wait_for(lambda: told)
        for step in (1, 2):
            for tracker, run_id in ((first, "first"), (second, "second")):
                log(tmp_path, tracker, run_id, step)
        tracking.finish_all([(first, {}, False), (second, {}, False)])
    assert len(told) == 1
    assert "start failed" in told[0] and "is written offline when it has ended" in told[0]
    files = offline_files(tmp_path)
    assert set(files) == {"first", "second"}
    for run_id, file in files.items():
        assert history(file) == metrics(tmp_path, run_id) and len(history(file)) == 2
    # The first was asked to be written offline alone.
    assert "1 of 2 runs are not wholly at the server" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["log", "finish"])
def test_a_tracker_that_breaks_does_not_hurt_the_run(tmp_path, monkeypatch, method):
    from wandb.sdk.wandb_run import Run

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("the disk of W&B is full\nand more")

    monkeypatch.setattr(Run, method, broken)
    code, err = train(f"output_dir={tmp_path}")
    assert code == 0
    assert err.count(f"wandb: {method} failed (the disk of W&B is full); the run goes on") == 1
    assert "wandb: 1 of 1 runs could not be written for wandb" in err and "and more" not in err
    (found,) = records(tmp_path / "default").values()
    assert found["status"] == "finished" and scores(found)["test"]["nll"]["value"] > 0
    lines = (tmp_path / "default" / found["run_id"] / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4


def test_a_client_that_takes_no_rows_costs_no_memory_and_no_row(tmp_path, monkeypatch):
    """More rows than are queued, while the client starts: the run is written again at its end."""
    import wandb

    def slow(**arguments: Any) -> Any:
        has_logged.wait()
        return init(**arguments)

    init, has_logged = wandb.init, threading.Event()
    monkeypatch.setattr(wandb, "init", slow)
    monkeypatch.setattr(limits, "QUEUED_ROWS", 10)
    with tracking.of_command():
        tracker = start(tmp_path, pytest.fail)
        for step in range(30):
            log(tmp_path, tracker, "abc", step)
        assert tracker.queue.qsize() == 10
        has_logged.set()
        wait_for(lambda: not tracker.queue.qsize())
        tracking.finish_all([(tracker, {"test/nll": 2.0}, False)])
    assert tracker.is_sent is False
    last = max(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert history(last) == metrics(tmp_path, "abc") and len(history(last)) == 30


def test_a_run_that_is_dropped_can_start_again(tmp_path, capsys):
    """As after out of memory: the same id, in the same client."""
    with tracking.of_command():
        for loss in (1.0, 2.0):
            tracker = start(tmp_path, pytest.fail)
            tracker.log({"train/loss": loss}, 1)
            if loss == 1.0:
                tracking.drop_all([tracker])
        tracking.finish_all([(tracker, {}, False)])
    assert capsys.readouterr().err == ""
    last = max(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert history(last) == [{"step": 1, "train/loss": 2.0}]


def test_wandb_that_cannot_be_imported_is_said_and_done_without(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    told: list[str] = []
    tracker = start(tmp_path, told.append)
    assert type(tracker) is tracking.NoTracker
    assert len(told) == 1 and "cannot be imported" in told[0]


@pytest.mark.parametrize("settings", [TrackerConfig(kind="none"), TrackerConfig(mode="disabled")])
def test_no_tracker_writes_and_says_nothing(tmp_path, settings):
    told: list[str] = []
    with tracking.of_command():
        tracker = tracking.start(mirrored_run(tmp_path / "s", told.append, settings))
        tracker.log({"train/loss": 1.0}, 1)
        tracking.finish_all([(tracker, {}, False)])
    assert told == [] and list(tmp_path.iterdir()) == []
