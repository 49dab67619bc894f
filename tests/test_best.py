"""trainer.keep and trainer.patience: against a loop by hand and HF's EarlyStoppingCallback."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import linted
import numpy as np
import pytest
import torch
from conftest import composed, recorded_runs, say
from equality import relative
from stock import Stock, copy_of, embedded_tokenizer
from torch import nn

from lorabench import data, plan
from lorabench import model as base_model
from lorabench.compare.tables import settings_of
from lorabench.config import ConfigErrors
from lorabench.pack import ModulePack
from lorabench.record import Cost
from lorabench.train import learning_rate
from lorabench.worker.watch import Watch

# Overfits within a few steps: validation turns, at other steps for other seeds.
SHORT = [
    "trainer=smoke", "trainer.num_threads=1", "tracker=none", "lora.r=4", "trainer.steps=16",
    "target_modules=attention", "data.num_train=8", "data.num_validation=6", "data.num_test=4",
    "trainer.lr=0.03", "trainer.schedule=constant", "trainer.eval_every=2", "trainer.batch_size=2",
    "trainer.eval_base=false", "trainer.eval_examples=null",
]  # fmt: skip


def train(out: Path, *words: str) -> dict[int, tuple[Path, dict[str, Any]]]:
    """The records of a sweep by seed."""
    said = say("train", *(["-m"] if any(w.startswith("seed=") for w in words) else []), *SHORT,
               *words, f"output_dir={out}")  # fmt: skip
    assert said.code == 0, said.err
    return {one["config"]["seed"]: (path, one) for path, one in recorded_runs(out)}


def values(folder: Path, metric: str = "nll") -> dict[int, float]:
    """What was logged of validation, by step."""
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    key = f"validation/{metric}"
    return {row["step"]: row[key] for row in rows if key in row}


def watched(found: list[float], patience: int | None = None, metric: str = "nll") -> Watch:
    watch = Watch(f"validation/{metric}", patience)
    for step, value in enumerate(found, 1):
        watch.see(step, value)
        if watch.why_stop():
            break
    return watch


@pytest.mark.parametrize("metric", ["nll", "accuracy"])
def test_patience_is_the_hf_callbacks(metric: str, tmp_path: Path) -> None:
    """A hundred random sequences, with ties; the Trainer updates its best value as ours is."""
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

    args = TrainingArguments(
        str(tmp_path), metric_for_best_model="m", greater_is_better=metric == "accuracy",
        eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True,
        use_cpu=True,
    )  # fmt: skip
    generator = np.random.default_rng(0)
    better = np.greater if metric == "accuracy" else np.less
    ends = set()
    for _ in range(100):
        patience, found = int(generator.integers(1, 5)), generator.integers(0, 9, 12).tolist()
        callback, state, control = EarlyStoppingCallback(patience), TrainerState(), TrainerControl()
        kept = step = 0
        for step, value in enumerate(found, 1):
            callback.on_evaluate(args, state, control, metrics={"eval_m": value})
            if state.best_metric is None or better(value, state.best_metric):
                state.best_metric, kept = value, step
            if control.should_training_stop:
                break
        watch = watched(found, patience, metric)
        assert watch.best is not None
        assert (watch.best.step, watch.best.value) == (kept, state.best_metric)
        assert (watch.why_stop() is not None) == control.should_training_stop
        assert watch.best.step + watch.waited == step
        ends.add(step)
    assert len(ends) > 4


def test_what_is_not_finite_is_never_the_best() -> None:
    watch = watched([math.nan, math.inf, 2.0, math.nan, 3.0], patience=9)
    assert watch.best is not None and (watch.best.step, watch.best.value, watch.waited) == (3, 2, 2)
    stopped = watched([math.nan] * 5, patience=3)
    assert stopped.best is None and stopped.waited == 3 and "so far" in str(stopped.why_stop())


def by_hand(words: list[str]) -> tuple[dict[str, Any], int, dict[int, float]]:
    """Best state of stock PEFT with torch.optim, its step, and validation nll by step."""
    config = composed(*words)
    patience = config.trainer.patience
    base = base_model.load(config.model, "cpu")
    pack = ModulePack(base, config, plan.make(config).lora_modules, "cpu")
    stock = Stock(config, copy_of(pack.adapter_state(0)))
    examples = data.load(config.data).validation
    tokens = data.tokenise(examples, embedded_tokenizer(), config.data)
    optimizer, found, waited = stock.optimizer(), {}, 0
    best: tuple[float, int, dict[str, Any]] = (math.inf, 0, {})
    for step in range(config.trainer.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.trainer, step)
        stock.loss(step)
        assert config.trainer.max_grad_norm is not None
        nn.utils.clip_grad_norm_(list(stock.parameters.values()), config.trainer.max_grad_norm)
        optimizer.step()
        if (step + 1) % config.trainer.eval_every and step + 1 < config.trainer.num_steps:
            continue
        found[step + 1] = value = nll_of(stock, tokens)
        if value < best[0]:
            best, waited = (value, step + 1, copy_of(stock.state())), 0
        else:
            waited += 1
        if waited == patience:
            break
    return best[2], best[1], found


@torch.no_grad()
def nll_of(stock: Stock, tokens: data.Tokens) -> float:
    """Mean over examples of the mean nll of their completions, one example at a time."""
    found = []
    for ids, start in zip(tokens.input_ids, tokens.completion_start, strict=True):
        logits = stock.wrapped(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        found.append(nn.functional.cross_entropy(logits, torch.tensor(ids[start:])).item())
    return float(np.mean(found))


# --- training --------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize("kind", ["packed", "alone"])
def test_the_best_adapter_and_the_early_stop_are_those_of_a_loop_by_hand(
    kind: str, tmp_path: Path
) -> None:
    """DoRA trains on PEFT's own modules; the packed runs stop after other steps."""
    common = ["model.dtype=float64", "trainer.keep=best", "trainer.patience=2"]
    # At 0.03 rounding grows to 1e-5 within 16 steps of these packed runs.
    common += ["lora.use_dora=true"] if kind == "alone" else ["trainer.lr=0.01"]
    found = train(tmp_path, *common, f"seed={'0' if kind == 'alone' else '0,1'}")
    for seed, (path, one) in found.items():
        assert one["plan"]["pack"]["size"] == len(found)
        state, best, nll = by_hand([*SHORT, *common, f"seed={seed}"])
        mine = values(path)
        # Float64 rounding (1e-16) of sums in another order, grown by AdamW steps at a high rate.
        assert mine == pytest.approx(nll, rel=1e-9)
        assert (one["best"]["step"], one["adapter_step"]) == (best, best)
        assert one["best"]["metric"] == "validation/nll"
        assert one["steps_done"] == max(nll) and one["status"] == "finished"
        early = max(nll) < 16
        assert early == (one["stopped_early"] is not None) and one["error"] is None
        for name, tensor in adapters_of(path).items():
            assert relative(tensor, state[name]) < 1e-8, name
        # The saved adapter is what was scored: the same weights in batches of the same shapes.
        (evaluation,) = one["evaluations"]
        scored = evaluation["splits"]["validation"]["metrics"]["nll"]["value"]
        assert scored == one["best"]["value"] == mine[best]
        assert best < max(mine), "an adapter that is not the last"
    ends = {one["steps_done"] for _, one in found.values()}
    assert min(ends) < 16 and len(ends) == len(found)


def adapters_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, dict[str, Any]]]:
    """Two runs of a pack, one of which stops early."""
    out = tmp_path_factory.mktemp("early")
    return train(out, "trainer.keep=best", "trainer.patience=2", "seed=0,1")


def test_a_run_that_stops_early_does_not_change_a_bit_of_its_mates(
    early: dict[int, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    without = train(tmp_path, "trainer.keep=best", "seed=0,1")
    ends = [one["steps_done"] for _, one in early.values()]
    assert len(set(ends)) == 2
    for seed, (path, one) in early.items():
        other, whole = without[seed]
        assert list(losses(path)) == list(range(1, one["steps_done"] + 1))
        assert losses(path) == {k: v for k, v in losses(other).items() if k <= one["steps_done"]}
        assert whole["steps_done"] == 16 and whole["stopped_early"] is None
        assert (one["cost"]["train_tokens"] < whole["cost"]["train_tokens"]) == (
            one["steps_done"] < 16
        )
        if one["steps_done"] == 16:
            assert one["hashes"]["adapter"] == whole["hashes"]["adapter"]


class Killed(BaseException):
    """What no handler catches, as no handler sees SIGKILL."""


# In the evaluation of a step, by a signal; after a step, by a kill: before a run has stopped
# early, between its end and that of its mate, and in the last evaluation.
@pytest.mark.parametrize(
    ("how", "at"), [("signal", 2), ("signal", 8), ("kill", 5), ("kill", 12), ("signal", 1)]
)
def test_what_was_interrupted_ends_as_if_it_had_not_been(
    how: str,
    at: int,
    early: dict[int, tuple[Path, dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lorabench import evaluate
    from lorabench.progress import Display

    words = ["-m", *SHORT, "trainer.keep=best", "trainer.patience=2", "seed=0,1"]
    words += ["trainer.checkpoint_every=3", f"output_dir={tmp_path}"]
    calls, true_scored, true_step = [], evaluate.scored, Display.step

    def scored(*given: Any) -> Any:
        calls.append(True)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_scored(*given)

    def step(self: Any, number: int, *rest: Any) -> None:
        if number == at:
            raise Killed
        true_step(self, number, *rest)

    with monkeypatch.context() as patched:
        if how == "signal":
            patched.setattr(evaluate, "scored", scored)
            assert say("train", *words).code == 128 + signal.SIGTERM
        else:
            patched.setattr(Display, "step", step)
            with pytest.raises(Killed):
                say("train", *words)
    said = say("train", *words)
    assert said.code == 0, said.err
    for path, one in recorded_runs(tmp_path):
        expected, wanted = early[one["config"]["seed"]]
        for key in ("status", "error", "steps_done", "best", "adapter_step", "stopped_early"):
            assert one[key] == wanted[key], key
        assert one["hashes"] == wanted["hashes"]
        assert one["cost"]["train_tokens"] == wanted["cost"]["train_tokens"]
        assert losses(path) == losses(expected) and values(path) == values(expected)
        assert not (path / "checkpoint").exists()


def test_more_may_be_better_and_answers_may_be_generated(tmp_path: Path) -> None:
    """The metric is scored, its best value kept, and the saved adapter has it."""
    words = ["objective=validation/answer_flexible", "data.answer_max_new_tokens=4",
             "trainer.keep=best", "trainer.steps=4", "trainer.lr=1e-3"]  # fmt: skip
    ((path, one),) = train(tmp_path, *words).values()
    found = values(path, "answer_flexible")
    assert list(found) == [2, 4] == list(values(path))
    best = max(found, key=lambda step: (found[step], -step))
    assert one["best"] == {
        "step": best, "metric": "validation/answer_flexible", "value": found[best]
    }  # fmt: skip
    (evaluation,) = one["evaluations"]
    metrics = evaluation["splits"]["validation"]["metrics"]
    assert metrics["answer_flexible"]["value"] == found[best]
    assert metrics["nll"]["value"] == values(path)[best]


def test_a_best_run_is_scored_with_other_settings_and_listed(
    early: dict[int, tuple[Path, dict[str, Any]]],
) -> None:
    """They are part of its id; its mate is needed for the shape of the pack alone."""
    path, one = next(iter(early.values()))
    said = say("evaluate", path, "trainer.eval_batch_size=3", "trainer.eval_examples=3")
    assert said.code == 0, said.err
    entry = json.loads((path / "record.json").read_text())
    assert len(entry["evaluations"]) == 2 and entry["hashes"] == one["hashes"]
    listed = json.loads(say("runs", path.parent, "--json").out)
    assert {run["run_id"]: run["stopped_early"] for run in listed} == {
        one["run_id"]: one["stopped_early"] for _, one in early.values()
    }
    shown = say("runs", path.parent).out
    assert "no better" in shown


# --- ids, errors, lints ----------------------------------------------------------------------


def test_validation_is_part_of_an_id_where_it_decides() -> None:
    planner = plan.Planner()

    def run_id(*words: str) -> str:
        return planner.make(composed("tracker=none", "trainer.eval_every=50", *words)).run_id

    others = [
        ["trainer.eval_every=60"], ["trainer.eval_examples=7"], ["trainer.eval_batch_size=4"],
        ["objective=validation/exact_match"], ["data.num_validation=9"],
    ]  # fmt: skip
    last = run_id()
    assert {run_id(*words) for words in others} == {last} == {run_id("trainer.keep=last")}
    for chooses in ("trainer.keep=best", "trainer.patience=3"):
        ids = [last, run_id(chooses), *(run_id(chooses, *words) for words in others)]
        assert len(set(ids)) == len(ids)
        # What only adds a score decides nothing.
        assert run_id(chooses, "data.metric=[nll]", "data.num_test=9") == run_id(chooses)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trainer.keep=first"], "trainer.keep: must be one of last, best; got 'first'"),
        (["trainer.patience=0", "trainer.eval_every=5"], "trainer.patience: must be at least 1"),
        (["trainer.keep=best"], "at least 1 with trainer.keep=best; got 0; set the steps between"),
        (["trainer.patience=2"], "trainer.eval_every: must be at least 1 with trainer.patience=2"),
        (
            ["trainer.keep=best", "trainer.eval_every=5", "objective=test/nll"],
            "test must not choose; got 'test/nll'; use objective=validation/nll",
        ),
    ],
)
def test_what_cannot_choose_is_refused(words: list[str], told: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        composed(*words)
    (error,) = caught.value.errors
    assert told in error


def test_a_plan_says_that_patience_is_longer_than_the_run() -> None:
    words = ["tracker=none", "trainer.steps=20", "trainer.eval_every=5"]
    told = [plan.make(composed(*words, f"trainer.patience={n}")).warnings for n in (3, 4)]
    assert [sum("trainer.patience" in text for text in one) for one in told] == [0, 1]


def test_runs_that_stopped_early_are_told_where_others_trained_longer() -> None:
    runs = [
        linted.run(
            seed, head=head, trainer={"steps": 16, "patience": 2}, tokens=1600,
            cost=Cost(train_tokens=100 * steps), steps_done=steps,
            stopped_early="no better" if steps < 16 else None,
        )
        for head, steps in (("exclude", 16), ("lora", 8)) for seed in (0, 1)
    ]  # fmt: skip
    found = linted.only(runs, "unequal-training")
    assert "steps done 8 to 16" in found.text and "training tokens 800 to 1,600" in found.text
    assert "trainer.patience=null" in found.remedy


def test_other_settings_of_the_choice_are_other_settings() -> None:
    """Else two such runs would pass for two seeds of one setting."""

    def one(seed: int, keep: str, every: int) -> Any:
        return linted.run(seed, trainer={"keep": keep, "eval_every": every})[1]

    alike = settings_of([one(0, "best", 5), one(1, "best", 5), one(0, "last", 7)])
    assert alike[0] == alike[1] and "trainer.eval_every" not in alike[0]
    other = settings_of([one(0, "best", 5), one(1, "best", 7)])
    assert other[0]["trainer.eval_every"] == 5 and other[1]["trainer.eval_every"] == 7
