"""The command line: the overview, and what a mistake is answered with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOKE, say, untouched

from lorabench import cli
from lorabench.config import ConfigErrors

SCRIPT = Path(sys.executable).with_name("lorabench")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(SCRIPT), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


# --- the overview ----------------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy():
    """A second is generous: 0.06 s were measured, importing torch alone takes four."""
    begun = time.perf_counter()
    done = run("--help", PYTHONPROFILEIMPORTTIME="1")
    seconds = time.perf_counter() - begun
    assert done.returncode == 0
    for verb in cli.VERBS:
        assert re.search(rf"^  {verb} +\w", done.stdout, re.MULTILINE)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "lorabench.cli" in imported  # the list is not empty
    assert not imported & {"torch", "transformers", "peft", "hydra", "omegaconf", "pandas", "wandb"}
    assert seconds < 1


def test_no_word_at_all_shows_the_overview():
    assert say().out == say("--help").out != ""


def test_version_is_the_installed_one():
    from importlib import metadata

    assert say("--version").out == f"lorabench {metadata.version('lorabench')}\n"


@pytest.mark.parametrize(
    ("word", "meant"), [("tarin", "train"), ("comapre", "compare"), ("run", "runs")]
)
def test_an_unknown_verb_names_the_verbs_and_the_nearest(word, meant):
    said = say(word)
    assert said.code == 2 and said.out == "" and len(said.lines) == 1
    assert f"'{word}' (did you mean '{meant}'?)" in said.err
    assert all(verb in said.err for verb in cli.VERBS)


# --- mistakes --------------------------------------------------------------------------------


def test_every_override_that_is_refused_is_told_at_once(tmp_path, no_model):
    wrong = ["trainer.lr=abc", "trainer.steps=1.5", "head=inc", "lora.r=4,x", "lora.rr=3"]
    said = say("train", "-m", *SMOKE, f"output_dir={tmp_path}", *wrong)
    assert said.code == 2 and said.out == ""
    keys = [word.partition("=")[0] for word in wrong]
    assert sorted(line.partition(":")[0] for line in said.lines) == sorted(keys)
    assert untouched(tmp_path)


MISTAKES = [  # override, how the one line begins, what it must also hold
    ("head=exlude", "head: must be one of exclude, full, lora", "(did you mean 'exclude'?)"),
    ("data=metamath", "data: must be one of", "(did you mean 'metamathqa'?)"),
    ("experiment=lmhead", "experiment: must be one of", "(did you mean 'lm_head'?)"),
    ("modle=gpt2", "modle: no such key", "(did you mean 'model'?)"),
    ("lora.rr=8", "lora.rr: no such key", "(did you mean 'lora.r'?)"),
    ("trainer.step=8", "trainer.step: no such key", "(did you mean 'trainer.steps'?)"),
    ("+lora.alpha=8", "lora.alpha: no such key", "'lora_alpha'"),
    ("+foo=1", "foo: no such key", "'foo'"),
    ("lora.r=0", "lora.r: must be at least 1", "got 0"),
    ("lora.r=many", "lora.r: ", "'many'"),
    ("model=local", "model.path: must be given", "set model.path="),
    ("model.path=lorabench:tiny-gema", "model.path: ", "'tiny-gema'"),
    ("data.skills=[greeek]", "data.skills: every name must be one of", "(did you mean 'greek'?)"),
    ("lora.r", "lora.r: must be KEY=VALUE", "`lorabench train --cfg job` prints all keys"),
    ("lora.rank_pattern.q_proj=8", "lora.rank_pattern: must be", "'lora.rank_pattern={q_proj:8}'"),
    ("lora.alpha_pattern.0.mlp=3", "lora.alpha_pattern: must be", "alpha_pattern={0.mlp:3}'"),
    ("lora.r=4,8", "lora.r: must be one value in a single run; got 4,8; ", "-m lora.r=4,8, "),
    ("head=exclude,lora", "head: must be one value in a single run", "-m head=exclude,lora"),
    ("lora.r=4,", "lora.r: the values of a sweep must have commas and no spaces", "'4,'"),
    ("data.metric=nll", "data.metric: must be a list; got one value", "'data.metric=[VALUE]'"),
    ("trainer.device=cuda:99", "trainer.device: must be on this machine", "use auto or cpu"),
]


@pytest.mark.parametrize(
    ("verb", "override", "begins", "holds"),
    [("train", *mistake) for mistake in MISTAKES]
    + [("plan", *mistake) for mistake in MISTAKES[::4]],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(
    verb, override, begins, holds, tmp_path, no_model
):
    said = say(verb, *SMOKE, f"output_dir={tmp_path}", override)
    assert said.code == 2 and said.out == ""
    assert len(said.lines) == 1
    assert said.err.startswith(begins) and holds in said.err
    assert untouched(tmp_path)


def test_a_device_that_is_not_there_is_shown_with_all_other_errors(tmp_path, no_model):
    words = ["trainer.device=cuda:99", "data=jsonl", f"data.train.path={tmp_path / 'none.jsonl'}"]
    said = say("train", "-m", *words, "tracker=none", "seed=0,1", f"output_dir={tmp_path}")
    assert said.code == 2
    assert [line.partition(":")[0] for line in said.lines] == ["trainer.device", "data.train.path"]


def test_the_mapping_that_a_pattern_key_is_told_to_be_is_one():
    said = say("plan", *SMOKE, "lora.rank_pattern.q_proj=8")
    remedy = said.err.rpartition("write '")[2].rstrip("'\n")
    planned = json.loads(say("plan", "--json", *SMOKE, remedy, "lora.r=4").out)["runs"]
    plain = json.loads(say("plan", "--json", *SMOKE, "lora.r=4").out)["runs"]
    assert planned[0]["trainable_parameters"] > plain[0]["trainable_parameters"]


@pytest.mark.parametrize(
    ("flags", "holds"),
    [
        (["-x"], "got '-x'"),
        (["--jsno"], "got '--jsno' (did you mean '--json'?)"),
        (["-m", "--smok", "seed=0,1"], "(did you mean '--smoke'?)"),
    ],
)
def test_an_unknown_flag_of_plan_names_the_valid_ones(flags, holds, no_model):
    said = say("plan", *SMOKE, *flags)
    assert said.code == 2 and said.out == "" and len(said.lines) == 1
    assert said.err.startswith("plan: a flag must be one of -m, --multirun, --json, --smoke, ")
    assert holds in said.err


def test_an_unknown_flag_of_train_names_the_valid_ones(no_model):
    said = say("train", *SMOKE, "--multrun")
    assert said.code == 2 and said.out == "" and len(said.lines) == 1
    assert said.err.startswith("train: a flag must be one of -m, --multirun, --config-dir, ")
    assert "(did you mean '--multirun'?)" in said.err


def test_plan_prints_the_config_as_train_does(no_model):
    printed = [say(verb, *SMOKE, "lora.r=7", "--cfg", "job").out for verb in ("plan", "train")]
    assert printed[0] == printed[1] and "r: 7" in printed[0]


def test_a_traceback_only_when_asked_for():
    plain, full = run("plan", "lora.r=0"), run("plan", "lora.r=0", HYDRA_FULL_ERROR="1")
    assert plain.returncode == 2 and plain.stderr == "lora.r: must be at least 1; got 0\n"
    assert full.returncode == 1 and full.stderr.startswith("Traceback (most recent call last)")
    assert "lora.r: must be at least 1; got 0" in full.stderr


def test_the_variable_is_left_as_it_was(monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    say("plan", "lora.r=0")
    assert "HYDRA_FULL_ERROR" not in os.environ
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigErrors):
        say("plan", "lora.r=0")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_a_defect_is_one_line_too(monkeypatch):
    from lorabench import sweep

    def broken(*_: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(sweep, "plan_jobs", broken)
    said = say("plan", *SMOKE)
    assert (
        said.code == 2 and "KeyError: 'surprise'" in said.err and "HYDRA_FULL_ERROR=1" in said.err
    )
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("content", "holds"),
    [
        (None, "does not exist"),
        ("", "is empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "line 2 of"),
        ('{"question": "a", "completion": "b"}\n', "unknown: 'prompt'"),
    ],
    ids=["missing", "empty", "bad line", "no column"],
)
@pytest.mark.parametrize("flag", [[], ["-m", "seed=0,1"]], ids=["single", "multirun"])
def test_unfit_data_is_refused_before_a_model_is_read(content, holds, flag, tmp_path, no_model):
    file = tmp_path / "mine.jsonl"
    if content is not None:
        file.write_text(content)
    out = tmp_path / "out"
    said = say(
        "train", *flag, "data=jsonl", f"data.train.path={file}", "tracker=none", f"output_dir={out}"
    )
    assert said.code == 2 and len(said.lines) == 1
    assert said.err.startswith("data.") and str(file) in said.err and holds in said.err
    assert not list(out.glob("**/record.json"))


def test_all_errors_of_a_sweep_are_shown_and_say_which_runs(tmp_path, no_model):
    said = say(
        "train",
        "-m",
        *SMOKE,
        "lora.r=0,8",
        "lora.lora_dropout=0,1",
        "trainer.lr=-1",
        f"output_dir={tmp_path}",
    )
    assert said.code == 2
    assert sorted(said.lines) == [
        "lora.lora_dropout: must be in [0, 1); got 1.0"
        "  [lora.r=0 lora.lora_dropout=1 | lora.r=8 lora.lora_dropout=1]",
        "lora.r: must be at least 1; got 0"
        "  [lora.r=0 lora.lora_dropout=0 | lora.r=0 lora.lora_dropout=1]",
        "trainer.lr: must be above 0; got -1.0",
    ]
    assert not list(tmp_path.glob("**/record.json"))


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_an_output_folder_that_cannot_be_is_refused(verb, tmp_path, no_model):
    """Below a regular file: root may write to any folder."""
    (tmp_path / "file").write_text("mine")
    said = say(verb, *SMOKE, f"output_dir={tmp_path / 'file' / 'deep'}")
    assert said.code == 2 and len(said.lines) == 1
    assert (
        said.err.startswith("output_dir: must give a folder to write to")
        and f"'{tmp_path / 'file'}' is a file" in said.err
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_folder_without_the_right_to_write_is_refused(tmp_path, monkeypatch, no_model):
    """The error of a read-only disk, which root cannot make by changing a mode."""
    import tempfile

    def read_only(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    said = say("train", *SMOKE, f"output_dir={tmp_path / 'out'}")
    assert (
        said.code == 2
        and said.err.startswith("output_dir: must give a folder to write to")
        and "is not writable (Read-only file system)" in said.err
        and len(said.lines) == 1
    )
