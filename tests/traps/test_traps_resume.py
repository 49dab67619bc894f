"""Section 2 of docs/traps.md: going on from a checkpoint with other settings."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from peft import get_peft_model
from tiny import SMALL
from transformers import LlamaConfig, Trainer, TrainingArguments

from lorabench import checkpoint, cli, plan, record
from lorabench.progress import Display
from traps.halves import VOCAB, built, causal, config_of, lora, quiet, said

Falls = Callable[..., None]
Check = Callable[[list[str], list[str], Path], None]
ROWS = [torch.tensor([3 + i, 4, 5, 6 + i]) for i in range(8)]
Q = ["q_proj"]


def trainer(model: Any, folder: Path, steps: int) -> Any:
    """The HF Trainer as its manual has it, with a checkpoint every two steps."""
    label = (
        (lambda row: torch.tensor(0)) if hasattr(model.get_base_model(), "score") else torch.clone
    )
    rows = [{"input_ids": row, "labels": label(row)} for row in ROWS]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2,
        learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows)


def attached(base: Any, freeze: str | None = None, **settings: Any) -> Any:
    torch.manual_seed(1)
    model = quiet(lambda: get_peft_model(base, lora(**settings)))
    for name, parameter in model.named_parameters():
        if freeze is not None and freeze in name:
            parameter.requires_grad_(False)
    return model


def resumed(
    first: dict, then: dict, folder: Path, base: Callable[[], Any] = causal
) -> tuple[Any, list[str]]:
    """Two steps with one setting, two more from its checkpoint with another.

    Returns:
        The Trainer, or what the resume raised; and the warnings of the resume.
    """
    quiet(lambda: trainer(attached(base(), **first), folder, 2).train())
    again = quiet(lambda: trainer(attached(base(), **then), folder, 4))
    where = str(folder / "checkpoint-2")
    outcome, warned = said(lambda: again.train(resume_from_checkpoint=where))
    return (outcome if isinstance(outcome, Exception) else again), warned


# --- lorabench: another setting is another run, and no run takes another's checkpoint ---------

FAST = ["tracker=none", "data.num_train=32", "data.num_validation=4", "data.num_test=4",
        "trainer.steps=4", "trainer.batch_size=2", "lora.r=4", "trainer.num_threads=1"]  # fmt: skip


def custom(*names: str) -> list[str]:
    return ["target_modules=custom", f"target_modules.names=[{','.join(names)}]"]


def interrupted(words: list[str], output: Path) -> None:
    """Train a run from the command line, stop it after two steps."""

    def interrupt(self: Display, step: int, *rest: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Display, "step", interrupt)
        assert cli.main(["train", *FAST, *words, f"output_dir={output}"]) == 130


@pytest.fixture(scope="module")
def is_not_taken(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Lays a run's checkpoint in another run's folder: that one must train from its first step.

    It then ends with the bits of the same run in a folder without a checkpoint.
    """

    @cache
    def stopped(*words: str) -> Path:
        output = tmp_path_factory.mktemp("first")
        interrupted([*words], output)
        return output

    return lambda first, then, folder: check(stopped(*first), then, folder)


def check(stopped: Path, then: list[str], folder: Path) -> None:
    shutil.copytree(stopped, folder / "here")
    here, there = (f"output_dir={folder / name}" for name in ("here", "there"))
    (found,) = (folder / "here").glob("*/*/checkpoint")
    assert list(checkpoint.steps(found)) == [2]
    mine = plan.folder(composed(*FAST, *then, here))
    assert mine != found.parent
    shutil.copytree(found, mine / "checkpoint")
    assert cli.main(["train", *FAST, *then, here]) == 0
    assert cli.main(["train", *FAST, *then, there]) == 0
    ended = [record.read(plan.folder(composed(*FAST, *then, place))) for place in (here, there)]
    assert ended[0] and ended[1] and ended[0].status == "finished"
    assert ended[0].hashes == ended[1].hashes
    rows = (mine / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("first", "then", "ours"),
    [
        ({}, {"target_modules": ["q_proj", "k_proj"]}, (custom(*Q), custom(*Q, "k_proj"))),
        ({"target_modules": ["q_proj", "k_proj"]}, {}, (custom(*Q, "k_proj"), custom(*Q))),
        ({}, {"freeze": "layers.0"}, (custom(*Q), custom("layers.1.self_attn.q_proj"))),
    ],
    ids=["added", "removed", "frozen"],
)
def test_resumed_with_other_parameters(
    first: dict, then: dict, ours: Any, falls_in: Falls, is_not_taken: Check, tmp_path: Path
) -> None:
    """T2.13"""
    error, _ = resumed(first, then, tmp_path)
    said_nothing_of_it = "doesn't match the size of optimizer's group" in str(error)
    falls_in(isinstance(error, ValueError) and said_nothing_of_it, error)

    is_not_taken(*ours, tmp_path)


def classifier() -> Any:
    config = LlamaConfig(**SMALL, vocab_size=VOCAB, num_labels=3, pad_token_id=0)
    return built("AutoModelForSequenceClassification", config)


@pytest.mark.parametrize(
    ("base", "first", "then", "outcome"),
    [
        (classifier, "SEQ_CLS", None, "doesn't match the size of optimizer's group"),
        (classifier, None, "SEQ_CLS", "score.weight"),
        (causal, "CAUSAL_LM", "SEQ_CLS", None),  # nothing is added, and nothing is said
    ],
)
def test_resumed_with_another_task(
    base: Any, first: Any, then: Any, outcome: str | None, falls_in: Falls, tmp_path: Path
) -> None:
    """T2.14"""
    done, warned = resumed({"task_type": first}, {"task_type": then}, tmp_path, base)
    if outcome is None:
        falls_in(not isinstance(done, Exception) and not warned, (done, warned))
    else:
        falls_in(outcome in str(done), done)

    words = [*FAST, "data=classes", "head=full", "data.metric=[nll]"]
    ids = [
        plan.run_id(config_of(None, *words, f"task={task}")) for task in ("causal_lm", "seq_cls")
    ]
    assert ids[0] != ids[1]


def test_resumed_with_a_trained_head(falls_in: Falls, is_not_taken: Check, tmp_path: Path) -> None:
    """T2.15"""
    error, _ = resumed({}, {"modules_to_save": ["lm_head"]}, tmp_path)
    falls_in(isinstance(error, KeyError) and "lm_head.weight" in str(error), error)

    is_not_taken(["head=exclude"], ["head=full"], tmp_path)


def test_resumed_with_another_rank(falls_in: Falls, is_not_taken: Check, tmp_path: Path) -> None:
    """T2.16"""
    error, _ = resumed({}, {"r": 8}, tmp_path)
    falls_in(isinstance(error, RuntimeError) and "size mismatch" in str(error), error)

    is_not_taken(custom(*Q), [*custom(*Q), "lora.r=8"], tmp_path)


def test_resumed_with_as_many_parameters_of_other_shapes(
    falls_in: Falls, is_not_taken: Check, tmp_path: Path
) -> None:
    """T2.17"""
    # An interpreter of its own: on peft 0.19 a fork of this one ends in other ways.
    script = """
import sys; sys.path.insert(0, "tests")
from pathlib import Path
from traps.test_traps_resume import resumed
settings = [{"r": 256, "target_modules": ["q_proj", name]} for name in ("v_proj", "o_proj")]
outcome, _ = resumed(*settings, Path(sys.argv[1]))
print(f"{type(outcome).__name__}: {outcome}")
"""
    command = [sys.executable, "-c", script, str(tmp_path / "theirs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    # AdamW's fused kernel writes moments of 32 x 256 where v_proj left room for 16 x 256.
    falls_in(done.returncode < 0, f"{done.returncode}: {done.stdout}{done.stderr[-200:]}")

    is_not_taken(custom("q_proj", "v_proj"), custom("q_proj", "o_proj"), tmp_path)


@pytest.mark.parametrize(
    ("then", "ours"),
    [
        ({"target_modules": ["o_proj"]}, custom("o_proj")),
        ({"lora_alpha": 64}, [*custom(*Q), "lora.lora_alpha=64"]),
        ({"use_rslora": True}, [*custom(*Q), "lora.use_rslora=true"]),
    ],
    ids=["q_proj to o_proj", "alpha", "rslora"],
)
def test_resumed_with_the_same_shapes(
    then: dict, ours: list[str], falls_in: Falls, is_not_taken: Check, tmp_path: Path
) -> None:
    """T2.18"""
    done, warned = resumed({}, then, tmp_path)
    falls_in(not isinstance(done, Exception) and not warned, (done, warned))
    counted = {int(state["step"]) for state in done.optimizer.state.values()}
    falls_in(counted == {4}, counted)  # two of them another module's, or at another scale

    is_not_taken(custom(*Q), ours, tmp_path)
