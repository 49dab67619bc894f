"""What is told of a sweep on the command line: its plan, its runs, its table."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import statistics
from pathlib import Path

import pytest
from conftest import GRID, SMOKE, records, say, scores, untouched

from lorabench import lease

# --- plan, runs, compare ---------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    device, step, *_ = said.lines
    assert device.startswith("device: ")
    assert re.fullmatch(r"  run 1 of 1  step 1/4  loss [\d.]+  [\d,]+ tokens/s", step)


@pytest.mark.slow
def test_the_experiments_sweep_is_planned_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = json.loads(say("plan", "-m", "--json", "experiment=lm_head").out)["runs"]
    assert len(planned) == len({one["run_id"] for one in planned}) == 30
    assert {Path(one["folder"]).parent for one in planned} == {Path("outputs/lm_head")}
    fewer = json.loads(say("plan", "-m", "--json", "experiment=lm_head", "lora.r=16").out)["runs"]
    assert {one["run_id"] for one in fewer} < {one["run_id"] for one in planned} and len(
        fewer
    ) == 10


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


def test_runs_of_a_status_alone_and_a_status_that_is_none(output):
    folder = str(output / "default")
    every = json.loads(say("runs", folder, "--json").out)
    assert json.loads(say("runs", folder, "--status", "failed,finished", "--json").out) == every
    said = say("runs", folder, "--status", "failed")
    assert said.code == 0 and said.out == f"{folder}: no run is failed; there are 4 finished\n"
    for words in ("faild", "finished,faild"):
        said = say("runs", folder, "--status", words)
        assert said.code == 2 and said.out == "" and len(said.lines) == 1
        assert said.err.startswith("--status: must name statuses, of planned, running, trained")
        assert "got 'faild' (did you mean 'failed'?)" in said.err
    assert "got none" in say("runs", folder, "--status", ",").err


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
    assert len(lines) == 3 and "untrained" in lines[2]
    for row, line in zip(content["rows"], lines[:2], strict=True):
        policy = row["setting"]["head.policy"]
        values = [
            scores(r)["test"]["nll"]["value"]
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
    hashes = {r["hashes"]["train"][:8] for r in records(tmp_path / "out").values()}
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


@pytest.mark.slow
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
    (first / "adapter" / "adapter_model.safetensors").unlink()
    text = (
        f"{first}: adapter/adapter_model.safetensors is gone; "
        f"remove '{first}' and repeat `{shlex.join(['lorabench', *command])}`"
    )
    said = say(*command)
    assert said.code == 1 and said.lines[-1].endswith(f": finished: {text}")
    (second / "record.json").write_text("{")
    for verb in ("runs", "compare"):
        said = say(verb, str(tmp_path / "default"))
        assert said.code == 0 and said.lines[0] == text
        assert "left out, record.json is damaged" in said.lines[1] and second.name in said.lines[1]
    shutil.rmtree(first)
    assert say(*command).code == 0 and len(records(tmp_path)) == 2


def test_a_run_that_another_process_trains_is_running(tmp_path):
    """What a second launch does with it is in test_worker.py."""
    command = ["train", *SMOKE, f"output_dir={tmp_path}"]
    assert say(*command).code == 0
    ((run_id, entry),) = records(tmp_path).items()
    entry["status"] = "running"
    (tmp_path / "default" / run_id / "record.json").write_text(json.dumps(entry))

    def shown() -> str:
        (run,) = json.loads(say("runs", str(tmp_path / "default"), "--json").out)
        return run["status"]

    assert shown() == "interrupted"
    pack = entry["plan"]["pack"]["id"]
    taken = lease.take(tmp_path / "default" / ".locks" / f"{pack}.json", 60)
    assert shown() == "running"
    taken.lease.release()
    assert say(*command).code == 0 and shown() == "finished"


@pytest.mark.slow
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
