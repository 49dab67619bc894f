"""Stages from the command line: what is refused, planned, killed and resumed, and recorded."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import composed, records, scores
from stock import TINY

from lorabench import cli, config, plan
from lorabench import model as base_model
from lorabench.config import ConfigErrors


def written(folder: Path, value: str) -> str:
    """The name of a file of the group `stages`."""
    (folder / "stages").mkdir(exist_ok=True)
    (folder / "stages" / "mine.yaml").write_text(f"# @package _global_\nstages: {value}\n")
    return "mine"


def entry(step: int, *names: str) -> dict[str, Any]:
    return {"from_step": step, "train": list(names)}


# --- refusals --------------------------------------------------------------------------------

OUT_OF_RANGE = [  # stages, how the errors begin, what the first must also hold
    ("[late]", ["stages[0]: must be a mapping"], "'late'"),
    ("[{from_step: 1, train: [all]}]", ["stages[0].from_step: must be 0"], "got 1"),
    ("[{train: [all]}]", ["stages[0].from_step: must be 0"], "got None"),
    ("[{from_step: true, train: [all]}]", ["stages[0].from_step: must be 0"], "got True"),
    ("[{from_step: 0}]", ["stages[0].train: must be a list"], "[layer.11]"),
    ("[{from_step: 0, train: []}]", ["stages[0].train: must be a list"], "at least one"),
    ("[{from_step: 0, train: layer.1}]", ["stages[0].train: must be a list"], "'layer.1'"),
    ("[{from_step: 0, train: [11]}]", ["stages[0].train: must be a list"], "[11]"),
    (
        "[{from_step: 0, train: [all], lr_scale: 0}]",
        ["stages[0].lr_scale: must be above 0"],
        "got 0",
    ),
    (
        "[{from_step: 0, train: [all], lr_scale: .inf}]",
        ["stages[0].lr_scale: must be above 0"],
        "got inf",
    ),
    (
        "[{from_step: 0, train: [all], lrscale: 1}]",
        ["stages[0].lrscale: no such key"],
        "(did you mean 'lr_scale'?)",
    ),
    (
        "[{from_step: 0, train: [a]}, {from_step: 9, train: [b]}, {from_step: 8, train: [c]}]",
        ["stages[2].from_step: must be a whole number, at least 9"],
        "got 8",
    ),
    (
        "[{from_step: 0, train: [a]}, {from_step: 300, train: [b], lr_scale: -1}]",
        [
            "stages[1].from_step: must be below trainer.steps=300",
            "stages[1].lr_scale: must be above 0",
        ],
        "below trainer.steps=300",
    ),
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("value", "begins", "holds"), OUT_OF_RANGE)
def test_stages_out_of_range_are_refused_on_the_command_line(
    value: str,
    begins: list[str],
    holds: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [f"stages={written(tmp_path, value)}", f"hydra.searchpath=[file://{tmp_path}]"]
    assert cli.main(["train", "tracker=none", f"output_dir={tmp_path / 'out'}", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[: len(law)] for line, law in zip(lines, begins, strict=True)] == begins
    assert holds in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entries", "holds"),
    [
        (
            [entry(0, "layers.4", "all")],
            ["stages[0].train: every name", "unmatched: 'layers.4'; nearest: layers.3"],
        ),
        ([entry(0, "layer"), entry(1, "all")], ["unmatched: 'layer'", "nearest: layers"]),
        (
            [entry(0, "all"), entry(5, "layers.1"), entry(5, "layers.0", "layers.1.mlp")],
            [
                "stages[2].train: a module must be in one entry of from_step=5; "
                "model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj and 1 more are already "
                "in stages[1]"
            ],
        ),
        (
            [entry(0, "layers.0", "layers.1"), entry(7, "layers.3")],
            [
                "stages: every trained module must train in some stage; "
                "model.layers.2.self_attn.q_proj, model.layers.2.self_attn.k_proj and 6 more are "
                "in none"
            ],
        ),
        ([entry(0, *(f"layers.{i}" for i in range(4)))], ["lm_head is in none"]),
    ],
)
def test_names_that_do_not_fit_the_model_are_refused_before_weights_load(
    entries: list[dict[str, Any]], holds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(base_model, "load", refuse)
    for head in ("lora", "full"):
        wrong = composed("tracker=none", f"head={head}")
        wrong.stages = entries
        assert config.range_errors(wrong) == []
        with pytest.raises(ConfigErrors) as refused:
            plan.make(wrong)
        (error,) = refused.value.errors
        assert all(text in error for text in holds), error


def test_every_run_of_a_sweep_is_checked_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = written(tmp_path, "[{from_step: 0, train: [lm_head]}, {from_step: 1, train: [all]}]")
    sweep = [f"stages={name}", f"hydra.searchpath=[file://{tmp_path}]", "head=exclude,lora"]
    assert cli.main(["plan", "-m", "tracker=none", *sweep]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "unmatched: 'lm_head'" in line and line.endswith("[head=exclude]")


def test_a_list_on_the_command_line_is_told_where_it_belongs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for verb in ("plan", "train"):
        assert cli.main([verb, "tracker=none", "stages=[{from_step: 0, train: [all]}]"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("stages: must name a file of its group (") and "searchpath" in line


def test_the_run_id_follows_the_stages_and_not_their_spelling() -> None:
    plain, spelt, other = (composed("tracker=none") for _ in range(3))
    plain.stages = [entry(0, "all")]
    spelt.stages = [entry(0, "all") | {"lr_scale": 1}]
    other.stages = [entry(0, "all") | {"lr_scale": 0.5}]
    # All from the first step is what a run without stages does.
    assert plan.run_id(plain) == plan.run_id(spelt) == plan.run_id(composed("tracker=none"))
    assert plan.run_id(other) != plan.run_id(plain)


# --- a sweep ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_experiment_plans_both_ways_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-m", "experiment=stages", "tracker=none"]
    assert cli.main(["plan", "--json", *arguments]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [len(pack) for pack in planned["packs"]] == [10]  # stages do not keep runs apart
    layers = {m.split(".")[3] for run in planned["runs"] for m in run["lora_modules"]}
    assert layers == {"1", "11"}
    assert cli.main(["plan", *arguments]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.startswith("stages")] == [
        "stages    from step 0 layer.11, classifier; "
        "from step 100 layer.11, classifier + layer.1 at 0.5 lr"
    ]


SHORT = (
    "[{from_step: 0, train: [layer.11]}, {from_step: 3, train: [layer.11]}, "
    "{from_step: 3, train: [layer.1], lr_scale: 0.5, rewarm_steps: 2}]"
)


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])  # packed and alone
def test_a_killed_sweep_ends_with_the_same_bits_and_the_whole_history(
    dora: bool,
    tiny_folder: Callable[[str], Path],
    jsonl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lorabench.progress import Display

    command = [
        "train", "-m", "experiment=stages", f"stages={written(tmp_path, SHORT)}",
        f"hydra.searchpath=[file://{tmp_path}]", "model=local",
        f"model.path={tiny_folder('bert12')}", "task=causal_lm", "head=exclude",
        "data=jsonl", f"data.train.path={jsonl}", "data.max_length=64", "tracker=none",
        "trainer.steps=6", "trainer.lr=1e-2", "lora.r=4", f"lora.use_dora={dora}", "seed=0,1",
        "trainer.num_threads=1", "trainer.batch_size=2", "trainer.warmup_steps=0",
    ]  # fmt: skip
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert cli.main([*command, f"output_dir={whole}"]) == 0

    def kill(self: Any, step: int, *rest: Any) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Display, "step", kill)
    assert cli.main([*command, f"output_dir={killed}"]) == 143
    monkeypatch.undo()
    assert len(list(killed.glob("*/*/checkpoint/checkpoint.json"))) == 2 - dora
    assert cli.main([*command, f"output_dir={killed}"]) == 0
    found, expected = records(killed), records(whole)
    assert len(found) == 2 and set(found) == set(expected)
    for run_id, one in found.items():
        assert one["status"] == "finished"
        assert one["plan"]["pack"]["size"] == (1 if dora else 2)
        for key in ("hashes", "stages"):
            assert one[key] == expected[run_id][key], key
        assert scores(one) == scores(expected[run_id])
        by_layer = {
            index: [m for m in one["plan"]["lora_modules"] if m.split(".")[3] == index]
            for index in ("1", "11")
        }
        assert [len(modules) for modules in by_layer.values()] == [6, 6]
        # linear from 1e-2 over 6 steps: half of it is left at step 3
        assert one["stages"] == [
            {"step": step, "modules": by_layer[layer], "lr_scale": scale, "lr": lr,
             "rewarm_steps": rewarm}
            for step, layer, scale, lr, rewarm in (
                (0, "11", 1.0, 1e-2, 0), (3, "11", 1.0, 5e-3, 0), (3, "1", 0.5, 2.5e-3, 2)
            )
        ]  # fmt: skip


def test_an_unstaged_run_has_a_history_of_one_entry(tmp_path: Path) -> None:
    small = [*TINY, "trainer=smoke", "trainer.num_threads=1", "head=full"]
    assert cli.main(["train", *small, f"output_dir={tmp_path}"]) == 0
    (one,) = records(tmp_path).values()
    (only,) = one["stages"]
    assert (only["step"], only["lr_scale"], only["lr"]) == (0, 1.0, 1e-4)
    assert only["modules"] == [*one["plan"]["lora_modules"], "lm_head"]
