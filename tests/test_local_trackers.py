"""trackio and TensorBoard: read back with their own readers, after kills too."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import say, scores
from processes import running, slowly, wait_for
from test_tracking import TINY, metrics, mirrored_run, records

from lorabench import tracking
from lorabench.config import TrackerConfig
from lorabench.tracking import limits

KINDS = ("trackio", "tensorboard")
FEW = ["-m", "seed=0,1", "trainer.eval_every=2"]
LONG = [*FEW, "trainer.steps=12", "trainer.checkpoint_every=5"]


def in_trackio(sweep: Path) -> dict[str, dict[str, Any]]:
    """Config and rows of each run, by trackio's own queries; the run id ends a run's name."""
    found: dict[str, dict[str, Any]] = {}
    with sqlite3.connect(sweep / "trackio" / "lorabench.db") as database:
        for name, content in database.execute("SELECT run_name, config FROM configs"):
            found[name.split()[-1]] = {"config": json.loads(content), "rows": [], "name": name}
        for name, step, content in database.execute(
            "SELECT run_name, step, metrics FROM metrics ORDER BY id"
        ):
            found[name.split()[-1]]["rows"].append({"step": step, **json.loads(content)})
    database.close()
    return found


def in_tensorboard(sweep: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Steps and values of each tag, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for folder in (sweep / "tensorboard").iterdir():
        reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        reader.Reload()
        found[folder.name.rpartition("_")[2]] = {
            tag: [(one.step, one.value) for one in reader.Scalars(tag)]
            for tag in reader.Tags()["scalars"]
        }
    return found


def rows_of(kind: str, sweep: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What a tracker has of each run: tag -> steps and values, in order."""
    if kind == "tensorboard":
        return in_tensorboard(sweep)
    found = {}
    for run_id, run in in_trackio(sweep).items():
        found[run_id] = series(run["rows"])
    return found


def series(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    tags: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for tag, value in row.items():
            if tag != "step":
                tags.setdefault(tag, []).append((row["step"], value))
    return tags


def check(kind: str, sweep: Path) -> None:
    """Every row of metrics.jsonl is there once, in order, and the last scores beside them."""
    found, recorded = rows_of(kind, sweep), records(sweep)
    assert set(found) == set(recorded)
    within = 1e-7 if kind == "tensorboard" else 0  # event files hold float32
    for run_id, record in recorded.items():
        last = record["steps_done"]
        expected = series(metrics(sweep, run_id))
        for split in ("validation", "test"):
            value = scores(record)[split]["nll"]["value"]
            expected.setdefault(f"{split}/nll", []).append((last, value))
        expected["cost/train_seconds"] = [(last, record["cost"]["train_seconds"])]
        for tag, points in expected.items():
            assert [step for step, _ in found[run_id][tag]] == [step for step, _ in points], tag
            values = [value for _, value in found[run_id][tag]]
            assert values == pytest.approx([value for _, value in points], rel=within), tag


@pytest.fixture(scope="module", params=KINDS)
def tracked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("tracked")
    said = say("train", *TINY, *FEW, f"tracker={request.param}", f"output_dir={folder}")
    assert said.code == 0, said.err
    assert request.param not in said.out + said.err  # it prints nothing
    yield request.param, folder / "default"


def test_each_row_and_the_last_scores_are_there(tracked):
    check(*tracked)


@pytest.mark.parametrize("tracked", ["trackio"], indirect=True)
def test_trackio_has_config_and_group(tracked):
    _, sweep = tracked
    for run_id, run in in_trackio(sweep).items():
        record, config = records(sweep)[run_id], run["config"]
        assert config["head_policy"] == "exclude" and config["targets"] == "attention"
        assert config["rank"] == 16 and config["seed"] == record["config"]["seed"]
        assert config["lora"] == record["config"]["lora"]
        assert config["hashes"].items() <= record["hashes"].items()
        assert config["_Group"] == "default"
        assert run["name"] == f"seed={config['seed']} {run_id}"


@pytest.mark.parametrize("tracked", ["tensorboard"], indirect=True)
def test_tensorboard_has_the_columns_as_hyperparameters(tracked):
    _, sweep = tracked
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    for folder in (sweep / "tensorboard").iterdir():
        reader = EventAccumulator(str(folder))
        reader.Reload()
        content = reader.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
        found = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
        assert found["head_policy"].string_value == "exclude"
        assert found["rank"].number_value == 16
        assert found["seed"].number_value in (0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_says_where_it_writes(kind, tmp_path):
    said = say("plan", *TINY, f"tracker={kind}", f"output_dir={tmp_path}")
    assert said.code == 0 and str(tmp_path / "default" / kind) in said.out


def writers(pid: int) -> list[psutil.Process]:
    """The processes that write for a command."""
    found = psutil.Process(pid).children()
    return [one for one in found if any("writer.py" in word for word in one.cmdline())]


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_sweep_that_is_resumed_has_each_step_once(kind, tmp_path):
    words = [*TINY, *LONG, f"tracker={kind}", f"output_dir={tmp_path}"]
    other = [word.replace("eval_every=2", "eval_every=3") for word in words]  # another row count
    sweep = tmp_path / "default"

    def lines() -> list[int]:
        return [p.read_text().count("\n") for p in sweep.glob("*/metrics.jsonl")]

    with running(tmp_path / "said", "train", *words, before=lambda: slowly(0.3)) as process:
        wait_for(lambda: len(lines()) == 2 and min(lines()) >= 8)
        (writer,) = writers(process.pid)
        process.send(signal.SIGKILL)
        process.wait()
        assert writer.is_running()  # it writes what is there, then exits by itself
        wait_for(lambda: not writer.is_running() or writer.status() == psutil.STATUS_ZOMBIE, 30)
    killed = rows_of(kind, sweep)
    written = [len(run["train/loss"]) + len(run["validation/nll"]) for run in killed.values()]
    assert len(written) == 2 and min(written) >= 8, "rows of training and of validation"
    with running(tmp_path / "said", "train", *other) as process:
        assert process.wait() == 0, process.said
    check(kind, sweep)
    assert all(len(run["train/loss"]) == 12 for run in rows_of(kind, sweep).values())


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("kind", KINDS)
def test_the_writing_process_is_stopped_or_killed(kind, number, tmp_path):
    """The run does not wait for it, and its rows are written again by another one."""
    words = [*TINY, *LONG, f"tracker={kind}", f"output_dir={tmp_path}"]
    sweep = tmp_path / "default"

    def before() -> None:
        slowly(0.2)
        limits.FINISH_SECONDS, limits.REWRITE_SECONDS = 3.0, 20.0

    with running(tmp_path / "said", "train", *words, before=before) as process:
        wait_for(lambda: any(p.read_text().count("\n") > 3 for p in sweep.glob("*/metrics.jsonl")))
        (writer,) = writers(process.pid)
        writer.send_signal(number)
        assert process.wait(60) == 0, process.said
    assert not psutil.pid_exists(writer.pid) or writer.status() == psutil.STATUS_ZOMBIE
    assert "could not be written" not in process.said
    check(kind, sweep)


def test_rows_that_trackio_drops_are_told(tmp_path):
    """A database that takes no row, as on a full disk: trackio itself only warns of it."""
    folder = tmp_path / "s"
    (folder / "abc").mkdir(parents=True)
    (folder / "abc" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')

    def mirror() -> list[str]:
        told: list[str] = []
        with tracking.of_command():
            run = mirrored_run(folder, told.append, TrackerConfig(kind="trackio"))
            tracking.finish_all([(tracking.start(run), {"test/nll": 2.0}, False)])
        return told

    assert mirror() == []
    with sqlite3.connect(folder / "trackio" / "lorabench.db") as database:
        database.execute(
            "CREATE TRIGGER full BEFORE INSERT ON metrics BEGIN SELECT RAISE(ABORT, 'full'); END"
        )
    database.close()
    (line,) = mirror()
    assert line.startswith("trackio: OSError: 0 of 2 rows are in the database, as where its disk")
    assert line.endswith("; the run goes on")


def test_what_cannot_be_written_is_told_and_hurts_no_run(tmp_path, monkeypatch):
    """A package that fails when it is imported, as a broken installation does."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "trackio.py").write_text("raise OSError('no room\\nand more')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "broken"), *sys.path]))
    told: list[str] = []
    folder = tmp_path / "s"
    (folder / "abc").mkdir(parents=True)
    (folder / "abc" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    with tracking.of_command():
        run = mirrored_run(folder, told.append, TrackerConfig(kind="trackio"))
        tracker = tracking.start(run)
        tracker.log({"train/loss": 2.0}, 1)
        tracking.finish_all([(tracker, {"test/nll": 2.0}, False)])
    assert told == ["trackio: OSError: no room; the run goes on"]
