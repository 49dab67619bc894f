"""Lints of what verdicts rest on and of where runs come from; the notes and files they read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import composed
from linted import STACK, clean, ids, names, only, run
from sweeps import write_sweep

from lorabench import compare, data, plan, record
from lorabench import model as base_model
from lorabench.compare.lints import is_linted

# --- evidence ---------------------------------------------------------------------------------


def test_one_seed_names_the_settings_that_have_no_other():
    runs = [run(0, head=head) for head in ("exclude", "lora")]
    assert only(runs, "one-seed").text.startswith("all settings have one seed")
    found = only([*runs, run(1, head="lora")], "one-seed")
    assert found.text.startswith("head=exclude has one seed") and found.runs == (runs[0][1].run_id,)
    assert "lorabench settle outputs/s" in found.remedy
    assert "one-seed" not in names(runs[:1])  # nothing is compared


def test_a_small_test_set_is_told_with_what_limits_it():
    assert "few-examples" not in names([run(s, examples=30) for s in (0, 1)])
    found = only([run(s, examples=29) for s in (0, 1)], "few-examples")
    assert "stands on 29 examples" in found.text and "data.num_test=300" in found.remedy
    limited = [run(s, examples=1, trainer={"eval_examples": 1}) for s in (0, 1)]
    found = only(limited, "few-examples")
    assert "on 1 example for" in found.text and "trainer.eval_examples=300" in found.remedy
    note = (
        "data.test: 1 of 9 examples are left; 8 were left out because they are longer than "
        "data.max_length=64 tokens; data.max_length=90 would keep them all"
    )
    found = only([run(s, examples=1, notes=[note]) for s in (0, 1)], "few-examples")
    assert "raise data.max_length" in found.remedy and "data.max_length=90" in found.remedy


def test_questions_that_lack_examples_are_named(tmp_path):
    """Examples differ far more than seeds: more of these cannot settle the question."""
    means = {("exclude", 8): 1.0, ("lora", 8): 1.001}
    write_sweep(tmp_path / "s", means, seeds=4, examples=40, spreads=(0, 1, 1e-4))
    runs = list(record.find(tmp_path / "s"))
    answers = compare.verdicts(runs)
    (verdict,) = answers.verdicts
    assert verdict.outcome == "not settled" and verdict.more_seeds is None
    needed = verdict.more_examples
    assert "few-examples" not in names(runs)
    found = only(runs, "few-examples", answers)
    assert "40 test examples are too few for 1 of 1 questions" in found.text
    assert "head=lora against head=exclude" in found.text and set(found.runs) == ids(runs)
    assert f"score about {needed} test examples" in found.remedy
    # Where seeds are what is lacking, the verdict says so itself.
    write_sweep(tmp_path / "t", means | {("lora", 8): 1.1}, 3, 200, (0.1, 0.01, 0.01))
    runs = list(record.find(tmp_path / "t"))
    answers = compare.verdicts(runs)
    assert answers.verdicts[0].outcome == "not settled" and answers.verdicts[0].more_seeds
    assert "few-examples" not in names(runs, answers)


def test_seeds_that_the_design_was_chosen_on_are_told():
    chosen = {"compare": {"vary": ["head"], "selected_on": [0, 1]}}
    runs = [run(s, head=head, config=chosen) for head in ("exclude", "lora") for s in (1, 2, 3)]
    found = only(runs, "selection-seeds")
    assert set(found.runs) == ids([one for one in runs if one[1].seeds["init"] == 1])
    assert (
        "chosen on seeds 0, 1, and 2 of 6 runs" in found.text and "seed=4,5,6,7,8" in found.remedy
    )
    fresh = [run(s, head=head, config=chosen) for head in ("exclude", "lora") for s in (2, 3)]
    assert "selection-seeds" not in names(fresh)


@pytest.mark.parametrize(
    "note",
    [
        "data.test: 20 of 20 prompts are in the training set too, so its scores overstate how well "
        "a run does on new prompts; remove them from one of the two, or take the set from train: "
        "data.test.path=null",
        "test: 20 of 20 prompts are in train too",  # as version 0.1 wrote it
    ],
)
def test_test_prompts_in_train_are_told_once_for_all_runs(note):
    runs = [run(s, head=head, notes=[note]) for head in ("exclude", "lora") for s in (0, 1)]
    found = only(runs, "test-in-train")
    assert found.text.startswith("20 of 20 test prompts are in the training set too (all settings)")
    assert found.remedy.startswith("remove them from one of the two") and is_linted(note)
    assert set(found.runs) == ids(runs)


# --- origins ----------------------------------------------------------------------------------


def test_runs_of_another_stack_or_arithmetic_are_named():
    other = STACK | {"packages": {"torch": "2.11.0"}, "threads": 2}
    runs = [*clean(), run(3, 1e-3, "lora", provenance=other)]
    found = only(runs, "mixed-stacks")
    assert "1 of 19 runs" in found.text and "threads 2 instead of 1" in found.text
    assert "torch 2.11.0 instead of 2.13.0" in found.text and found.runs == (runs[-1][1].run_id,)
    assert "(lr=0.001" not in found.text and "head=lora" in found.text
    old = [*clean(), run(3, 1e-3, "lora", arithmetic_version=2)]
    found = only(old, "mixed-arithmetic")
    assert f"versions 2, {record.ARITHMETIC_VERSION}" in found.text
    assert found.runs == (old[-1][1].run_id,)
    assert "mixed-stacks" not in names(old)


@pytest.mark.parametrize(("name", "lint"), [("train", "mixed-data"), ("base", "mixed-base")])
def test_one_config_that_stood_for_two_contents_is_told(name, lint):
    hashes = {"train": "aaaaaaaaaa", "base": "bbbbbbbbbb"}
    runs = [run(s, hashes=hashes | {name: content}) for content in ("cccccccccc", "dddddddddd")
            for s in (0, 1)]  # fmt: skip
    found = only(runs, lint)
    assert "cccccccc, dddddddd" in found.text and set(found.runs) == ids(runs)
    # Other words for other data are a factor, not a confound.
    apart = [run(s, hashes=hashes | {name: content}, config={"data": {"name": content}})
             for content in ("cccccccccc", "dddddddddd") for s in (0, 1)]  # fmt: skip
    assert lint not in names(apart)


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"test_set": "another"}, "test: the runs were scored on different examples"),
        (
            {"definition": "nll/2"},
            r"validation and test: the runs were scored by different definitions \(nll/1, nll/2\)",
        ),
    ],
)
def test_scores_that_are_not_comparable_are_told(changes, how):
    runs = [run(s, head="exclude") for s in (0, 1)]
    runs += [run(s, head="lora", **changes) for s in (0, 1)]
    found = only(runs, "mixed-evaluations")
    assert re.search(how, found.text) and set(found.runs) == ids(runs)
    assert found.remedy == "`lorabench evaluate outputs/s` scores all alike"


# --- what lorabench itself writes -------------------------------------------------------------


def test_notes_are_worded_as_the_lints_read_them(jsonl: Path, tmp_path: Path):
    """The lints read texts of the data and the plan: another wording there would go unnoticed."""
    test = tmp_path / "test.jsonl"
    test.write_text("".join(jsonl.read_text().splitlines(keepends=True)[:20]))
    words = ["data=jsonl", f"data.train.path={jsonl}", f"data.test.path={test}", "lora.r=512"]
    cfg = composed(*words, "data.max_length=17")
    splits = data.load(cfg.data)
    tokens = data.tokenise(splits.test, base_model.tokenizer(cfg.model), cfg.data)
    notes = [*splits.notes, *tokens.notes("test", cfg.data), *plan.make(cfg).warnings]
    runs = [run(s, examples=len(tokens), notes=notes) for s in (0, 1)]
    shared = only(runs, "test-in-train")
    assert re.match(r"\d+ of 20 test prompts", shared.text)
    assert "data.test.path=null" in shared.remedy
    few = only(runs, "few-examples")
    assert "raise data.max_length and train again" in few.remedy
    wide = only(runs, "rank-above-module")
    assert "r=512 is more than the smaller side" in wide.text
    assert re.match(r"compare ranks up to \d+, or", wide.remedy)


def test_a_real_sweep_has_what_its_command_lacks(output: Path, tmp_path: Path):
    """Two heads at one learning rate on 16 test examples; `selected_on` is in sweep.json alone.

    A later command does not train finished runs again, so their records stay as they were.
    """
    folder = tmp_path / "default"
    shutil.copytree(output / "default", folder)
    runs = list(record.find(folder))
    answers = compare.verdicts(runs)
    found = names(runs, answers)
    assert found == ["one-lr", "few-examples"]
    content = json.loads((folder / "sweep.json").read_text())
    for entry in content["runs"].values():
        entry["config"]["compare"]["selected_on"] = [1]
    (folder / "sweep.json").write_text(json.dumps(content))
    chosen = only(runs, "selection-seeds")
    assert set(chosen.runs) == ids([one for one in runs if one[1].seeds["init"] == 1])


def test_records_of_version_0_1_are_read():
    """They know no lengths, no arithmetic version and one evaluation."""
    runs = list(record.find(Path(__file__).parent / "folders" / "written_by_0.1"))
    assert len(runs) == 4 and names(runs) == ["one-lr", "few-examples"]
