"""A run trained again from its record, through the command line; and what differs between two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOKE, say

from lorabench import record


def run_of(output: Path, head: str, seed: int) -> Path:
    """The folder of a run of the sweep that all tests share."""
    for path, one in record.find(output / "default"):
        if one.config["head"]["policy"] == head and one.config["seed"] == seed:
            return path
    raise AssertionError("no such run")


@pytest.fixture
def copied(output: Path, tmp_path: Path) -> Path:
    """A run to be changed, in a copy of its sweep."""
    shutil.copytree(output / "default", tmp_path / "sweep")
    return tmp_path / "sweep" / run_of(output, "lora", 1).name


def edit(run: Path, change: Any, with_checksum: bool = True) -> None:
    content = json.loads((run / "record.json").read_text())
    change(content)
    if with_checksum:
        content["checksum"] = record.checksum(content)
    (run / "record.json").write_text(json.dumps(content))


def test_a_run_replayed_in_another_folder_is_identical(output: Path, tmp_path: Path) -> None:
    run = run_of(output, "lora", 1)
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file())
    said = say("replay", run, "--verify", "--out", tmp_path / "again")
    assert said.code == 0, said.err + said.out
    last = said.out.splitlines()[-1]
    assert last == f"identical: {run} and {tmp_path / 'again' / run.name}"
    assert "losses: the same at all" in said.out and "final adapter: the same bits" in said.out
    again = record.read(tmp_path / "again" / run.name)
    first = record.read(run)
    assert again is not None and first is not None
    assert again.hashes == first.hashes and again.plan["pack"]["size"] == 4
    assert [p.name for p in (tmp_path / "again").iterdir() if p.is_dir() and p.name[0] != "."] == [
        run.name
    ], "its mates keep their slots and are not trained"
    assert before == sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file())


def test_in_another_pack_it_is_the_same_within_rounding(output: Path, tmp_path: Path) -> None:
    run = run_of(output, "lora", 0)
    said = say("replay", run, "--verify", "--pack-size", 1, "--out", tmp_path / "one", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    # So few steps show no rounding on some machines.
    assert found["answer"] in ("within rounding", "identical") and found["inputs"] == []
    assert found["shape"][0] == "runs in the pack: 4, now 1"
    if found["first_difference"] is not None:  # else rounding first shows in the adapter
        step, mine, theirs = found["first_difference"]
        assert mine != theirs and mine == pytest.approx(theirs, rel=1e-4) and step >= 1


@pytest.mark.parametrize("with_checksum", [True, False])
def test_an_edited_record_is_different_and_names_the_key(
    copied: Path, with_checksum: bool, tmp_path: Path
) -> None:
    def raise_rate(content: dict[str, Any]) -> None:
        content["config"]["trainer"]["lr"] *= 1.01

    edit(copied, raise_rate, with_checksum)
    said = say("replay", copied, "--verify", "--out", tmp_path / "again")
    assert said.code == 1 and "trainer.lr: " in said.out
    assert said.out.splitlines()[-1].startswith("different: ")
    assert not (tmp_path / "again").exists(), "nothing is trained"


def test_a_record_edited_with_its_config_file_no_longer_has_its_id(
    copied: Path, tmp_path: Path
) -> None:
    def raise_rate(content: dict[str, Any]) -> None:
        rate = content["config"]["trainer"]["lr"]
        content["config"]["trainer"]["lr"] = rate * 1.01
        text = (copied / "config.yaml").read_text()
        assert f"lr: {rate}" in text
        (copied / "config.yaml").write_text(text.replace(f"lr: {rate}", f"lr: {rate * 1.01}"))

    edit(copied, raise_rate)
    said = say("replay", copied, "--verify", "--out", tmp_path / "again")
    assert said.code == 1 and f"not to {copied.name}" in said.out


def test_data_that_changed_or_is_gone_is_named(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}", "completion": f" {i % 7}"} for i in range(40)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data=jsonl", f"data.train.path={path}", "data.num_test=4", "data.num_validation=4"]
    words = [*(word for word in SMOKE if not word.startswith("data.")), "data.max_length=64"]
    said = say("train", *words, *data, f"output_dir={tmp_path}", "sweep=s", "trainer.steps=3")
    assert said.code == 0, said.err
    ((run, _),) = record.find(tmp_path / "s")
    assert say("replay", run, "--verify").code == 0
    assert (tmp_path / "replays" / run.name / run.name / "record.json").is_file()
    rows[3]["completion"] = " 9"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = say("replay", run, "--verify")
    assert said.code == 1 and "the training data (data.train)" in said.out
    path.unlink()
    said = say("replay", run, "--verify")
    assert said.code == 2 and str(path) in said.err


def test_a_loss_that_moved_without_a_reason_is_different_and_named(
    output: Path, copied: Path
) -> None:
    rows = (copied / "metrics.jsonl").read_text().splitlines()
    changed = []
    for line in rows:
        row = json.loads(line)
        if row["step"] == 3 and "train/loss" in row:
            row["train/loss"] *= 1 + 1e-7
        changed.append(json.dumps(row))
    (copied / "metrics.jsonl").write_text("\n".join(changed) + "\n")
    said = say("diff", output / "default" / copied.name, copied)
    assert said.code == 0 and "first differ at step 3" in said.out


def test_refusals(output: Path, copied: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for words, told in (
        ((copied, "--out", tmp_path / "full"), "--out: must be a new or an empty folder"),
        ((copied, "--out", copied / "new"), "must not lie in the run's own folder"),
        ((copied, "--pack-size", 5), "must be from 1 to the size of the run's pack, 4; got 5"),
        ((tmp_path / "nothing",), "'" + str(tmp_path / "nothing") + "' does not exist"),
        ((copied.parent / "zz",), "nearest: "),
    ):
        said = say("replay", *words)
        assert said.code == 2 and told in said.err, said.err


def beginning(run: Path) -> str:
    """The fewest digits by which a run is the only one of its sweep."""
    there = [path.parent.name for path in run.parent.glob("*/record.json")]
    return next(
        run.name[:n] for n in range(1, 13) if sum(t.startswith(run.name[:n]) for t in there) == 1
    )


def test_a_run_may_be_named_by_the_beginning_of_its_id(output: Path) -> None:
    run = run_of(output, "exclude", 0)
    folder = output / "default"
    said = say("diff", folder / beginning(run), run)
    assert said.code == 0 and said.out == "nothing differs\n"
    said = say("diff", f"{folder}/", run)
    assert said.code == 2, "every run of the sweep begins so"


def test_every_verb_that_takes_a_run_takes_the_beginning_of_its_id(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its sweep before it, or alone where the sweep lies below outputs/."""
    digits = beginning(copied)
    said = say("export", copied.parent / digits, "--to", "adapter", tmp_path / "adapter")
    assert said.code == 0 and f"run         {copied.name}" in said.out, said.err
    said = say("evaluate", copied.parent / digits)
    assert said.code == 0 and "1 of 1 runs have what was asked for" in said.err, said.err
    (tmp_path / "outputs").mkdir()
    copied.parent.rename(tmp_path / "outputs" / "sweep")
    monkeypatch.chdir(tmp_path)
    run = Path("outputs/sweep") / copied.name
    said = say("export", digits, "--to", "gguf")
    assert said.code == 2 and said.err == say("export", run, "--to", "gguf").err
    assert say("evaluate", digits).code == 0
    said = say("diff", digits, run)
    assert said.code == 0 and said.out == "nothing differs\n"
    (Path("outputs/sweep") / f"{digits}zz").mkdir()
    (Path("outputs/sweep") / f"{digits}zz" / "record.json").write_text("{}")
    for words in (["export", digits, "--to", "gguf"], ["evaluate", digits]):
        said = say(*words)
        assert said.code == 2 and said.err.startswith("RUN: must begin as one run alone"), said.err


def test_diff_says_what_differs(output: Path) -> None:
    one, other = run_of(output, "exclude", 0), run_of(output, "lora", 1)
    text = say("diff", one, other).out
    assert "config   head.policy: 'exclude', then 'lora'" in text
    assert "config   seed: 0, then 1" in text
    assert "data     the order of the examples: " in text
    assert "losses   first differ at step 1: " in text and "result   test nll: " in text
    found = json.loads(say("diff", one, other, "--json").out)
    assert found["config"]["head.policy"] == ["exclude", "lora"]
