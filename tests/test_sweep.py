"""Runs that are kept, resumed, tried again; checkpoints that are trusted only when they fit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed, scores
from processes import running, slowly, wait_for

from lorabench import adapters, checkpoint, cli, data, plan, record
from lorabench import model as base_model
from lorabench.pack import ModulePack
from lorabench.train import train

FAST = [
    "tracker=none", "data.num_train=64", "data.num_validation=8", "data.num_test=8",
    "trainer.batch_size=2", "target_modules=attention",
]  # fmt: skip


def the_record(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*/*/record.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_a_local_folder_trains_on_a_local_jsonl(
    kind: str, tiny_folder: Callable[[str], Path], jsonl: Path, tmp_path: Path
) -> None:
    code = cli.main(
        [
            "train",
            "-m",
            "model=local",
            f"model.path={tiny_folder(kind)}",
            "data=jsonl",
            f"data.train.path={jsonl}",
            "data.max_length=64",
            "head=exclude,lora",
            "trainer=smoke",
            "tracker=none",
            f"output_dir={tmp_path / 'out'}",
        ]
    )
    assert code == 0
    paths = list((tmp_path / "out").glob("default/*/record.json"))
    assert len(paths) == 2
    for path in paths:
        found = json.loads(path.read_text())
        assert found["status"] == "finished" and found["steps_done"] == 4
        assert found["config"]["model"]["path"] == str(tiny_folder(kind))
        assert scores(found)["test"]["nll"]["value"] > 0


def test_the_same_run_twice_has_the_same_adapter_hash(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        arguments = ["trainer.steps=15", "lora.lora_dropout=0.1", f"output_dir={tmp_path / name}"]
        assert cli.main(["train", *FAST, *arguments]) == 0
        found.append(the_record(tmp_path / name))
    assert found[0]["hashes"] == found[1]["hashes"]
    assert set(found[0]["hashes"]) == {
        "base",
        "train",
        "train_tokens",
        "data_order",
        "initial_adapter",
        "adapter",
    }
    assert found[0]["hashes"]["adapter"] != found[0]["hashes"]["initial_adapter"]
    assert scores(found[0]) == scores(found[1])


def run_to(config: Any, stop: int | None, state: Any = None, start: int = 0) -> ModulePack:
    base = base_model.load(config.model, "cpu")
    pack = ModulePack(base, config, plan.make(config).lora_modules, "cpu")
    if state is not None:
        pack.load_state(0, state)
    tokenizer = base_model.tokenizer(config.model)
    tokens = data.tokenise(data.load(config.data).train, tokenizer, config.data)
    for step in train(pack, tokens, data.pad_id(tokenizer), start):
        if step.step == stop:
            break
    return pack


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    config = composed(*FAST, "trainer.steps=12", "lora.lora_dropout=0.2", "head=full")
    whole = run_to(config, None)
    half = run_to(config, 5)
    checkpoint.write(tmp_path / "checkpoint", half.state(0), 5, {"run": 1})
    checkpoint.commit(tmp_path / "checkpoint")
    assert list(checkpoint.steps(tmp_path / "checkpoint")) == [5]
    loaded = checkpoint.load(tmp_path / "checkpoint", 5, {"run": 1})
    resumed = run_to(config, None, loaded, 5)
    assert adapters.state_hash(adapters.adapter_state(resumed.wrapped)) == adapters.state_hash(
        adapters.adapter_state(whole.wrapped)
    )


def test_a_killed_run_resumes_to_the_same_adapter(tmp_path: Path) -> None:
    """kill -9 in the middle, the same command again: the uninterrupted run's bits and rows."""
    arguments = [*FAST, "trainer.steps=20", "trainer.checkpoint_every=2", "trainer.num_threads=1"]
    killed = tmp_path / "killed"
    words = ["train", *arguments, f"output_dir={killed}"]
    with running(tmp_path / "said.txt", *words, before=slowly) as process:
        wait_for(lambda: list(killed.glob("default/*/checkpoint/checkpoint.json")))
        time.sleep(0.1)
        process.send(signal.SIGKILL)
        process.wait()
    (path,) = killed.glob("default/*/record.json")
    assert json.loads(path.read_text())["status"] == "running"
    found = record.read(path.parent)
    assert found is not None and found.status == "interrupted"
    done = json.loads((path.parent / "checkpoint" / "checkpoint.json").read_text())["steps_done"]
    assert 0 < done < 20
    assert found.steps_done == done, "as `runs` shows it"
    with running(tmp_path / "again.txt", *words) as again:
        assert again.wait() == 0, again.said
    assert cli.main(["train", *arguments, f"output_dir={tmp_path / 'whole'}"]) == 0
    a, b = the_record(killed), the_record(tmp_path / "whole")
    assert a["hashes"] == b["hashes"] and scores(a) == scores(b)
    steps = [
        json.loads(line)["step"]
        for line in (path.parent / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 21))
    assert not (path.parent / "checkpoint").exists()


def test_interruption_is_recorded_and_leaves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorabench import progress

    def interrupt(self: Any, step: int, *rest: Any) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(progress.Display, "step", interrupt)
    assert cli.main(["train", *FAST, "trainer.steps=9", f"output_dir={tmp_path}"]) == 143
    assert "continues" in capsys.readouterr().err
    assert the_record(tmp_path)["status"] == "interrupted"
    assert list(tmp_path.glob("default/*/checkpoint/state.safetensors"))
    monkeypatch.undo()
    before = the_record(tmp_path)["cost"]
    assert before["train_tokens"] > 0 and before["train_seconds"] > 0
    assert cli.main(["train", *FAST, "trainer.steps=9", f"output_dir={tmp_path}"]) == 0
    assert the_record(tmp_path)["status"] == "finished"
    # The cost is the whole run's, as if it had not been interrupted.
    assert cli.main(["train", *FAST, "trainer.steps=9", f"output_dir={tmp_path / 'whole'}"]) == 0
    cost = the_record(tmp_path)["cost"]
    assert cost["train_tokens"] == the_record(tmp_path / "whole")["cost"]["train_tokens"]
    assert cost["total_seconds"] > cost["train_seconds"] > before["train_seconds"]


def test_a_checkpoint_of_other_versions_is_refused_before_anything_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorabench import model as base_model
    from lorabench import progress

    def interrupt(self: Any, step: int, *rest: Any) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def never(*arguments: Any) -> None:
        raise AssertionError("a model was loaded")

    arguments = ["train", "-m", *FAST, "seed=0,1", "trainer.steps=9", f"output_dir={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(progress.Display, "step", interrupt)
        assert cli.main(arguments) == 143
    paths = sorted(tmp_path.glob("default/*/checkpoint/checkpoint.json"))
    assert len(paths) == 2
    for path, version in zip(paths, ("0.1.2", "0.1.3"), strict=True):
        content = json.loads(path.read_text())
        assert content["fingerprint"]["packages"].keys() >= {"torch", "numpy", "tokenizers"}
        content["fingerprint"]["packages"]["numpy"] = version
        content["fingerprint"]["arithmetic"] = 1
        content["checksum"] = checkpoint._checksum(content)
        path.write_text(json.dumps(content))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(base_model, "load_verified", never)
        assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, "both checkpoints, before either is resumed"
    for version in ("0.1.2", "0.1.3"):
        (line,) = (line for line in lines if version in line)
        assert f"arithmetic: 1 -> {record.ARITHMETIC_VERSION}; packages.numpy: " in line
        assert "remove" in line
    for path in paths:
        shutil.rmtree(path.parent)
    assert cli.main(arguments) == 0


@pytest.mark.parametrize("break_it", ["fingerprint", "tensors"])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, break_it: str) -> None:
    folder = tmp_path / "checkpoint"
    checkpoint.write(folder, {"w": torch.arange(8.0)}, 3, {"r": 16, "lr": 1e-3})
    checkpoint.commit(folder)
    wanted = {"r": 16, "lr": 1e-3}
    if break_it == "fingerprint":
        wanted = {"r": 32, "lr": 1e-3}
    else:
        file = folder / "state.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 4
        file.write_bytes(content)
    with pytest.raises((checkpoint.Mismatch, checkpoint.Damaged)) as refused:
        checkpoint.load(folder, 3, wanted)
    assert ("r: 16 -> 32" if break_it == "fingerprint" else "damaged") in str(refused.value)
    assert "lr" not in str(refused.value)


def test_a_crash_between_the_renames_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    checkpoint.write(folder, {"w": torch.zeros(2)}, 3, {})
    checkpoint.commit(folder)
    folder.rename(tmp_path / ".checkpoint.old")
    assert list(checkpoint.steps(folder)) == [3]
    assert checkpoint.load(folder, 3, {})["w"].tolist() == [0, 0]
    assert not checkpoint.steps(tmp_path / "none")


def test_a_run_that_diverges_is_stopped_and_kept(tmp_path: Path) -> None:
    arguments = [
        "train",
        *FAST,
        "trainer.steps=30",
        "trainer.lr=1e30",
        "trainer.warmup_steps=0",
        f"output_dir={tmp_path}",
    ]
    assert cli.main(arguments) == 1
    found = the_record(tmp_path)
    assert found["status"] == "stopped" and "not finite" in found["error"]
    assert found["steps_done"] < 30
    ended = found["ended"]
    assert cli.main(arguments) == 1
    assert the_record(tmp_path)["ended"] == ended
