"""What W&B users compare with is in the run: read from the client's own file, or from a server."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import composed, say, scores
from processes import wait_for
from test_tracker_faults import has_rows, kill_when_rows_are_sent, tracked
from test_tracking import (
    TINY,
    history,
    inspect,
    metrics,
    of_kind,
    offline_files,
    records,
    train,
    without_own_keys,
)
from wandb_server import Server

from lorabench.record import Record
from lorabench.worker import members

CHECKPOINTED = ["trainer.checkpoint_every=5"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two head policies, offline; the machine's own values are sampled ten times a second."""
    import wandb

    folder = tmp_path_factory.mktemp("dashboards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.1")
        wandb.teardown()  # it reads the environment once
        words = ["head=exclude,lora", "seed=3", "trainer.lr=2e-3", "trainer.eval_every=2"]
        code, err = train(*words, f"output_dir={folder}", multirun=True)
        assert code == 0, err
        wandb.teardown()
    return folder / "default"


@pytest.fixture(scope="module")
def transactions(sweep: Path) -> dict[str, list[dict[str, Any]]]:
    return {run_id: inspect(file) for run_id, file in offline_files(sweep).items()}


def test_columns_to_group_by_are_at_the_top_with_their_types(sweep, transactions):
    """Fails for a rank that is text, or a head policy that only the nested config has."""
    for run_id, rows in transactions.items():
        record = records(sweep)[run_id]
        config = of_kind(rows, "run")[0]["config"]["update"]
        policy = record["config"]["head"]["policy"]
        columns = {
            "base": "tiny-gemma", "head_policy": policy,
            "targets": "attention", "rank": 16, "alpha": 32.0, "lr": 2e-3, "seed": 3, "steps": 4,
            "dataset": record["config"]["data"]["name"],
        }  # fmt: skip
        assert {key: config[key] for key in columns} == columns
        assert config["setting"].startswith(f"head={policy} r=16 targets=attention ")
        numbers = ("rank", "alpha", "lr", "seed", "steps")
        assert all(isinstance(config[key], int | float) for key in numbers)
        assert config["lora"]["r"] == 16 and config["trainer"]["lr"] == 2e-3


def recorded(*words: str) -> Record:
    """The record of a run as it starts, with the hashes of other data for another number."""
    content = dataclasses.asdict(composed(*words))
    hashes = {"base": "b", "train": str(content["data"]["num_train"])}
    empty: dict[str, Any] = {"seeds": {}, "plan": {}, "provenance": {}}
    return Record(
        run_id="r", sweep="s", status="running", config=content, hashes=hashes, **empty
    )


def test_a_setting_is_the_same_for_its_seeds_alone():
    """Fails where two learning rates, or an edited data file, would be averaged as seeds."""
    first, *others = [
        members.setting_id(recorded(*words))
        for words in (
            ("seed=0",), ("seed=1", "tracker.tags=[a]", "sweep=other", "trainer.num_threads=2"),
            ("trainer.lr=3e-4",), ("lora.bias=all",), ("data.num_train=32",),
        )
    ]  # fmt: skip
    assert others[0] == first and len({first, *others[1:]}) == 4


def test_notes_plan_and_hashes_are_the_records(sweep, transactions):
    for run_id, rows in transactions.items():
        record, run = records(sweep)[run_id], of_kind(rows, "run")[0]
        assert run.get("notes", "") == "\n".join(record["notes"])
        config = run["config"]["update"]
        assert config["plan"] == record["plan"]
        assert config["hashes"].items() <= record["hashes"].items() and config["hashes"]["base"]


def test_every_metric_is_drawn_over_the_steps(transactions):
    for rows in transactions.values():
        axes = {
            one.get("name") or one.get("glob_name"): one.get("step_metric")
            for one in of_kind(rows, "metric")
        }
        assert axes["*"] == "step" and set(axes) <= {"step", "*"}
        logged = without_own_keys(rows)
        assert all("step" in row for row in logged)
        names = {name for row in logged for name in row}
        assert {"train/loss", "train/lr", "train/grad_norm", "validation/nll"} <= names


def test_validation_and_test_are_in_the_summary_under_their_own_names(sweep, transactions):
    for run_id, rows in transactions.items():
        summary: dict[str, Any] = {}
        for update in of_kind(rows, "summary"):
            summary |= update["update"]
        record = records(sweep)[run_id]
        for split in ("validation", "test"):
            assert summary[f"{split}/nll"] == scores(record)[split]["nll"]["value"]
        assert summary["status"] == "finished" and summary["steps_done"] == 4
        assert summary["adapter_hash"] == record["hashes"]["adapter"]
        nested = [name for name, value in summary.items() if isinstance(value, dict)]
        assert set(nested) <= {"_wandb"}, "columns are called train/loss, not train/loss.last"


def test_the_machine_is_measured(transactions):
    for rows in transactions.values():
        measured = {name for one in of_kind(rows, "stats") for name in one["item"]}
        assert any(name.startswith("cpu") or "memory" in name for name in measured)


def test_the_record_is_among_the_files(sweep):
    for run_id, file in offline_files(sweep).items():
        copy = file.parent / "files" / "record.json"
        assert copy.read_bytes() == (sweep / run_id / "record.json").read_bytes()
        saved = [item["path"] for one in of_kind(inspect(file), "files") for item in one["files"]]
        assert "record.json" in saved


def test_online_the_server_has_config_summary_record_and_adapter(tmp_path, server):
    with tracked(tmp_path, server.address) as process:
        assert process.wait() == 0, process.said
    assert "not wholly" not in process.said and "adapter" not in process.said
    found = records(tmp_path / "default")
    assert set(server.runs) == set(found)
    for run_id, record in found.items():
        assert server.runs[run_id]["groupName"] == "default"
        config = json.loads(server.runs[run_id]["config"])
        assert config["head_policy"]["value"] == "exclude" and config["rank"]["value"] == 16
        summary = server.summaries[run_id]
        assert summary["test/nll"] == scores(record)["test"]["nll"]["value"]
        assert server.rows(run_id) == metrics(tmp_path / "default", run_id)
        folder = tmp_path / "default" / run_id
        assert server.files[f"{run_id}/record.json"] == (folder / "record.json").read_bytes()
        artifact = f"adapter-{run_id}"
        assert server.artifacts[artifact]["artifactTypeName"] == "model"
        for path in (folder / "adapter").iterdir():
            assert server.files[f"{artifact}/{path.name}"] == path.read_bytes()


@pytest.mark.slow
def test_an_adapter_is_not_sent_where_it_is_not_wanted(tmp_path, server):
    with tracked(tmp_path, server.address, words=["tracker.log_adapter=false"]) as process:
        assert process.wait() == 0, process.said
    assert len(server.runs) == 2 and not server.artifacts


@pytest.mark.faults
def test_a_run_that_is_killed_and_resumed_is_one_whole_offline_file(tmp_path, server):
    """It was two files, which together held fewer rows than the run has."""
    words, sweep = CHECKPOINTED, tmp_path / "default"
    with tracked(tmp_path, server.address, mode="offline", words=words) as process:
        wait_for(has_rows(tmp_path, 8))
        process.send(signal.SIGKILL)
        process.wait()
    before = {file.parent for file in offline_files(sweep).values()}
    with tracked(tmp_path, server.address, mode="offline", words=words) as process:
        assert process.wait() == 0, process.said
    after = offline_files(sweep)
    assert len(after) == 2 and not before & {file.parent for file in after.values()}
    assert len(list(sweep.glob("wandb/offline-run-*"))) == 2
    for run_id, file in after.items():
        assert history(file) == metrics(sweep, run_id)
        assert [row["step"] for row in history(file)] == list(range(1, 13))


def number(row: dict[str, Any]) -> tuple[int, bool]:
    """What orders the rows of a run: validation comes after the step that it follows."""
    return row["step"], "validation/nll" in row


@pytest.mark.faults
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (CHECKPOINTED, []),
        (CHECKPOINTED, ["trainer.log_every=3", "trainer.eval_every=4"]),
        (["trainer.log_every=4", "trainer.eval_every=2"], ["trainer.eval_every=5"]),
    ],
    ids=["the same", "fewer rows", "more rows, from the first step on"],
)
def test_a_run_that_is_killed_and_resumed_has_each_step_once_at_the_server(
    tmp_path, server, monkeypatch, before, after
):
    """Fails where rows are left out by their count: other settings write another number of rows."""
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")
    words, sweep = ["trainer.steps=40"], tmp_path / "default"
    kill_when_rows_are_sent(tmp_path, server, [*words, *before])
    had = {run_id: dict(lines) for run_id, lines in server.lines.items()}
    rows_before = {run_id: server.rows(run_id) for run_id in had}
    assert all(len(rows) > 4 and rows[-1]["step"] < 40 for rows in rows_before.values())
    with tracked(tmp_path, server.address, words=[*words, *after]) as process:
        assert process.wait() == 0, process.said
    for run_id, first in rows_before.items():
        ours = metrics(sweep, run_id)
        last = number(first[-1])
        assert server.rows(run_id) == first + [row for row in ours if number(row) > last]
        assert had[run_id].items() <= server.lines[run_id].items(), "not sent again"
        numbers = [number(row) for row in server.rows(run_id)]
        assert numbers == sorted(set(numbers)) and numbers[-1] == (40, False)
        if not after:
            assert [step for step, _ in numbers] == list(range(1, 41))
        # What both trained is the same but for its speed.
        losses = {number(row): row.get("train/loss") for row in ours}
        had_losses = {number(row): row.get("train/loss") for row in first}
        assert {**losses, **had_losses} == {**had_losses, **losses}
        assert server.summaries[run_id]["steps_done"] == 40
    assert "not wholly" not in process.said


def synced(folder: Path, server: Server, place: Path) -> subprocess.CompletedProcess[str]:
    """`lorabench sync` as a user types it."""
    variables = {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": "f" * 40, "HOME": str(place)}
    return subprocess.run(
        [sys.executable, "-m", "lorabench", "sync", str(folder)],
        env=os.environ | variables | {"WANDB_SILENT": "false"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_sync_sends_what_was_written_offline_once(tmp_path, server):
    code, err = train("seed=0,1", f"output_dir={tmp_path}", multirun=True)
    assert code == 0, err
    sweep = tmp_path / "default"
    done = synced(sweep, server, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 runs are at the server" in done.stdout
    for run_id, record in records(sweep).items():
        assert server.rows(run_id) == metrics(sweep, run_id)
        assert server.runs[run_id]["groupName"] == "default"
        assert server.files[f"{run_id}/record.json"]
        assert server.summaries[run_id]["test/nll"] == scores(record)["test"]["nll"]["value"]
    server.lines.clear()
    done = synced(sweep, server, tmp_path)
    assert done.returncode == 0 and "nothing to send" in done.stdout and not server.lines


@pytest.mark.slow
def test_sync_says_what_a_server_did_not_take(tmp_path, server):
    code, err = train(f"output_dir={tmp_path}")
    assert code == 0, err
    server.break_down("401")
    done = synced(tmp_path / "default", server, tmp_path)
    assert done.returncode == 1 and "1 of 1 runs were not sent" in done.stderr
    server.fault = ""
    assert synced(tmp_path / "default", server, tmp_path).returncode == 0


def test_sync_refuses_a_folder_that_is_not_there(tmp_path):
    said = say("sync", tmp_path / "nowhere")
    assert said.code == 2 and "does not exist" in said.err
    said = say("sync", tmp_path)
    assert said.code == 0 and "nothing to send" in said.out


def test_the_words_of_a_tracker_that_writes_files(tmp_path):
    said = say("plan", *TINY, "tracker=tensorboard", "tracker.mode=online")
    assert said.code == 2 and "tracker.mode: must be offline or disabled" in said.err
