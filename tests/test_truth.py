"""A record names what was trained, to the token and to the byte, or the run is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import records, say, scores
from processes import running, slowly, wait_for

from lorabench import data, identity, plan
from lorabench import model as base_model
from lorabench.config import ModelConfig
from lorabench.data.ragged import Ragged

FAST = ["trainer=smoke", "trainer.num_threads=1", "tracker=none", "lora.r=2",
        "data.max_length=64"]  # fmt: skip


def rows(path: Path, answer: Callable[[int], int]) -> None:
    lines = (json.dumps({"prompt": f"{i}+1=", "completion": str(answer(i))}) for i in range(40))
    path.write_text("".join(line + "\n" for line in lines))


@pytest.fixture
def two_files(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    rows(first, lambda i: i + 1)
    rows(second, lambda i: i + 2)
    return first, second


def command(out: Path, files: tuple[Path, Path], *more: str) -> list[str]:
    paths = f"data.train.path={files[0]},{files[1]}"
    return ["train", "-m", *FAST, "data=jsonl", paths, f"output_dir={out}", *more]


@pytest.mark.slow
@pytest.mark.parametrize("keeps_size_and_time", [False, True])
def test_a_file_edited_in_mid_sweep_fails_its_pack_alone(
    keeps_size_and_time: bool, tmp_path: Path, two_files: tuple[Path, Path]
) -> None:
    """Planned as one file and read as another: the run of the old id must not be recorded."""
    out = tmp_path / "out"
    first, second = two_files
    original, before = second.read_text(), second.stat()
    words = command(out, two_files, "trainer.steps=30")
    with running(tmp_path / "said.txt", *words, before=slowly) as process:
        wait_for(lambda: list(out.glob("*/*/metrics.jsonl")))  # of the first file
        if keeps_size_and_time:
            second.write_text(original.replace('"3"', '"4"'))
            os.utime(second, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert second.stat().st_size == before.st_size
        else:
            second.write_text(original + original.splitlines()[0] + "\n")
        assert process.wait() == 1
    assert "1 of 2 runs did not finish:" in process.said
    assert "data.train: must still be the data that was planned, " in process.said
    assert "repeat the command" in process.said
    by_path = {r["config"]["data"]["train"]["path"]: r for r in records(out).values()}
    assert by_path[str(first)]["status"] == "finished"
    assert by_path.get(str(second), {"status": "failed"})["status"] == "failed"
    # The same command plans with what is there now, under another id.
    assert say(*words).code == 0
    finished = [r for r in records(out).values() if r["status"] == "finished"]
    ids = {r["config"]["data"]["train"]["path"]: r["run_id"] for r in finished}
    assert ids[str(second)] != by_path.get(str(second), {}).get("run_id")
    # And with the old file back, the old run is still to be trained.
    second.write_text(original)
    said = say(*words)
    assert said.code == 0 and said.lines[0] == "1 of 2 runs are kept from before, 1 to train"


def folder_with(place: Path, source: Path, seed: int | None) -> Path:
    """A checkpoint, its weights moved by a draw."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, place, dirs_exist_ok=True)
    if seed is not None:
        moved = AutoModelForCausalLM.from_pretrained(source)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        moved.save_pretrained(place)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["weights", "tokenizer"])
def test_a_base_replaced_in_mid_sweep_fails_its_pack_alone(
    changed: str, tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    out = tmp_path / "out"
    first = folder_with(tmp_path / "first", tiny_folder("llama"), None)
    second = folder_with(tmp_path / "second", tiny_folder("llama"), 1)
    words = ["train", "-m", *FAST, "data.max_length=24", "data.num_train=32",
             "data.num_validation=4", "data.num_test=4", "model=local", "trainer.steps=30",
             f"model.path={first},{second}", f"output_dir={out}"]  # fmt: skip
    with running(tmp_path / "said.txt", *words, before=slowly) as process:
        wait_for(lambda: list(out.glob("*/*/metrics.jsonl")))
        if changed == "weights":
            shutil.copy(first / "model.safetensors", second / "model.safetensors")
        else:
            path = second / "tokenizer_config.json"
            path.write_text(path.read_text().replace("{", '{"padding_side": "left",', 1))
        assert process.wait() == 1
    assert "1 of 2 runs did not finish:" in process.said
    assert "model.path: must still be the" in process.said and "planned" in process.said
    by_path = {r["config"]["model"]["path"]: r for r in records(out).values()}
    assert by_path[str(first)]["status"] == "finished"
    assert by_path.get(str(second), {"status": "failed"})["status"] == "failed"


def test_the_record_names_the_tokens_that_were_trained_on(
    tmp_path: Path, two_files: tuple[Path, Path]
) -> None:
    """Hashes of token ids, recomputed here from the files by hand."""
    import hashlib

    import numpy as np

    out = tmp_path / "out"
    words = ["train", *FAST, "data=jsonl", f"data.train.path={two_files[0]}", f"output_dir={out}"]
    assert say(*words).code == 0
    ((_, record),) = records(out).items()
    from conftest import composed

    config = composed(*words[1:])
    tokenizer = base_model.tokenizer(config.model)
    examples = data.load(config.data)
    found = {
        split: data.tokenise(getattr(examples, split), tokenizer, config.data)
        for split in ("train", "validation", "test")
    }
    assert record["hashes"]["train_tokens"] == found["train"].hash()
    splits = record["evaluations"][0]["splits"]
    for split in ("validation", "test"):
        assert splits[split]["tokens"] == found[split].hash()
    table = record["evaluations"][0]["predictions"]
    (path,) = out.glob(f"*/*/{table}")
    recorded = record["evaluations"][0]["predictions_sha256"]
    assert recorded == hashlib.sha256(path.read_bytes()).hexdigest()
    # One token more, and the hash is another.
    first, *others = found["train"].input_ids
    longer = replace(found["train"], input_ids=Ragged.of([[*first, 3], *others]))
    assert longer.hash() != record["hashes"]["train_tokens"]
    assert np.isfinite(scores(record)["test"]["nll"]["value"])


def test_each_record_tells_its_mates_apart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["train", "-m", *FAST, "data.max_length=24", "data.num_train=32",
             "data.num_validation=4", "data.num_test=4", f"output_dir={out}"]  # fmt: skip
    assert say(*words, "head=exclude,lora", "lora.r=2,4").code == 0
    found = records(out)
    for run, record in found.items():
        assert set(record["mates"]) == set(found) - {run}
        for mate, keys in record["mates"].items():
            there = found[mate]["config"]
            whole = identity.json.loads(json.dumps(record["config"]))
            for key, value in keys.items():
                group, _, name = key.partition(".")
                whole[group][name] = value
            assert whole == there, "the mate's config, from this record alone"


def test_the_same_plan_by_another_planner_has_the_same_ids() -> None:
    from conftest import composed

    config = composed("head=lora", "lora.r=4")
    one, two = plan.Planner().make(config), plan.Planner().make(config)
    assert (one.run_id, one.evaluation_id) == (two.run_id, two.evaluation_id)
    assert base_model.identity(ModelConfig(path="lorabench:tiny-gemma"))["weights"]
