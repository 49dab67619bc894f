"""What compare says of retention, through the command line; against statsmodels and scipy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anova
import linted
import numpy as np
import pandas as pd
import pytest
from conftest import say
from sweeps import write_run
from test_verdicts import by_hand, said_json

from lorabench import compare, record
from lorabench.compare.judging import Verdict
from lorabench.compare.lints import lints
from lorabench.compare.looks import Look
from lorabench.compare.outlook import outlook, usual
from lorabench.compare.questions import Question
from lorabench.compare.selection import flattery
from lorabench.config.schema import CompareConfig

Kept = dict[tuple[str, int], float | None]


def sweep(
    folder: Path,
    test: dict[tuple[str, int], float],
    retention: Kept,
    seeds: int = 4,
    draw: int = 0,
    metric: str = "nll",
    **config: Any,
) -> Path:
    """Write runs with normal scores around these means; None: not scored on retention."""
    rng = np.random.default_rng(draw)
    shared = rng.normal(size=60), rng.normal(size=40)
    for (head, r), mean in test.items():
        for seed in range(seeds):
            values = mean + shared[0] + 0.02 * rng.normal() + 0.1 * rng.normal(size=60)
            noise = 0.02 * rng.normal() + 0.1 * rng.normal(size=40)
            kept = retention[head, r]
            write_run(
                folder, head, r, seed, {metric: values},
                retention=None if kept is None else {"nll": kept + shared[1] + noise},
            )  # fmt: skip
    return folder


def lines(folder: Path, *words: Any) -> list[str]:
    """The sentences about heads."""
    said = say("compare", folder, *words)
    assert said.code == 0, said.err
    return [
        line.strip() for line in said.out.splitlines() if line.startswith("  ") and "head" in line
    ]


TEST = {("exclude", 8): 2.0, ("lora", 8): 1.5, ("exclude", 16): 2.0, ("lora", 16): 1.6}
WORSE: Kept = {("exclude", 8): 3.0, ("lora", 8): 3.4, ("exclude", 16): 3.0, ("lora", 16): 3.4}


def test_every_number_is_an_independent_computation_on_the_predictions(tmp_path: Path) -> None:
    """Both splits' p-values go through one Holm procedure: statsmodels' own, over all of them."""
    sweep(tmp_path / "s", TEST, {key: 3.0 + 0.05 * (key[0] == "lora") for key in TEST})
    found = said_json(tmp_path / "s")["verdicts"]
    tables: dict[tuple[str, int, int], pd.DataFrame] = {}
    for path in (tmp_path / "s").glob("*/record.json"):
        one = json.loads(path.read_text())
        rows = pd.read_parquet(path.parent / one["evaluations"][-1]["predictions"])
        tables[
            one["config"]["head"]["policy"], one["config"]["lora"]["r"], one["config"]["seed"]
        ] = rows

    def gains(one: dict[str, Any], better: str, worse: str, split: str) -> np.ndarray:
        levels = (better, worse)
        if one["factor"] == "head":
            pairs = [
                [(h, int(r)) for h in levels] for r in ([one["at"]["r"]] if one["at"] else (8, 16))
            ]
        else:
            heads = [one["at"]["head"]] if one["at"] else ("exclude", "lora")
            pairs = [[(h, int(r)) for r in levels] for h in heads]

        def of(head: str, r: int) -> np.ndarray:
            every = [tables[head, r, s] for s in range(4)]
            return np.stack([t[t["split"] == split].set_index("example")["nll"] for t in every])

        return np.mean([of(*worse) - of(*better) for better, worse in pairs], 0)

    verdicts = [(one, one, "test") for one in found]
    verdicts += [(one, one["retention"], "retention") for one in found]
    for one, mine, split in verdicts:
        table = gains(one, mine["better"], mine["worse"], split)
        mean, p, half = by_hand(table, mine["level"])
        assert mine["gain"] == pytest.approx(mean, rel=1e-9) and mean >= 0
        assert mine["p"] == pytest.approx(p, rel=1e-6, abs=1e-14)
        assert [mine["low"], mine["high"]] == pytest.approx([mean - half, mean + half], rel=1e-6)
        assert mine["examples"] == (60 if split == "test" else 40)
    rejected, adjusted = anova.holm([mine["p"] for _, mine, _ in verdicts])
    assert [mine["p_adjusted"] for _, mine, _ in verdicts] == pytest.approx(
        adjusted.tolist(), rel=1e-9
    )
    is_found = [mine["outcome"] in ("found", "trade-off") for _, mine, _ in verdicts]
    assert is_found == rejected.tolist() and 0 < sum(is_found) < len(is_found)


def test_a_gain_with_a_loss_is_a_trade_off_and_never_simply_better(tmp_path: Path) -> None:
    sweep(tmp_path / "s", TEST, WORSE, seeds=6)
    told = lines(tmp_path / "s")
    heads = [one for one in told if one.startswith("head=lora gains")]
    assert len(heads) == 3, told  # at each r, and averaged over r
    for one in heads:
        assert " test nll [" in one and " retention nll [" in one and "forgets more" in one
        assert one.endswith("a trade-off") and "beats" not in one and "better" not in one
    verdicts = said_json(tmp_path / "s")["verdicts"]
    outcomes = {one["outcome"] for one in verdicts if one["factor"] == "head"}
    assert outcomes == {"trade-off"}, "no program that looks for `found` sees one"


def test_better_on_both_says_both(tmp_path: Path) -> None:
    sweep(tmp_path / "s", TEST, {key: 3.0 - 0.4 * (key[0] == "lora") for key in TEST}, seeds=6)
    heads = [one for one in lines(tmp_path / "s") if one.startswith("head=lora beats head=exclude")]
    assert len(heads) == 3
    assert all("and forgets less, by 0." in one and "retention nll [" in one for one in heads)


def test_what_is_not_settled_on_retention_is_said(tmp_path: Path) -> None:
    sweep(tmp_path / "s", TEST, dict.fromkeys(TEST, 3.0), seeds=6)
    heads = [one for one in lines(tmp_path / "s") if one.startswith("head=lora beats head=exclude")]
    assert len(heads) == 3
    assert all(
        "test nll [" in one and "which of them forgets more is not settled" in one for one in heads
    )


def test_a_margin_holds_for_retention_in_the_same_metric(tmp_path: Path) -> None:
    sweep(tmp_path / "s", TEST, dict.fromkeys(TEST, 3.0), seeds=6)
    told = lines(tmp_path / "s", "--margin", "0.3")
    assert any("what they forget differs by less than 0.3 retention nll" in one for one in told), (
        told
    )


def test_runs_without_retention_get_no_verdict_on_it(tmp_path: Path) -> None:
    some = {key: None if key == ("lora", 16) else 3.0 for key in TEST}
    sweep(tmp_path / "s", TEST, some)
    told = [
        one for one in lines(tmp_path / "s") if one.startswith("head=lora") and "at r=16" in one
    ]
    (one,) = told
    assert "on retention there is no verdict, because a setting has no retention scores" in one
    assert "`lorabench evaluate DIR`" in one


def test_one_seed_tells_of_the_examples_alone(tmp_path: Path) -> None:
    sweep(tmp_path / "s", TEST, WORSE, seeds=1)
    (one,) = [
        one for one in lines(tmp_path / "s") if one.startswith("head=lora has") and "r=8" in one
    ]
    assert "head=exclude has the better retention nll by 0." in one


def test_retention_falls_back_to_nll_where_it_lacks_the_metric(tmp_path: Path) -> None:
    sweep(tmp_path / "s", {k: 0.5 for k in TEST}, WORSE, metric="answer")
    found = said_json(tmp_path / "s")
    assert found["metric"] == "answer"
    assert {one["retention"]["metric"] for one in found["verdicts"]} == {"nll"}
    assert {one["retention"]["margin"] for one in said_json(tmp_path / "s", "--margin", "0.1")[
        "verdicts"]} == {None}, "a margin is in the unit of test"  # fmt: skip


def test_the_table_shows_what_retention_is_compared_by(tmp_path: Path) -> None:
    """Also where --metric asks for another one of test."""
    sweep(tmp_path / "s", dict.fromkeys(TEST, 0.5), WORSE, metric="answer")
    shown = say("compare", tmp_path / "s", "--metric", "answer").out
    assert "test answer ↑" in shown and "retention nll ↓" in shown and "test rank" in shown


def test_ranks_say_no_more_than_the_verdicts(tmp_path: Path) -> None:
    """A difference that is found alone, at 5%, and not beside retention, at 2.5%."""
    rng = np.random.default_rng(3)
    shared = rng.normal(size=60)
    noise = rng.normal(size=(3, 60)) + 0.05 * rng.normal(size=(3, 1))
    for size in np.linspace(0.05, 1.5, 60):
        gains = np.asarray(size + noise)
        if 0.025 < by_hand(gains, 0.05)[1] < 0.05:
            break
    else:
        raise AssertionError("no such size")
    for name, kept in (("alone", None), ("beside", {"nll": np.arange(5.0)})):
        for seed in range(3):
            write_run(tmp_path / name, "exclude", 8, seed, {"nll": shared}, retention=kept)
            other = {"nll": shared + gains[seed]}
            write_run(tmp_path / name, "lora", 8, seed, other, retention=kept)
    for name, outcome, rank in (("alone", "found", [1, 1]), ("beside", "not settled", [1, 2])):
        found = said_json(tmp_path / name)
        assert [one["outcome"] for one in found["verdicts"]] == [outcome]
        assert found["rows"][0]["rank"] == rank


def test_without_retention_nothing_changes(tmp_path: Path) -> None:
    sweep(tmp_path / "s", TEST, dict.fromkeys(TEST))
    said = say("compare", tmp_path / "s").out.replace(str(tmp_path), "")
    assert not any(
        word in said for word in ("retention", " gain", "forget", "test rank", "test nll [")
    )
    found = said_json(tmp_path / "s")
    assert not {"retention", "split"} & set(found["verdicts"][0])
    assert not {"gain", "forgetting"} & set(found["rows"][0])
    assert set(found["evaluations"]) == {"test"}


# A choice on validation


def test_what_a_choice_owes_on_retention_has_its_sign() -> None:
    """By a plain loop over seeds: what the chosen one has there less what each seed's own has."""
    rng = np.random.default_rng(1)
    loss, kept = rng.normal(size=(3, 5)), rng.normal(size=(3, 5))
    best = int(np.argmin([np.mean(row) for row in loss]))
    owed = [kept[best, s] - kept[int(np.argmin(loss[:, s])), s] for s in range(5)]
    assert flattery(loss, kept) == pytest.approx(np.mean(owed) / (np.sqrt(5) - 1), rel=1e-12)
    assert flattery(loss, loss) == flattery(loss) >= 0
    # Retention that follows validation is flattered as it is, and one that goes against it is not.
    assert flattery(loss, -loss) == pytest.approx(-flattery(loss), rel=1e-12)


def test_a_chosen_setting_is_judged_by_its_own_retention(tmp_path: Path) -> None:
    """With lr chosen on validation, the other rate's retention is not looked at."""
    rng = np.random.default_rng(0)
    shared, kept_shared = rng.normal(size=60), rng.normal(size=40)
    for head in ("exclude", "lora"):
        for lr, validation, kept in ((0.1, 1.0, 3.0), (0.2, 2.0, 9.0)):
            for seed in range(3):
                noise = 0.05 * rng.normal(size=60)
                loss = kept + (0.5 if head == "lora" else 0.0) + kept_shared
                write_run(
                    tmp_path / "s", head, 8, seed, {"nll": validation + shared + noise},
                    config={"trainer": {"lr": lr}}, name=f"{head}-{lr}-{seed}",
                    validation={"nll": validation + 0.01 * rng.normal()},
                    retention={"nll": loss + 0.05 * rng.normal(size=40)},
                )  # fmt: skip
    (one,) = said_json(tmp_path / "s", "--select", "trainer.lr")["verdicts"]
    assert one["retention"]["better"] == "exclude"
    # The noise of 40 examples of three seeds; the other rate's difference would be 6 off.
    assert one["retention"]["gain"] == pytest.approx(0.5, abs=0.05)


# What else counts retention


def test_settle_goes_on_while_retention_is_open() -> None:
    question = Question("r", ("8", "16"), {}, (), ((0, 1),))

    def verdict(outcome: Any, **changes: Any) -> Verdict:
        return Verdict(question, "nll", "8", "16", outcome, **changes)

    found, unsettled = verdict("found"), verdict("not settled")
    assert not found.is_open and unsettled.is_open
    assert found.beside(unsettled).is_open and not found.beside(verdict("found")).is_open
    assert not found.beside(verdict("not settled", hopeless=True)).is_open
    assert not found.beside(verdict("no verdict")).is_open, "no seed brings what was not scored"


def test_each_split_is_answered_at_the_look_that_settles_it(tmp_path: Path) -> None:
    """Numbers of the first look are those of a command of its seeds, at its share of the level."""
    test, kept = {("exclude", 8): 2.0, ("lora", 8): 1.0}, {("exclude", 8): 3.0, ("lora", 8): 3.02}
    sweep(tmp_path / "s", test, dict(kept), seeds=6)
    looks = [Look(tuple(range(3)), 0.01), Look(tuple(range(6)), 0.04)]
    (one,) = compare.verdicts(record.find(tmp_path / "s"), looks=looks, planned_looks=2).verdicts
    assert one.retention is not None
    assert (one.look, one.retention.look) == (1, 2)
    assert (len(one.seeds), len(one.retention.seeds)) == (3, 6)
    rows = [
        pd.read_parquet(next(p.glob("evaluations/*")))
        for p in sorted((tmp_path / "s").glob("*-8-*"))
    ]
    of = {
        split: np.stack([t[t["split"] == split]["nll"] for t in rows])
        for split in ("test", "retention")
    }
    assert one.p == pytest.approx(by_hand(of["test"][:3] - of["test"][6:9], 0.01)[1], rel=1e-6)
    gains = of["retention"][6:] - of["retention"][:6]
    assert one.retention.p == pytest.approx(by_hand(gains, 0.04)[1], rel=1e-6)
    # Two questions at the first look, one that is left at the second.
    assert (one.level, one.retention.level) == (0.005, 0.04)
    (text,) = compare.verdicts(
        record.find(tmp_path / "s"), looks=looks, planned_looks=2
    ).sentences()
    assert text.endswith("(test: look 1 of 2, at 3 seeds; retention: look 2 of 2, at 6 seeds)")


def test_a_margin_of_another_metric_never_reaches_retention(tmp_path: Path) -> None:
    """Not even at a look at which retention alone is left."""
    test = {("exclude", 8): 0.2, ("lora", 8): 0.9}
    sweep(tmp_path / "s", test, dict.fromkeys(test, 3.0), seeds=6, metric="answer")
    looks = [Look(tuple(range(3)), 0.01), Look(tuple(range(6)), 0.04)]
    (one,) = compare.verdicts(
        record.find(tmp_path / "s"), margin=0.3, looks=looks, planned_looks=2
    ).verdicts
    assert one.retention is not None and one.retention.look == 2
    assert one.retention.margin is None and one.margin == 0.3


def test_a_plan_counts_both_splits() -> None:
    """A question more to answer takes a larger difference to be found."""
    settings = [({"r": r}, seed) for r in (8, 16) for seed in range(4)]
    one, two = (outlook(settings, CompareConfig(), 100, usual(), n) for n in (1, 2))
    assert one is not None and two is not None
    assert (one.questions, two.questions) == (1, 2) and two.level == one.level / 2
    assert one.smallest is not None and two.smallest is not None and two.smallest > one.smallest


@pytest.mark.parametrize(
    ("note", "text"),
    [
        ("data.retention: 3 of 9 texts are in the training set too, so it hides what",
         "3 of 9 retention prompts are in the training set too"),
        ("data.tests.law: 3 of 9 prompts are in the training set too, so its scores",
         "3 of 9 law prompts are in the training set too"),
    ],
)  # fmt: skip
def test_a_named_set_in_train_is_a_lint(note: str, text: str) -> None:
    runs = linted.clean()
    runs += [linted.run(notes=[note], head="full")]
    (found,) = [one for one in lints(runs) if one.name == "test-in-train"]
    assert text in found.text
    assert ("hides what training makes the base forget" in found.text) == ("retention" in note)


def test_answers_carry_retention_for_programs(tmp_path: Path) -> None:
    sweep(tmp_path / "s", TEST, WORSE)
    answers = compare.verdicts(record.find(tmp_path / "s"))
    assert answers.retention_metric == "nll"
    frame = answers.frame()
    assert len(frame) == len(answers.verdicts) and set(frame["outcome"]) >= {"trade-off"}
