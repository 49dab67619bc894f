"""Scores are a step of their own: they can fail, be asked for again, and never cost an adapter."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import predictions, records, say, scores

from lorabench import adapters
from lorabench.compare.lints import is_linted
from lorabench.pack import ModulePack, StackedPack

FAST = [
    "tracker=none", "data.num_train=32", "data.num_validation=4", "data.num_test=12", "lora.r=2",
    "target_modules=attention", "trainer.batch_size=2", "trainer.num_threads=1", "trainer.steps=6",
]  # fmt: skip
GRID = ["head=exclude,lora", "seed=0,1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four runs and one that trains alone; copied by tests that change it."""
    out = tmp_path_factory.mktemp("finished")
    assert say("train", "-m", *FAST, *GRID, f"output_dir={out}").code == 0
    assert say("train", *FAST, "lora.init=pissa", f"output_dir={out}").code == 0
    return out


@pytest.fixture
def sweep(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr("lorabench.worker.work.train_pack", refuse)


def test_other_metrics_are_scored_without_training(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_training(monkeypatch)
    before = records(sweep)
    words = ["data.metric=[nll,nll_per_token,exact_match]", "trainer.eval_batch_size=5"]
    said = say("evaluate", sweep / "default", *words)
    assert said.code == 0, said.err
    for run, record in records(sweep).items():
        first, second = record["evaluations"]
        assert first == before[run]["evaluations"][0], "evaluations are appended"
        assert record["hashes"] == before[run]["hashes"]
        new = second["splits"]["test"]["metrics"]
        assert set(new) == {"nll", "nll_per_token", "exact_match"}
        assert second["batch_size"] == 5 and second["predictions"] != first["predictions"]
        # From the saved adapter in the same pack shape: rounding of batches of another size, and
        # of PiSSA, which is saved as a plain LoRA of twice the rank.
        old = scores(before[run])["test"]["nll"]["value"]
        assert new["nll"]["value"] == pytest.approx(old, rel=1e-5)
        table = pd.read_parquet(predictions(sweep / "default" / run)).query("split == 'test'")
        expected = (table.nll * table.num_tokens).sum() / table.num_tokens.sum()
        assert new["nll_per_token"]["value"] == pytest.approx(expected, rel=1e-12)
    again = say("evaluate", sweep / "default", *words)
    assert again.code == 0
    assert again.lines[0] == "5 of 5 runs have what was asked for, 0 to do"


def test_a_saved_adapter_scores_as_the_pack_that_trained_it(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the same shapes the bits are the same: predictions are written again, byte for byte."""
    no_training(monkeypatch)
    paths = {run: predictions(sweep / "default" / run) for run in records(sweep)}
    packed = [run for run, r in records(sweep).items() if r["config"]["lora"]["init"] == "default"]
    before = {run: pd.read_parquet(paths[run]) for run in packed}
    for path in paths.values():
        path.unlink()
    said = say("evaluate", sweep / "default")
    assert said.code == 0, said.err
    for run in packed:
        pd.testing.assert_frame_equal(pd.read_parquet(paths[run]), before[run], check_exact=True)
        assert len(records(sweep)[run]["evaluations"]) == 1, "the same evaluation"


def test_the_train_command_with_other_metrics_only_scores(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_training(monkeypatch)
    words = ["train", "-m", *FAST, *GRID, f"output_dir={sweep}", "data.metric=[nll_per_token]"]
    said = say(*words)
    assert said.code == 0
    assert said.lines[0] == "0 of 4 runs are kept from before, 0 to train, 4 to score"
    assert say(*words).lines[0] == "4 of 4 runs are kept from before, 0 to train"


@pytest.mark.parametrize(
    ("words", "holds"),
    [
        (["trainer.lr=1"], "trainer.lr: must be a key of the evaluation, which decides"),
        (["lora.r=3"], "lora.r: must be a key of the evaluation"),
        (["data.metrics=[nll]"], "did you mean 'data.metric'?"),
        (["data.metric=[nll],[accuracy]"], "must be one value; got a sweep"),
        (["data.metric=[accuracy]"], "data.metric: must be out of nll"),
        (["objective=test/nothing"], "objective: must be validation/METRIC or test/METRIC"),
        (["objective=test/answer"], "objective: must be another metric where data.answer_pattern"),
        (["data.num_test=abc"], "data.num_test: "),
        (["trainer.eval_batch_size=2.5"], "trainer.eval_batch_size: "),
        (["trainer.eval_examples=0"], "trainer.eval_examples: must be at least 1 or null"),
        (["data.metric=nll"], "data.metric: "),
        (["~data.num_test"], "data.num_test: must be KEY=VALUE; got '~data.num_test'"),
    ],
)
def test_what_evaluate_does_not_take_is_told(finished: Path, words: list[str], holds: str) -> None:
    said = say("evaluate", finished / "default", *words)
    assert said.code == 2 and holds in said.err and "Traceback" not in said.err


def test_evaluate_on_one_run_or_no_sweep(sweep: Path, tmp_path: Path) -> None:
    run = sorted(records(sweep))[0]
    assert say("evaluate", sweep / "default" / run, "data.num_test=3").code == 0
    counts = {name: len(record["evaluations"]) for name, record in records(sweep).items()}
    assert counts.pop(run) == 2 and set(counts.values()) == {1}
    (tmp_path / "empty").mkdir()
    said = say("evaluate", tmp_path / "empty")
    assert said.code == 2 and "must be the folder of a sweep, with sweep.json" in said.err


def scores_at_most(examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of more examples do not fit into memory."""
    for kind in (StackedPack, ModulePack):
        score = kind.score

        def short(self: Any, batch: Any, score: Any = score) -> Any:
            if len(batch.input_ids[0]) > examples:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return score(self, batch)

        monkeypatch.setattr(kind, "score", short)


@pytest.mark.parametrize(
    "more",
    [GRID, pytest.param(["lora.init=pissa"], marks=pytest.mark.slow)],
    ids=["packed", "alone"],
)
def test_short_memory_halves_the_batches_of_scoring(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores_at_most(3, monkeypatch)
    said = say("train", "-m", *FAST, *more, f"output_dir={tmp_path}", "trainer.eval_batch_size=9")
    assert said.code == 0, said.err
    told = [line for line in said.lines if "does not fit into memory" in line]
    assert [line.rpartition("of ")[2] for line in told] == ["5 examples", "3 examples"]
    for record in records(tmp_path).values():
        assert record["evaluations"][0]["batch_size"] == 3 and record["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["memory", "error"])
def test_a_failed_scoring_keeps_the_adapter_and_the_same_command_only_scores(
    failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "-m", *FAST, *GRID, f"output_dir={tmp_path}"]
    with monkeypatch.context() as patch:
        if failure == "memory":
            scores_at_most(0, patch)
        else:
            patch.setattr(StackedPack, "score", lambda *_: 1 / 0)
        said = say(*words)
    assert said.code == 1 and "Traceback" not in said.err
    assert "4 of 4 runs did not finish:" in said.lines
    assert said.lines[-1] == "trained runs keep their adapter; the same command only scores them"
    reason = "MemoryError: not enough memory" if failure == "memory" else "ZeroDivisionError"
    found = records(tmp_path)
    assert {r["status"] for r in found.values()} == {"trained"}
    assert all(f"scoring failed: {reason}" in r["error"] for r in found.values())
    shown = say("runs", tmp_path / "default").out
    assert shown.count("trained") == 4
    no_training(monkeypatch)
    said = say(*words)
    assert said.code == 0 and "0 to train, 4 to score" in said.lines[0]
    after = records(tmp_path)
    assert {r["status"] for r in after.values()} == {"finished"}
    assert all(r["error"] is None for r in after.values())
    assert {k: r["hashes"] for k, r in after.items()} == {k: r["hashes"] for k, r in found.items()}


def test_an_adapter_that_is_not_the_one_it_trained_is_not_scored(sweep: Path) -> None:
    run = next(k for k, r in records(sweep).items() if r["config"]["lora"]["init"] == "default")
    file = sweep / "default" / run / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    said = say("evaluate", sweep / "default" / run, "data.num_test=3")
    assert said.code == 1
    assert "adapter_model.safetensors has other content than was recorded; remove" in said.err
    assert len(records(sweep)[run]["evaluations"]) == 1
    # Its mates are scored, also beside an adapter that is no adapter at all.
    file.write_bytes(b"torn")
    said = say("evaluate", sweep / "default", "data.num_test=3")
    assert said.code == 1 and "1 of 5 runs did not finish:" in said.lines
    counts = {name: len(record["evaluations"]) for name, record in records(sweep).items()}
    assert counts.pop(run) == 1 and set(counts.values()) == {2}


def test_compare_takes_the_newest_evaluation_that_all_runs_share(sweep: Path) -> None:
    ids = [k for k, r in records(sweep).items() if r["config"]["lora"]["init"] == "default"]

    def test_nll() -> dict[str, float]:
        table = json.loads(say("compare", sweep / "default", "--json").out)
        return {run["run_id"]: run["metrics"]["test"]["nll"] for run in table["runs"]} | {
            "shared": table["evaluations"]["test"]["shared"]
        }

    def recorded(place: int) -> dict[str, float]:
        return {
            run: r["evaluations"][place]["splits"]["test"]["metrics"]["nll"]["value"]
            for run, r in records(sweep).items()
        }

    first = recorded(0)
    assert test_nll() == first | {"shared": True}
    assert say("evaluate", sweep / "default" / ids[0], "data.num_test=3").code == 0
    assert test_nll() == first | {"shared": True}, "one run alone has the newer one"
    assert say("evaluate", sweep / "default", "data.num_test=3").code == 0
    assert test_nll() == recorded(1) | {"shared": True}
    assert recorded(1) != first
    # Another batch size is no other evaluation: it moves scores by rounding alone.
    one = sweep / "default" / ids[1]
    assert say("evaluate", one, "data.num_test=3", "trainer.eval_batch_size=2").code == 0
    assert test_nll()["shared"]


@pytest.mark.slow
def test_compare_says_so_where_no_evaluation_is_shared(sweep: Path) -> None:
    for run, record in records(sweep).items():
        path = sweep / "default" / run / "record.json"
        if record["config"]["seed"] == 1:
            evaluation = record["evaluations"][0]
            evaluation["splits"]["test"]["examples"] = "others"
            path.write_text(json.dumps(record))
    said = say("compare", sweep / "default")
    assert said.code == 0
    assert "beware: test: the runs were scored on different examples" in said.out
    assert f"lorabench evaluate {sweep / 'default'}" in " ".join(said.out.split())
    assert "validation: the runs were scored" not in said.out


def test_compare_marks_rows_of_another_stack(sweep: Path) -> None:
    for run, record in records(sweep).items():
        if record["config"]["head"]["policy"] == "lora":
            record["provenance"]["packages"]["torch"] = "1.0"
            (sweep / "default" / run / "record.json").write_text(json.dumps(record))
    said = say("compare", sweep / "default")
    installed = adapters.torch.__version__ if hasattr(adapters, "torch") else torch.__version__
    assert re.search(r"beware: .*torch 1\.0", said.out) and installed
    marked = [line for line in said.out.splitlines() if line.startswith("│") and "other" in line]
    assert len(marked) == 1 and "lora" in marked[0]


def test_notes_are_on_screen_and_in_compare(tmp_path: Path) -> None:
    """What is left out, and what is in two splits, is said where people look."""
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    lines = [
        json.dumps({"prompt": "x" * 80 * (i % 30 == 29) + f"{i}=", "completion": str(i)}) + "\n"
        for i in range(60)
    ]
    train.write_text("".join(lines))
    test.write_text("".join(lines[1:9]))
    words = [
        "trainer=smoke",
        "tracker=none",
        "data=jsonl",
        f"data.train.path={train}",
        f"data.test.path={test}",
        "data.max_length=64",
        f"output_dir={tmp_path / 'out'}",
    ]
    said = say("train", *words)
    assert said.code == 0
    notes = [line for line in said.lines if line.startswith("note: ")]
    assert any("train" in note and "max_length" in note for note in notes), said.err
    assert any("8 of 8 prompts" in note for note in notes), said.err
    table = say("compare", tmp_path / "out" / "default").out
    smoke = say("plan", "--smoke", *words).out
    for note in notes:
        text = note.removeprefix("note: ")
        assert text in smoke
        assert text in table or (is_linted(text) and "beware: 8 of 8 test prompts" in table), table


@pytest.mark.slow
def test_a_diverged_run_is_scored_and_stays_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if its predictions could not be written at first: it must not become a finished run."""
    from lorabench.worker import scoring

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    words = ["train", "-m", *FAST, "trainer.lr=1e-3,1e30", f"output_dir={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "write_predictions", full)
        assert say(*words).code == 1
    assert sorted(r["status"] for r in records(tmp_path).values()) == ["stopped", "trained"]
    assert say(*words).code == 1, "one has diverged"
    found = {r["status"]: r for r in records(tmp_path).values()}
    assert set(found) == {"finished", "stopped"}
    assert "loss or gradient is not finite" in found["stopped"]["error"]
    assert all(len(r["evaluations"]) == 1 for r in found.values())
    assert found["finished"]["error"] is None
    assert found["finished"]["provenance"]["command"][:3] == ["lorabench", "train", "-m"]


@pytest.mark.slow
def test_another_base_is_never_scored(tmp_path: Path) -> None:
    """Nor with another test file, where the training set may be another one."""
    from safetensors.torch import load_file, save_file

    from lorabench import model as base_model

    base = tmp_path / "base"
    shutil.copytree(base_model.ZOO / "tiny-gemma", base)
    lines = [json.dumps({"prompt": f"{i}=", "completion": str(i)}) + "\n" for i in range(40)]
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(lines))
    test.write_text("".join(lines[:4]))
    words = ["trainer=smoke", "tracker=none", "data=jsonl", f"data.train.path={train}",
             "model=local", f"model.path={base}", "data.max_length=64",
             f"output_dir={tmp_path / 'out'}"]  # fmt: skip
    assert say("train", *words).code == 0
    file = base / "model.safetensors"
    save_file({k: v * 1.01 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    for more in (["data.metric=[nll_per_token]"], [f"data.test.path={test}"]):
        said = say("evaluate", tmp_path / "out" / "default", *more)
        assert said.code == 2 and "put" in said.err and "back" in said.err
    ((_, record),) = records(tmp_path / "out").items()
    assert len(record["evaluations"]) == 1


@pytest.mark.slow
def test_runs_that_had_ended_before_their_pack_was_halved_are_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They keep a pack of their own: nobody may wait for them for ever."""
    update = StackedPack.update

    def short(self: Any, lr: list[float]) -> Any:
        if self.size == 4 and any(self.alive) and not all(self.alive):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return update(self, lr)

    save, calls = adapters.save, []

    def two_fail(*arguments: Any) -> str:
        calls.append(arguments)
        if len(calls) <= 2:
            raise OSError(5, "Input/output error")
        return save(*arguments)

    words = ["train", "-m", *FAST, *GRID, f"output_dir={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "save", two_fail)
        assert say(*words).code == 1
    monkeypatch.setattr(StackedPack, "update", short)
    said = say(*words)
    assert said.code == 0 and "does not fit into memory" in said.err, said.err
    assert say("evaluate", tmp_path / "default", "data.num_test=3").code == 0
    assert all(len(r["evaluations"]) == 2 for r in records(tmp_path).values())


@pytest.mark.slow
def test_one_run_whose_data_changed_does_not_keep_the_others_from_being_served(
    tmp_path: Path,
) -> None:
    rows = [json.dumps({"prompt": f"{i}=", "completion": str(i)}) + "\n" for i in range(40)]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(rows))
    words = ["train", "trainer=smoke", "tracker=none", "data=jsonl", f"data.train.path={train}",
             "data.max_length=64", f"output_dir={tmp_path / 'out'}"]  # fmt: skip
    assert say(*words).code == 0
    train.write_text("".join(rows[:-1]))
    assert say(*words).code == 0  # another run in the same folder
    place = tmp_path / "out" / "default"
    work = say("work", place)
    assert work.code == 0 and "runs have what was asked for" in work.err, work.err
    said = say("evaluate", place, "data.metric=[nll_per_token]")
    assert said.code == 1 and "1 of 2 runs did not finish:" in said.lines
    assert sorted(len(r["evaluations"]) for r in records(tmp_path / "out").values()) == [1, 2]
