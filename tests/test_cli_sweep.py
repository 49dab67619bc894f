"""A sweep from the command line: its folders, and what is kept of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import GRID, SMOKE, predictions, records, say, scores, untouched
from safetensors import safe_open

from lorabench import adapters
from lorabench import model as base_model
from lorabench.sweep import SweepFolder


def adapter_files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every saved adapter."""
    return {
        path.parent.parent.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.glob("*/*/adapter/adapter_model.safetensors")
    }


# --- a sweep ---------------------------------------------------------------------------------


def test_a_multirun_leaves_a_whole_folder_for_each_run(output):
    found = records(output)
    assert len(found) == 4
    assert {path.name for path in (output / "default").iterdir()} == {
        *found,
        "base",
        "multirun.yaml",
        "sweep.json",
        ".locks",
    }
    for run_id, record in found.items():
        folder = output / "default" / run_id
        assert {path.name for path in folder.iterdir()} == {
            "record.json",
            "config.yaml",
            "metrics.jsonl",
            "evaluations",
            "adapter",
            ".hydra",
            "train.log",
        }
        assert (
            record["status"] == "finished" and record["error"] is None and record["steps_done"] == 4
        )
        assert record["run_id"] == run_id and record["sweep"] == "default"
        assert yaml.safe_load((folder / "config.yaml").read_text()) == record["config"]
        assert {p.name for p in (folder / "adapter").iterdir()} >= {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        overrides = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())
        assert f"seed={record['config']['seed']}" in overrides
        assert f"head={record['config']['head']['policy']}" in overrides
        assert not any(output.glob("**/*.part"))
    chosen = {(r["config"]["head"]["policy"], r["config"]["seed"]) for r in found.values()}
    assert chosen == {("exclude", 0), ("exclude", 1), ("lora", 0), ("lora", 1)}


def test_the_files_of_a_run_agree_with_its_record(output):
    """pandas' mean of the per-example values: 1e-12 for another order of summation."""
    for run_id, record in records(output).items():
        folder = output / "default" / run_id
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert all(row["train/loss"] > 0 for row in rows)
        table = pd.read_parquet(predictions(folder))
        assert table.groupby("split").size().to_dict() == {
            "validation": 8,
            "test": 8,
        }  # eval_examples=8
        for split, found in scores(record).items():
            part = table[table["split"] == split]
            assert part["example"].is_unique
            for name in ("nll", "exact_match"):
                assert found[name]["value"] == pytest.approx(part[name].mean(), rel=1e-12)
                assert found[name]["num_examples"] == 8
        with safe_open(folder / "adapter" / "adapter_model.safetensors", "np") as tensors:
            count = sum(tensors.get_tensor(name).size for name in tensors.keys())  # noqa: SIM118
        assert count == record["plan"]["trainable_parameters"]


def test_who_may_read_a_runs_folder_may_read_its_files(output, tmp_path):
    """safetensors gives its files to one user alone."""
    exported = tmp_path / "exported"
    run = next((output / "default").glob("*/record.json")).parent
    assert say("export", run, "--to", "adapter", exported).code == 0
    files = [path for place in (output, exported) for path in place.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".jsonl", ".parquet"}
    for path in files:
        if path.parent.name != ".locks":
            assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o666, path


def test_the_same_command_again_keeps_everything_and_takes_seconds(output, monkeypatch):
    """Nothing is loaded; composing and planning four runs takes about a second, 10 is generous."""

    def refuse(*_: Any) -> None:
        raise AssertionError("weights were read for runs that are kept")

    monkeypatch.setattr(base_model, "load_verified", refuse)
    files, before = adapter_files(output), records(output)
    assert len(files) == 4
    begun = time.perf_counter()
    said = say("train", "-m", *SMOKE, *GRID, f"output_dir={output}")
    assert time.perf_counter() - begun < 10
    assert said.code == 0 and said.lines[0] == "4 of 4 runs are kept from before, 0 to train"
    assert adapter_files(output) == files and records(output) == before


def test_a_single_run_lands_in_the_folder_of_the_same_run_of_a_multirun(output):
    files, before = adapter_files(output), records(output)
    said = say("train", *SMOKE, "head=lora", "seed=1", f"output_dir={output}")
    assert said.code == 0 and said.lines[0] == "1 of 1 runs are kept from before, 0 to train"
    assert adapter_files(output) == files and records(output) == before


def test_the_same_run_alone_and_elsewhere_has_the_same_adapter(output, tmp_path):
    """Bit for bit in the same pack; alone, with other matrix shapes, up to rounding."""
    same = tmp_path / "same"
    grid = ["head=exclude,lora", "seed=0,1"]
    assert say("train", "-m", *SMOKE, *grid, f"output_dir={same}").code == 0
    for run_id, record in records(same).items():
        there = records(output)[run_id]
        assert record["plan"]["pack"] == there["plan"]["pack"]
        assert record["hashes"] == there["hashes"] and len(record["hashes"]["adapter"]) >= 12
        assert adapter_files(same)[run_id][0] == adapter_files(output)[run_id][0]
        assert scores(record) == scores(there)

    alone = tmp_path / "alone"
    assert say("train", *SMOKE, "head=lora", "seed=1", f"output_dir={alone}").code == 0
    ((run_id, record),) = records(alone).items()
    there = records(output)[run_id]
    assert there["config"]["head"]["policy"] == "lora" and there["config"]["seed"] == 1
    assert record["plan"]["pack"]["size"] == 1 and there["plan"]["pack"]["size"] == 4
    for name in ("base", "train", "train_tokens", "data_order", "initial_adapter"):
        assert record["hashes"][name] == there["hashes"][name]
    # A few float32 steps: rounding of a loss near 10, grown by AdamW's division.
    nll = [scores(one)["test"]["nll"]["value"] for one in (record, there)]
    assert nll[0] == pytest.approx(nll[1], rel=1e-4)
    assert (
        len({one["hashes"]["adapter"] for one in records(output).values()}) == 4
    )  # a hash can differ


def test_a_failing_run_does_not_end_the_sweep_and_is_tried_again(tmp_path, monkeypatch):
    save, calls = adapters.save, []

    def first_fails(*arguments: Any) -> str:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(28, "No space left [on device]")
        return save(*arguments)

    monkeypatch.setattr(adapters, "save", first_fails)
    command = ["train", "-m", *SMOKE, "lora.r=4,8,4", f"output_dir={tmp_path}"]
    said = say(*command)
    assert said.code == 1 and "Traceback" not in said.err and said.out == ""
    found = {record["config"]["lora"]["r"]: record for record in records(tmp_path).values()}
    assert (found[4]["status"], found[8]["status"]) == ("failed", "finished")
    assert "No space left [on device]" in found[4]["error"]
    folder = tmp_path / "default" / found[4]["run_id"]
    assert said.lines[-2] == "1 of 2 runs did not finish:"
    assert said.lines[-1].startswith(f"  lora.r=4 ({folder}): failed: OSError: ")
    assert "Traceback" in (folder / "train.log").read_text()  # for the one who looks for the cause
    shown = say("runs", str(tmp_path / "default"))
    assert shown.code == 0 and "No space left [on device]" in " ".join(shown.out.split())

    finished = adapter_files(tmp_path)[found[8]["run_id"]]
    said = say(*command)
    assert said.code == 0, said.err
    assert len(calls) == 3  # the failed one alone was tried again
    found = {record["config"]["lora"]["r"]: record for record in records(tmp_path).values()}
    assert found[4]["status"] == "finished" and found[4]["error"] is None
    assert adapter_files(tmp_path)[found[8]["run_id"]] == finished


@pytest.mark.parametrize("file", [None, "sweep.json"])
def test_a_disk_that_takes_nothing_more_is_told_in_a_line(file, tmp_path, monkeypatch):
    """What breaks outside the runs is told, not that a job has no result."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", file)

    monkeypatch.setattr(SweepFolder, "add", full)
    said = say("train", "-m", *SMOKE, "seed=0,1", f"output_dir={tmp_path}")
    assert said.code == 2 and said.out == "" and len(said.lines) == 1
    where = f" at '{file}'" if file else ""
    assert said.err.startswith("disk: must be writable and have space; got 'No space left on dev")
    assert f"ice'{where}; make room" in said.err


def test_a_grid_point_that_is_a_failed_run_has_failed_too(tmp_path, monkeypatch):
    """Two spellings of the default scale: one run, told twice and only once it has ended."""
    monkeypatch.setattr(adapters, "save", lambda *_: (_ for _ in ()).throw(OSError("full")))
    said = say("train", "-m", *SMOKE, "lora.alpha_ratio=null,2", f"output_dir={tmp_path}")
    assert said.code == 1
    assert "lora.alpha_ratio=2  failed: the same run as lora.alpha_ratio=null" in said.lines
    assert "1 of 1 runs did not finish:" in said.lines


def test_the_line_about_the_same_run_comes_behind_that_run(tmp_path):
    said = say("train", "-m", *SMOKE, "lora.alpha_ratio=null,2", f"output_dir={tmp_path}")
    assert said.code == 0 and len(records(tmp_path)) == 1
    assert said.lines[0] == "0 of 2 runs are kept from before, 1 to train, 1 the same as another"
    trained, _, same, last = said.lines[-4:]  # the second is about the untrained base
    assert trained.startswith("run 1/1  lora.alpha_ratio=null  finished")
    assert same == "lora.alpha_ratio=2  finished: the same run as lora.alpha_ratio=null"
    assert "1 of 1 runs done" in last
    said = say("train", "-m", *SMOKE, "lora.alpha_ratio=null,2", f"output_dir={tmp_path}")
    assert said.lines[0] == "2 of 2 runs are kept from before, 0 to train"


def test_asking_hydra_for_the_config_trains_nothing(tmp_path):
    said = say("train", *SMOKE, "lora.r=7", f"output_dir={tmp_path}", "--cfg", "job")
    assert said.code == 0 and yaml.safe_load(said.out)["lora"]["r"] == 7
    assert untouched(tmp_path)
