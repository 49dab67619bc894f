"""trainer.epochs: counted as the HF Trainer counts, resolved to steps before anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMOKE, composed, recorded_runs, say
from torch import nn

from lorabench import plan
from lorabench.config import Config, ConfigErrors, range_errors, steps_of_epochs

EPOCHS = ["trainer.steps=null", "trainer.epochs=1.5"]


class Square(nn.Module):
    """A model that the HF Trainer can train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x).square().mean()}


@pytest.mark.parametrize(
    ("examples", "batch_size", "micro", "epochs"),
    [
        (10, 4, 4, 3.0),
        (10, 4, 2, 3.0),
        (16, 4, 4, 0.5),
        (7, 4, 4, 0.3),
        (10, 3, 3, 1.1),
        (3, 8, 8, 2),
    ],
)
def test_as_many_steps_as_the_hf_trainer_takes(
    examples: int, batch_size: int, micro: int, epochs: float, tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=epochs, per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch_size // micro, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    dataset: Any = [{"x": torch.ones(1)}] * examples
    theirs = Trainer(model=Square(), args=settings, train_dataset=dataset)
    theirs.train()
    assert steps_of_epochs(epochs, examples, batch_size) == theirs.state.global_step


def planned(*words: str) -> tuple[Config, plan.Plan]:
    config, planner = composed("tracker=none", *words), plan.Planner()
    return planner.resolved(config), planner.make(config)


def test_epochs_and_the_steps_they_make_are_one_run() -> None:
    words = ["data.num_train=50", "trainer.batch_size=8"]
    (config, made), (_, same) = planned(*words, *EPOCHS), planned(*words, "trainer.steps=11")
    assert (config.trainer.steps, config.trainer.epochs) == (11, None)  # ceil(1.5 * ceil(50 / 8))
    assert made.run_id == same.run_id != planned(*words, "trainer.steps=12")[1].run_id
    assert "trainer.epochs=1.5 makes 11 steps" in made.warnings


def plan_jobs(*words: str) -> list[Any]:
    from lorabench import cli, sweep

    composed = cli.compose(["tracker=none", *words])
    return sweep.plan_jobs(composed.configs, composed.labels)


def test_only_examples_that_are_trained_on_are_counted(jsonl: Path) -> None:
    """Sixty lines, less those held out; of the others only short ones fit 19 tokens."""
    from lorabench.worker import Shared

    words = ["data=jsonl", f"data.train.path={jsonl}", "trainer.batch_size=1", "trainer.steps=null"]
    words.append("data.allow_left_out=1")
    counts = []
    for length in (64, 19):
        (job,) = plan_jobs(*words, "trainer.epochs=1", f"data.max_length={length}")
        counts.append(len(Shared().dataset(job).tokens["train"]))
        assert job.config.trainer.steps == counts[-1]
    assert 0 < counts[1] < counts[0] < 60


def test_a_stage_that_begins_after_the_last_step_is_refused() -> None:
    config = composed("tracker=none", "data.num_train=50", *EPOCHS)
    config.stages = [{"from_step": 0, "train": ["all"]}, {"from_step": 11, "train": ["all"]}]
    with pytest.raises(ConfigErrors, match=r"below trainer\.steps=11; got 11"):
        plan.Planner().resolved(config)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trainer.epochs=2"], "got both (300 and 2); set trainer.steps=null, or leave out epochs"),
        (["trainer.steps=null"], "got neither; set trainer.steps=300"),
        (["trainer.steps=null", "trainer.epochs=0"], "trainer.epochs: must be above 0; got 0.0"),
        (["trainer.steps=null", "trainer.epochs=nan"], "trainer.epochs: must be above 0; got nan"),
    ],
)
def test_one_of_steps_and_epochs_is_set(words: list[str], told: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        composed(*words)
    (error,) = caught.value.errors
    assert told in error


@pytest.mark.slow
def test_a_sweep_over_epochs_trains_the_runs_of_their_steps(tmp_path: Path) -> None:
    """64 examples in batches of 2: 32 steps an epoch."""
    words = [*SMOKE, f"output_dir={tmp_path}"]
    epochs = ["trainer.steps=null", "trainer.epochs=0.1,0.2"]
    said = say("plan", "-m", *words, *epochs, "--json")
    assert said.code == 0, said.err
    assert say("train", "-m", *words, *epochs).code == 0
    found = {one["config"]["trainer"]["steps"]: one for _, one in recorded_runs(tmp_path)}
    assert sorted(found) == [4, 7]
    for path, one in recorded_runs(tmp_path):
        steps = one["config"]["trainer"]["steps"]
        rows = [json.loads(row) for row in (path / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert one["steps_done"] == steps and one["config"]["trainer"]["epochs"] is None
        assert rows[-1]["train/lr"] == pytest.approx(1e-4 / steps)  # linear to 0 over these steps
    again = say("train", "-m", *words, "trainer.steps=4,7")
    assert again.code == 0 and "2 of 2 runs are kept from before" in again.err
    assert say("evaluate", tmp_path / "default", "data.metric=[nll_per_token]").code == 0


# --- stages that begin at an epoch -----------------------------------------------------------

SIXTY = ["data.num_train=60", "trainer.steps=20"]  # eight steps per epoch


def staged(entry: str) -> tuple[Config, plan.Plan]:
    """Plan a run of two stages, the second one as a user writes it."""
    config, planner = composed("tracker=none", *SIXTY), plan.Planner()
    second = yaml.safe_load(f"{{{entry}}}")
    config.stages = [{"from_step": 0, "train": ["layers.3"]}, second]
    if errors := range_errors(config):
        raise ConfigErrors(errors)
    return planner.resolved(config), planner.make(config)


@pytest.mark.parametrize(("epoch", "step"), [("1", 8), ("1.3", 11), ("0", 0)])
def test_a_stage_begins_where_a_run_of_its_epochs_would_end(epoch: str, step: int) -> None:
    """Such a run ends as the HF Trainer's: see the first test."""
    rest = "train: [all], rewarm_steps: 2"
    if epoch == "0":
        rest = "train: [layers.0, layers.1, layers.2]"
    config, by_epoch = staged(f"from_epoch: {epoch}, {rest}")
    other, by_step = staged(f"from_step: {step}, {rest}")
    assert steps_of_epochs(float(epoch), 60, 8) == step == config.stages[1]["from_step"]
    assert config == other and by_epoch.run_id == by_step.run_id


def test_re_warming_is_part_of_an_id_where_there_is_any() -> None:
    def run_id(more: str) -> str:
        return staged(f"from_step: 9, train: [all]{more}")[1].run_id

    assert run_id("") == run_id(", rewarm_steps: 0")
    assert len({run_id(""), run_id(", rewarm_steps: 1"), run_id(", rewarm_steps: 2")}) == 3


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("from_epoch: 1, from_step: 8", "from_step: must be left out beside from_epoch; got 8"),
        ("from_epoch: -1", "from_epoch: must be a number, at least 0 as in the stages before"),
        ("from_epoch: x", "stages[1].from_epoch: must be a number"),
        ("from_epoch: 3", "below trainer.steps=20; got 24; raise trainer.steps"),
        ("from_step: 8, rewarm_steps: 1.5", "rewarm_steps: must be a whole number, at least 0"),
        ("from_step: 8, rewarm: 2", "stages[1].rewarm: no such key; got 'rewarm'"),
    ],
)
def test_a_stage_that_cannot_begin_is_refused(entry: str, told: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        staged(f"{entry}, train: [all]")
    (error,) = caught.value.errors
    assert told in error
    assert ("(from_epoch=3)" in error) == (entry == "from_epoch: 3")
