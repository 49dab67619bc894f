"""A sweep from the command line: its folders, what is kept, its plan, its runs, its table."""

from __future__ import annotations

import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import SMOKE, records, say, untouched
from safetensors import safe_open

from lorabench import adapters, cli, runner
from lorabench import model as base_model
from lorabench.record import this_process

GRID = ["head=exclude,lora", "seed=0,1"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multirun of four runs; tests may repeat its commands."""
    folder = tmp_path_factory.mktemp("outputs")
    said = say("train", "-m", *SMOKE, *GRID, f"output_dir={folder}")
    assert said.code == 0, said.err
    assert said.lines[-1] == (
        f"{folder}/default: 4 of 4 runs done; lorabench compare {folder}/default"
    )
    return folder


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
    assert {path.name for path in (output / "default").iterdir()} == {*found, "multirun.yaml"}
    for run_id, record in found.items():
        folder = output / "default" / run_id
        assert {path.name for path in folder.iterdir()} == {
            "record.json",
            "config.yaml",
            "metrics.jsonl",
            "predictions.parquet",
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
        table = pd.read_parquet(folder / "predictions.parquet")
        assert table.groupby("split").size().to_dict() == {
            "validation": 8,
            "test": 8,
        }  # eval_examples=8
        for split, scores in record["metrics"].items():
            part = table[table["split"] == split]
            assert part["example"].is_unique
            for name in ("nll", "exact_match"):
                assert scores[name]["value"] == pytest.approx(part[name].mean(), rel=1e-12)
                assert scores[name]["num_examples"] == 8
        with safe_open(folder / "adapter" / "adapter_model.safetensors", "np") as tensors:
            count = sum(tensors.get_tensor(name).size for name in tensors.keys())  # noqa: SIM118
        assert count == record["plan"]["trainable_parameters"]


def test_the_same_command_again_keeps_everything_and_takes_seconds(output, monkeypatch):
    """Nothing is loaded; composing and planning four runs takes about a second, 10 is generous."""

    def refuse(*_: Any) -> None:
        raise AssertionError("weights were read for runs that are kept")

    monkeypatch.setattr(base_model, "load", refuse)
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
        assert record["metrics"] == there["metrics"]

    alone = tmp_path / "alone"
    assert say("train", *SMOKE, "head=lora", "seed=1", f"output_dir={alone}").code == 0
    ((run_id, record),) = records(alone).items()
    there = records(output)[run_id]
    assert there["config"]["head"]["policy"] == "lora" and there["config"]["seed"] == 1
    assert record["plan"]["pack"]["size"] == 1 and there["plan"]["pack"]["size"] == 4
    for name in ("base", "data", "data_order", "initial_adapter"):
        assert record["hashes"][name] == there["hashes"][name]
    # A few float32 steps: rounding of a loss near 10, grown by AdamW's division.
    nll = [one["metrics"]["test"]["nll"]["value"] for one in (record, there)]
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


@pytest.mark.parametrize("file", [None, "multirun.yaml"])
def test_a_disk_that_takes_nothing_more_is_told_in_a_line(file, tmp_path, monkeypatch):
    """Whatever breaks inside a pack is told, not that the job around it has no result."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", file)

    monkeypatch.setattr(runner, "run_pack", full)
    said = say("train", "-m", *SMOKE, "seed=0,1", f"output_dir={tmp_path}")
    assert said.code == 2 and said.out == "" and len(said.lines) == 1
    where = f" at '{file}'" if file else ""
    assert said.err.startswith("disk: must be writable and have space; got 'No space left on dev")
    assert f"ice'{where}; make room" in said.err


@pytest.mark.parametrize("fails", [False, True])
def test_a_grid_point_that_is_another_run_becomes_what_that_became(tmp_path, monkeypatch, fails):
    """Two spellings of the default scale: one run, told twice and only once it has ended."""
    if fails:
        monkeypatch.setattr(adapters, "save", lambda *_: (_ for _ in ()).throw(OSError("full")))
    command = [*SMOKE, "lora.alpha_ratio=null,2", f"output_dir={tmp_path}"]
    task = cli.Train()
    kept, packs = task.plan(*cli.compose(["-m", *command]), 16)
    assert packs == [[0]] and kept == {}
    (first,) = task.run([0])
    assert set(kept) == {1} and kept[1]["label"] == "lora.alpha_ratio=2"
    for key in ("run_id", "status", "folder", "error"):
        assert kept[1][key] == first[key]
    assert first["status"] == ("failed" if fails else "finished")


def test_the_line_about_the_same_run_comes_behind_that_run(tmp_path):
    said = say("train", "-m", *SMOKE, "lora.alpha_ratio=null,2", f"output_dir={tmp_path}")
    assert said.code == 0 and len(records(tmp_path)) == 1
    assert said.lines[0] == "0 of 2 runs are kept from before, 1 to train, 1 the same as another"
    trained, same, last = said.lines[-3:]
    assert trained.startswith("run 1/1  lora.alpha_ratio=null  finished")
    assert same == "lora.alpha_ratio=2  finished: the same run as lora.alpha_ratio=null"
    assert "1 of 1 runs done" in last
    said = say("train", "-m", *SMOKE, "lora.alpha_ratio=null,2", f"output_dir={tmp_path}")
    assert said.lines[0] == "2 of 2 runs are kept from before, 0 to train"


def test_asking_hydra_for_the_config_trains_nothing(tmp_path):
    said = say("train", *SMOKE, "lora.r=7", f"output_dir={tmp_path}", "--cfg", "job")
    assert said.code == 0 and yaml.safe_load(said.out)["lora"]["r"] == 7
    assert untouched(tmp_path)


# --- plan, runs, compare ---------------------------------------------------------------------


def test_the_plan_of_a_sweep_says_what_the_sweep_did(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = say("plan", "-m", "--json", *SMOKE, *GRID, f"output_dir={output}")
    assert said.code == 0
    planned = json.loads(said.out)
    found = records(output)
    assert {one["run_id"] for one in planned["runs"]} == set(found)
    for one in planned["runs"]:
        record = found[one["run_id"]]
        assert {k: one[k] for k in record["plan"] if k != "pack"} == {
            k: v for k, v in record["plan"].items() if k != "pack"
        }
        assert one["folder"] == str(output / "default" / one["run_id"])
        assert (
            one["head"]["policy"] == record["config"]["head"]["policy"]
            and one["head"]["tied"] is True
        )
        assert ("lm_head" in one["lora_modules"]) is (one["head"]["policy"] == "lora")
        assert (
            one["label"]
            == f"head={record['config']['head']['policy']} seed={record['config']['seed']}"
        )
        assert one["memory_bytes"] > 0 and one["disk_bytes"] > 0 and one["seconds"] > 0
        assert one["tracker"] == "none"
    assert planned["seconds"] == pytest.approx(sum(one["seconds"] for one in planned["runs"]))
    assert untouched(tmp_path)


def test_plan_creates_no_files_and_shows_brackets_of_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = say(
        "plan",
        "-m",
        "target_modules=custom",
        "target_modules.names=[q_proj],[v_proj]",
        "head=exclude,lora",
    )
    assert said.code == 0
    assert untouched(tmp_path)
    labels = re.findall(r"target_modules\.names=\[(\w+)\] head=(\w+)", said.out)
    assert labels == [
        ("q_proj", "exclude"),
        ("q_proj", "lora"),
        ("v_proj", "exclude"),
        ("v_proj", "lora"),
    ]
    assert "4 runs on tiny-gemma" in said.out and "exclude, tied" in said.out
    assert "outputs/default/wandb" in said.out  # the tracker's address
    for word in ("memory", "seconds", "trainable", "outputs/default,"):
        assert word in said.out


def test_the_plan_of_a_mixed_sweep_speaks_of_all_its_runs(tmp_path, monkeypatch):
    """The first run's base and training had stood for everyone's."""
    monkeypatch.chdir(tmp_path)
    same = say("plan", "-m", *SMOKE, "head=exclude,lora,full", "lora.r=4,8").out
    assert same.count("\nbase      tiny-gemma: ") == same.count("\ntraining  4 steps of ") == 1
    words = ["task=seq_cls", "head=full", "data=classes"]
    mixed = ["model=tiny-gemma,tiny-bert", "trainer.steps=3,4", "lora.r=4,8"]
    lines = say("plan", "-m", *SMOKE, *words, *mixed).out.splitlines()
    assert lines[0].strip() == "8 runs on tiny-gemma, tiny-bert"
    told = [line for line in lines if line.startswith(("base ", "training "))]
    wanted = ["4 runs: tiny-gemma: ", "4 runs: tiny-bert: ", "4 runs: 3 steps", "4 runs: 4 steps"]
    assert [line[10 : 10 + len(text)] for line, text in zip(told, wanted, strict=True)] == wanted


def test_the_plan_packs_as_train_would_and_counts_a_run_once(tmp_path, monkeypatch):
    """plan took no notice of pack_size and of grid points that are the same run."""
    monkeypatch.chdir(tmp_path)

    def packs(*words: str) -> list[int]:
        content = json.loads(say("plan", "--json", "-m", *SMOKE, *words).out)
        assert len(content["runs"]) == sum(map(len, content["packs"]))
        return [len(pack) for pack in content["packs"]]

    assert packs("seed=0,1,2,3") == [4]
    assert packs("seed=0,1,2,3", "hydra.launcher.pack_size=3") == [2, 2]
    assert packs("seed=0,1", "hydra.launcher.pack_size=1") == [1, 1]
    assert packs("seed=0,1", "hydra/launcher=basic") == [1, 1]
    assert packs("lora.alpha_ratio=null,2", "seed=0,1") == [2]
    shown = say("plan", "-m", *SMOKE, "lora.r=4,8,4").out.splitlines()
    assert shown[0] == "3 grid points, 1 the same run as another"
    assert shown[1].strip() == "2 runs on tiny-gemma"
    for verb in ("plan", "train"):
        said = say(verb, "-m", *SMOKE, "seed=0,1", "hydra.launcher.pack_size=0")
        assert said.code == 2
        assert said.err == "hydra.launcher.pack_size: must be at least 1; got 0\n"


def test_the_first_step_tells_no_time_left(tmp_path):
    """Start-up over one step had told 22 minutes of a sweep that takes one."""
    said = say("train", *SMOKE, f"output_dir={tmp_path}")
    assert re.fullmatch(r"  run 1 of 1  step 1/4  loss [\d.]+  [\d,]+ tokens/s", said.lines[0])


def test_the_experiments_sweep_is_planned_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = json.loads(say("plan", "-m", "--json", "experiment=lm_head").out)["runs"]
    assert len(planned) == len({one["run_id"] for one in planned}) == 12
    assert {Path(one["folder"]).parent for one in planned} == {Path("outputs/lm_head")}
    fewer = json.loads(say("plan", "-m", "--json", "experiment=lm_head", "lora.r=16").out)["runs"]
    assert {one["run_id"] for one in fewer} < {one["run_id"] for one in planned} and len(fewer) == 4


def test_runs_lists_every_run(output):
    found = records(output)
    rows = json.loads(say("runs", str(output / "default"), "--json").out)
    assert {row["run_id"]: (row["status"], row["steps_done"], row["seeds"]) for row in rows} == {
        run_id: ("finished", 4, record["seeds"]) for run_id, record in found.items()
    }
    assert all(row["folder"] == str(output / "default" / row["run_id"]) for row in rows)
    text = say("runs", str(output / "default")).out
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert len(lines) == 4
    for run_id in found:
        (line,) = [line for line in lines if run_id in line]
        assert "finished" in line and "4/4" in line


def test_compare_has_one_row_a_setting(output):
    said = say("compare", str(output / "default"), "--json")
    content = json.loads(said.out)
    found = list(records(output).values())
    assert [row["setting"] for row in content["rows"]] == [
        {"head.policy": "exclude"},
        {"head.policy": "lora"},
    ]
    assert {one["run_id"] for one in content["runs"]} == {record["run_id"] for record in found}
    text = say("compare", str(output / "default")).out
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert len(lines) == 2
    for row, line in zip(content["rows"], lines, strict=True):
        policy = row["setting"]["head.policy"]
        values = [
            r["metrics"]["test"]["nll"]["value"]
            for r in found
            if r["config"]["head"]["policy"] == policy
        ]
        assert row["seeds"] == [0, 1] and len(values) == 2
        nll = row["metrics"]["test"]["nll"]
        assert nll["mean"] == pytest.approx(
            statistics.mean(values), rel=1e-12
        )  # last bits of float64
        assert nll["sd"] == pytest.approx(statistics.stdev(values), rel=1e-9)  # close values cancel
        assert (
            policy in line
            and f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" in line
        )


def test_a_file_that_was_edited_is_no_other_seed(jsonl, tmp_path):
    """Both runs carried the same words, and their difference was shown as spread over seeds."""
    words = ["data=jsonl", f"data.train.path={jsonl}", "data.max_length=40"]
    command = ["train", *SMOKE, *words, f"output_dir={tmp_path / 'out'}"]
    assert say(*command).code == 0
    jsonl.write_text(jsonl.read_text().replace("add", "sum"))
    assert say(*command).code == 0
    rows = json.loads(say("compare", str(tmp_path / "out" / "default"), "--json").out)["rows"]
    hashes = {r["hashes"]["data"][:8] for r in records(tmp_path / "out").values()}
    assert len(rows) == 2 and {row["setting"]["data.data_hash"] for row in rows} == hashes
    assert all(row["metrics"]["test"]["nll"]["n"] == 1 for row in rows)


def test_examples_that_cannot_be_used_are_told_for_all_runs_before_any_starts(jsonl, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    words = ["data=jsonl", f"data.train.path={few},{jsonl}", "data.max_length=2", "lora.r=2,4"]
    said = say("train", "-m", *SMOKE, *words, f"output_dir={tmp_path / 'out'}")
    assert said.code == 2 and len(said.err.splitlines()) == 2
    short, long = said.err.splitlines()
    assert short.startswith("data.train.path: must hold enough examples") and "few" in short
    assert long.startswith("data.max_length: must let at least one of")
    assert all(line.count("lora.r=2") == line.count("lora.r=4") == 1 for line in (short, long))
    assert not list((tmp_path / "out").rglob("record.json"))


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_an_experiment_without_m_is_said_to_be_one_run_of_a_sweep(verb, tmp_path):
    words = [*SMOKE, "experiment=lm_head", f"output_dir={tmp_path}"]
    said = say(verb, *words)
    assert said.code == 0
    first = said.err.splitlines()[0]
    assert first == "one run of a sweep over head, lora.r, seed; -m runs them all"
    assert "one run of" not in say("plan", "-m", *words).err


def test_runs_tells_apart_what_differs_in_one_seed_or_in_steps(tmp_path):
    grid = ["seeds.data=0,1", "trainer.steps=1,2"]
    assert say("train", "-m", *SMOKE, *grid, f"output_dir={tmp_path}").code == 0
    lines = say("runs", str(tmp_path / "default")).out.splitlines()
    (header,) = (line for line in lines if line.startswith("┃"))
    wanted = ["run", "steps", "seed", "seeds.data", "status", "done", "seconds", "error"]
    assert re.findall(r"[\w.]+", header) == wanted
    cells = [re.findall(r"[\w/.]+", line) for line in lines if line.startswith("│")]
    assert sorted(cell[1:4] for cell in cells) == [
        [steps, "0", data] for steps in "12" for data in "01"
    ]


def test_what_was_deleted_or_damaged_since_is_told(tmp_path):
    command = ["train", "-m", *SMOKE, "seed=0,1", f"output_dir={tmp_path}"]
    assert say(*command).code == 0
    first, second = (tmp_path / "default" / name for name in sorted(records(tmp_path)))
    label = f"seed={records(tmp_path)[first.name]['config']['seed']}"
    (first / "adapter" / "adapter_model.safetensors").unlink()
    said = say(*command)
    assert said.code == 0 and said.lines[1] == (
        f"{label}: kept without adapter/adapter_model.safetensors, which is gone; "
        f"remove {first} to train it again"
    )
    (second / "record.json").write_text("{")
    for verb in ("runs", "compare"):
        said = say(verb, str(tmp_path / "default"))
        assert said.code == 0 and "left out, record.json is damaged" in said.err
        assert len(said.lines) == 1 and second.name in said.err and first.name not in said.err
    assert say(*command).code == 0 and len(records(tmp_path)) == 2


def test_a_run_in_training_elsewhere_is_not_kept_from_before(tmp_path):
    command = ["train", *SMOKE, f"output_dir={tmp_path}"]
    assert say(*command).code == 0
    ((run_id, entry),) = records(tmp_path).items()
    entry |= {"status": "running", "process": this_process()}
    (tmp_path / "default" / run_id / "record.json").write_text(json.dumps(entry))
    said = say(*command)
    assert said.code == 1 and said.lines[0] == (
        "0 of 1 runs are kept from before, 0 to train, 1 in training by another process"
    )


def test_a_narrow_terminal_cuts_no_value_and_is_told_what_it_does_not_show(output, monkeypatch):
    """80 columns had cut numbers and ids: `0.07…`, `2f87a…`."""
    for name, value in {"FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    wide = json.loads(say("compare", str(output / "default"), "--json").out)
    for words in (["runs"], ["compare"], ["plan", "-m", *SMOKE, *GRID]):
        place = f"output_dir={output}" if words[0] == "plan" else str(output / "default")
        said = say(*words, place)
        shown = re.sub(r"\x1b\[[\d;]*m", "", said.out)
        table = [line for line in shown.splitlines() if line[-1:] in "┓┃┩│┘"]
        assert said.code == 0 and "…" not in shown and table
        assert max(map(len, table)) <= 80
        assert "left out at 80 columns: " in shown or words == ["runs"]
        if words == ["compare"]:
            for row in wide["rows"]:
                nll = row["metrics"]["test"]["nll"]
                assert f"{nll['mean']:.4f} ± {nll['sd']:.4f}" in shown
        else:
            assert all(run_id in shown for run_id in records(output))


@pytest.mark.parametrize("verb", ["runs", "compare"])
def test_a_folder_that_is_not_there_names_the_sweeps_that_are(verb, output, tmp_path):
    said = say(verb, str(output / "defualt"))
    assert said.code == 2 and said.out == "" and len(said.lines) == 1
    assert "does not exist" in said.err and str(output / "default") in said.err
    said = say(verb, str(tmp_path))
    assert said.code == 2 and len(said.lines) == 1
    assert f"'{tmp_path}' has none" in said.err and "lorabench train" in said.err
