"""Exports that are refused, and what plan and record say of exports."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT_RUN, say
from exports import PATTERNS, base_of, loaded
from safetensors.torch import load_file, save_file

from lorabench import formats, record
from lorabench.export import source, write


def refused(*arguments: Any) -> str:
    said = say("export", *arguments)
    assert said.code == 2 and said.out == "" and len(said.lines) == 1, said
    return said.lines[0]


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A run that a test may damage."""
    run = tmp_path / "sweep" / "0123456789ab"
    shutil.copytree(trained("llama", "head=lora"), run)
    return run


def change(run: Path, **changes: Any) -> None:
    path = run / "record.json"
    content = json.loads(path.read_text()) | changes
    del content["checksum"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "megred"], "--to: must be one of adapter, merged, gguf; got 'megred' (did you"),
        (["--to", "merged", "--dtype", "bf16"], "--dtype: must be one of float32, bfloat16, flo"),
        (["--to", "adapter", "--dtype", "float16"], "--dtype: must go with --to merged"),
    ],
)
def test_words_that_are_none(options, message, copied, tmp_path):
    assert refused(copied, *options, tmp_path / "x").startswith(message)


def test_a_run_that_is_not_there_names_the_nearest(copied, tmp_path):
    line = refused(copied.with_name("0123456789ac"), "--to", "merged", tmp_path / "x")
    assert line.startswith("RUN: must be the folder of a run (with record.json); ")
    assert "0123456789ac' does not exist" in line and "finished in" in line
    assert line.endswith(": 0123456789ab")
    line = refused(copied.parent, "--to", "merged", tmp_path / "x")
    assert "has none; finished in" in line and line.endswith(": 0123456789ab")


def test_a_run_that_has_not_finished(copied, tmp_path):
    change(copied, status="failed", error="RuntimeError: boom")
    line = refused(copied, "--to", "merged", tmp_path / "x")
    assert line.startswith("RUN: must have finished; ") and "is failed (RuntimeError: boom)" in line


def test_nothing_is_overwritten(copied, tmp_path):
    place = tmp_path / "there"
    place.mkdir()
    (place / "mine").write_text("precious")
    assert refused(copied, "--to", "merged", place).startswith(
        "PATH: must not exist or be an empty"
    )
    assert refused(copied, "--to", "adapter", place / "mine").endswith("is a file; give another")
    assert [path.name for path in place.iterdir()] == ["mine"]
    assert (place / "mine").read_text() == "precious"


def test_another_base_is_refused_with_both_hashes(copied, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(base_of(copied), base)
    config = json.loads((copied / "record.json").read_text())["config"]
    config["model"]["path"] = str(base)
    change(copied, config=config)
    then = json.loads((copied / "record.json").read_text())["provenance"]["weights"]
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    line = refused(copied, "--to", "merged", tmp_path / "x")
    assert line.startswith("model.path: must be the base run ") and then in line
    assert len(set(re.findall("[0-9a-f]{64}", line))) == 2
    shutil.rmtree(base)
    assert refused(copied, "--to", "adapter", tmp_path / "x").startswith("model.path: ")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_another_adapter_is_refused(kind, copied, tmp_path):
    file = copied / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    line = refused(copied, "--to", kind, tmp_path / "x")
    begin = f"RUN: must hold the adapter that was trained; {copied}: adapter/{file.name} "
    assert line.startswith(f"{begin}has other content than was recorded; remove '{copied}' and")
    file.unlink()
    assert refused(copied, "--to", kind, tmp_path / "x").startswith(f"{begin}is gone; remove")
    assert not (tmp_path / "x").exists()


def test_another_adapter_is_refused_where_no_files_were_recorded(copied, tmp_path):
    """As in records of before; the hash of the tensors tells."""
    change(copied, files={})
    file = copied / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    line = refused(copied, "--to", "adapter", tmp_path / "x")
    assert line.startswith("RUN: its adapter must be the one it trained, hash ")
    file.unlink()
    assert "has none" in refused(copied, "--to", "adapter", tmp_path / "x")


def test_an_adapter_config_that_leaves_modules_out_is_refused(copied, tmp_path):
    """PEFT loads what it finds a module for, and says nothing of the rest."""
    file = copied / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    settings["target_modules"] = ["q_proj"]
    change(copied, files={})
    file.write_text(json.dumps(settings))
    line = refused(copied, "--to", "adapter", tmp_path / "x")
    assert line.startswith("export: PEFT must load the adapter's ")
    assert not (tmp_path / "x").exists()


def test_gguf_is_answered_with_the_reason_and_the_way_out(trained, tmp_path):
    run, place = trained("gemma", "head=lora"), tmp_path / "x"
    line = refused(run, "--to", "gguf", place)
    assert line.startswith("--to gguf: a GGUF of gemma has no output tensor")
    assert "the way out: train with head=exclude" in line
    run = trained("llama", "head=lora", "lora.use_dora=true", *PATTERNS)
    line = refused(run, "--to", "gguf", place)
    assert "refuses DoRA" in line and "holds one alpha" in line
    assert f"lorabench export {run} --to merged PATH, then llama.cpp's convert_hf_to_gguf" in line
    line = refused(trained("llama", "head=lora"), "--to", "gguf", place)
    assert line.startswith("--to gguf: not written yet; ")
    assert not place.exists()
    assert refused(trained("llama", "head=lora"), "--to", "gguf") == line, "no PATH is needed"


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_what_is_written_needs_a_place(kind, trained):
    line = refused(trained("gemma", "head=lora"), "--to", kind)
    assert line == f"PATH: must be a new or an empty folder for --to {kind}; got none"


# --- plan and record -------------------------------------------------------------------------


@pytest.mark.slow
def test_plan_says_what_a_run_cannot_be_exported_to(trained, tmp_path):
    said = say(
        "plan", "-m", *SHORT_RUN, f"output_dir={tmp_path}", "head=exclude,lora,full", "seed=0,1"
    )
    assert said.code == 0, said.err
    lines = [line for line in said.out.splitlines() if line.startswith("export ")]
    reason = formats.HEADLESS
    assert len(lines) == 1 and reason in lines[0]
    assert lines[0].startswith("export    4 runs, no gguf: a GGUF of gemma has no output tensor")
    said = say("plan", *SHORT_RUN, f"output_dir={tmp_path}", "head=exclude")
    assert "\nexport " not in said.out


def test_a_record_carries_its_exports(trained):
    run = trained("gemma", "head=lora")
    found = json.loads((run / "record.json").read_text())
    assert found["exports"] == {"adapter": "yes", "merged": "yes"} | {
        "gguf": found["plan"]["exports"]["gguf"]
    }
    assert formats.HEADLESS in found["exports"]["gguf"]


def test_a_run_that_stopped_has_nothing_to_export(tiny_folder, tmp_path):
    base = ["model=local", f"model.path={tiny_folder('llama')}", f"output_dir={tmp_path}"]
    say("train", *SHORT_RUN, *base, "trainer.lr=1e30")
    (path,) = (record.parent for record in tmp_path.glob("*/*/record.json"))
    found = json.loads((path / "record.json").read_text())
    assert found["status"] == "stopped"
    assert set(found["exports"].values()) == {"the run has not finished"}


def test_a_record_of_before_reads_without_exports(copied):
    path = copied / "record.json"
    old = json.loads(path.read_text())
    del old["exports"], old["checksum"]
    path.write_text(json.dumps(old))
    assert record.read(copied).exports is None
    assert refused(copied, "--to", "gguf", "x").startswith("--to gguf: not written yet")


def test_hub_data_are_left_alone(trained, tmp_path):
    """No network for a check: random tokens are enough."""
    run = source.open_run(trained("llama", "head=lora"))
    run.config.data.source, run.config.data.train.path = "hub", "org/name"
    model = loaded(Path(run.model.path))
    batches, said = write._batches(run, model, None)
    assert len(batches) == 1 and said.endswith("no test example (org/name lies on the hub)")
