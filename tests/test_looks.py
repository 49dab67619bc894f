"""Looks at a sweep while seeds are added: their levels, and the first that settles a question."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import say
from sweeps import write_run, write_sweep

from lorabench import compare, record
from lorabench.compare import looks
from lorabench.pack import StackedPack
from lorabench.sweep import LookEntry, SettlingEntry, SweepFolder

TWO = {("exclude", 16): 1.0, ("lora", 16): 0.9}


@pytest.mark.parametrize("have", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("most", [3, 4, 8, 12, 40])
def test_looks_are_few_late_enough_and_share_five_percent(have: int, most: int) -> None:
    if most <= have:
        return
    planned = looks.plan_looks(range(10, 10 + have), most)
    counts = [len(one.seeds) for one in planned]
    assert 1 <= len(planned) <= 3 and counts == sorted(set(counts))
    assert counts[0] >= 3 and counts[-1] == most
    assert sum(one.level for one in planned) == pytest.approx(0.05)
    assert planned[-1].seeds == tuple(range(10, 10 + most)), "old seeds first, then the next ones"
    assert all(set(a.seeds) < set(b.seeds) for a, b in itertools.pairwise(planned))


def test_a_question_is_judged_at_the_first_look_that_settles_it(tmp_path: Path) -> None:
    """The same verdicts as `compare` on the runs of that look alone, at the look's level."""
    write_sweep(tmp_path / "s", TWO, seeds=8, spreads=(0.03, 0.05, 0.05))
    runs = list(record.find(tmp_path / "s"))
    taken = [looks.Look((0, 1, 2), 0.01), looks.Look(tuple(range(8)), 0.04)]
    (one,) = compare.verdicts(runs, looks=taken, planned_looks=2).verdicts
    for number, look in enumerate(taken, 1):
        those = [(path, r) for path, r in runs if r.config["seed"] in look.seeds]
        (alone,) = compare.verdicts(those).verdicts
        found = alone.p <= look.level
        if found or number == 2:
            assert one.look == number and one.p == pytest.approx(alone.p, rel=1e-12)
            assert (one.outcome == "found") == found
            assert len(one.seeds) == len(look.seeds) and one.level == look.level
            break
    (first,) = compare.verdicts(runs, looks=taken[:1], planned_looks=2).verdicts
    assert first.look == 1 and first.level == 0.01 and len(first.seeds) == 3
    # The plain interval is at 95% whatever the look's level is.
    those = [(path, r) for path, r in runs if r.config["seed"] < 3]
    (plain,) = compare.verdicts(those).verdicts
    ends = [plain.plain_low, plain.plain_high]
    assert [first.plain_low, first.plain_high] == pytest.approx(ends, rel=1e-12)


def test_compare_takes_the_looks_of_sweep_json(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", TWO, seeds=4, spreads=(0.001, 0.01, 0.01))
    folder = SweepFolder(tmp_path / "s")
    entry = SettlingEntry(
        metric="nll", started=record.now(),
        looks=[LookEntry(seeds=[0, 1, 2], level=0.01), LookEntry(seeds=list(range(4)), level=0.04)],
    )  # fmt: skip
    folder.begin_settling(entry)
    said = say("compare", tmp_path / "s")
    assert "no look was taken yet" in said.err and "(look" not in said.out
    folder.take_look(0)
    said = say("compare", tmp_path / "s")
    assert "(look 1 of 2, at 3 seeds)" in said.out and "all looks together" in said.out
    (one,) = json.loads(say("compare", tmp_path / "s", "--json").out)["verdicts"]
    assert one["look"] == 1 and one["looks"] == 2 and one["level"] == 0.01


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())


TRAIN = (
    "trainer.steps=3", "trainer.batch_size=2", "data.num_train=16", "data.num_validation=8",
    "data.num_test=16", "lora.r=2", "tracker=none", "head=exclude,lora", "trainer.num_threads=1",
)  # fmt: skip


def test_settle_adds_seeds_in_packs_at_looks_that_were_fixed_before(tmp_path: Path) -> None:
    """Through the command line: two seeds, then three in all; a repeat does nothing more."""
    out = tmp_path / "out"
    done = say("train", "-m", *TRAIN, "seed=0,1", f"output_dir={out}", "sweep=s")
    assert done.code == 0, done.err
    before = content_of(out / "s")
    assert before["settling"] is None
    done = say("settle", out / "s", "--max-seeds", "3", "--margin", "50", "--json")
    assert done.code == 0, done.err
    after = content_of(out / "s")
    (look,) = after["settling"]["looks"]
    assert look["seeds"] == [0, 1, 2] and look["level"] == 0.05 and look["taken"]
    new = [run for run in after["runs"] if run not in before["runs"]]
    assert {after["runs"][run]["config"]["seed"] for run in new} == {2} and len(new) == 2
    (pack,) = after["packs"][len(before["packs"]) :]
    assert sorted(pack["runs"]) == sorted(new), "one pack"
    (one,) = json.loads(done.out)["verdicts"]
    assert one["outcome"] in ("found", "no worse") and one["look"] == one["looks"] == 1
    assert "1 of 1 questions are settled" in done.err
    again = say("settle", out / "s")
    assert again.code == 0 and content_of(out / "s") == after
    assert "look 1 of 1, at 3 seeds" in again.out
    other = say("settle", out / "s", "--max-seeds", "9", "--margin", "1")
    assert other.code == 2
    assert "--max-seeds: must stay as it was" in other.err and "--margin: must stay" in other.err


def test_a_seed_that_diverges_has_no_part_in_its_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look is taken without it, and the exit code tells."""
    out = tmp_path / "out"
    done = say("train", "-m", *TRAIN, "seed=0,1", f"output_dir={out}", "sweep=s")
    assert done.code == 0, done.err
    whole = StackedPack.forward_backward

    def poisoned(self: StackedPack, *rest: Any) -> Any:
        loss = whole(self, *rest).clone()
        for run, config in enumerate(self.configs):
            if config.seed == 2 and config.head.policy == "lora":
                loss[run] = float("nan")
        return loss

    monkeypatch.setattr(StackedPack, "forward_backward", poisoned)
    done = say("settle", out / "s", "--max-seeds", "4", "--json")
    assert done.code == 1 and "1 of 4 runs did not finish" in done.err, done.err
    (look,) = content_of(out / "s")["settling"]["looks"]
    assert look["taken"]
    found = json.loads(done.out)
    (one,) = found["verdicts"]
    assert len(one["seeds"]) == 3 and one["look"] == 1
    assert found["bases"], "what `compare` shows, `settle` shows"


def test_settle_refuses_what_it_cannot_add_to(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", TWO, seeds=3)
    said = say("settle", tmp_path / "s")
    assert said.code == 2 and "with sweep.json" in said.err
    said = say("settle", tmp_path / "s", "--max-seeds", "2")
    assert said.code == 2 and "at least 3" in said.err


def test_what_no_number_of_seeds_settles_says_how_many_examples_would(tmp_path: Path) -> None:
    """Every example differs by the same in all seeds: only more examples tell the mean."""
    rng = np.random.default_rng(0)
    hard, own = rng.normal(size=60), 0.3 * rng.normal(size=60)
    own -= own.mean()
    for seed in range(5):
        noise = 0.001 * rng.normal(size=60)
        write_run(tmp_path / "t", "exclude", 16, seed, {"nll": hard})
        write_run(tmp_path / "t", "lora", 16, seed, {"nll": hard + own - 0.01 + noise})
    (one,) = json.loads(say("compare", tmp_path / "t", "--json").out)["verdicts"]
    assert one["outcome"] == "not settled" and one["hopeless"] and one["more_seeds"] is None
    # A mean of N differences of spread sd is found in 80% from N = (2.8 sd / 0.01)^2 on.
    needed = ((1.96 + 0.84) * own.std(ddof=1) / one["gain"]) ** 2
    assert one["more_examples"] == pytest.approx(needed, rel=0.1)
    assert f"{one['more_examples']:,} test examples in place of 60 might" in one["sentence"]
