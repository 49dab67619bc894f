"""Fixtures: composed configs, short runs, small files; tiny checkpoints are in checkpoints.py.

Stock PEFT's side of a comparison is in stock.py and stock_classifier.py.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_SILENT"] = "true"
os.environ["OMP_NUM_THREADS"] = "1"
if "LORABENCH_TESTS" not in os.environ:  # xdist's workers share the folder of their controller
    os.environ["LORABENCH_TESTS"] = tempfile.mkdtemp(prefix="lorabench-tests-")
    atexit.register(shutil.rmtree, os.environ["LORABENCH_TESTS"])

import pytest
from checkpoints import classifiers, mixed_lengths, tiny_folder  # noqa: F401
from processes import Elsewhere
from wandb_server import Server

from lorabench import cli, config, interrupt

if TYPE_CHECKING:
    import torch

gc.disable()  # while a million objects are imported, until pytest_collection_finish
# What fails in a helper is told in full, as in a test.
pytest.register_assert_rewrite("stock", "stock_classifier", "chats")


# Tests of about three seconds of CPU and more.
LONG = (
    "test_a_classifier_is_tried_trained_and_exported_with_its_labels",
    "test_a_frozen_last_feed_forward_block_trains_in_bfloat16_autocast",
    "test_a_killed_pack_resumes_to_the_same_bits",
    "test_a_killed_run_resumes_to_the_same_adapter",
    "test_a_killed_sweep_ends_with_the_same_bits_and_the_whole_history",
    "test_a_mate_that_diverged_stays_stopped_and_the_others_go_on",
    "test_a_mates_dropout_does_not_change_a_bit",
    "test_a_packed_multirun_is_the_basic_one",
    "test_adapters_reload_in_plain_peft_to_the_recorded_scores",
    "test_after_memory_ran_out_in_mid_training",
    "test_another_process_reads_the_same_from_disk",
    "test_any_mixture_equals_stock_peft",
    "test_between_the_records_of_two_that_trained_together",
    "test_card_states_what_the_weights_do",
    "test_each_adapter_holds_its_own_keys_and_reloads_to_the_recorded_nll",
    "test_fifty_float64_steps_equal_stock_peft",
    "test_float32_gradients_equal_stock_peft",
    "test_init_and_ratio_from_the_command_line",
    "test_launches_at_once_train_each_run_once",
    "test_mates_and_slots_do_not_change_a_bit",
    "test_members_a_step_apart_resume_at_the_step_they_share",
    "test_out_of_memory_at_the_first_step_halves_the_pack",
    "test_packed_and_alone_it_trains_as_in_stock_peft",
    "test_pretraining_does_not_depend_on_the_hash_seed",
    "test_recorded_nll_is_what_plain_peft_gives_without_lorabench",
    "test_resumed_across_a_change_is_bitwise_the_uninterrupted_run",
    "test_run_id_follows_what_decides_the_result_and_nothing_else",
    "test_runs_of_other_ratios_in_a_pack_equal_pefts_loraplus",
    "test_saved_folder_is_plain_peft_and_the_same_under_any_hash_seed",
    "test_shapes_from_the_command_line",
    "test_staged_training_equals_stock_peft_frozen_by_hand",
    "test_the_first_sweep_runs_as_written",
    "test_two_runs_of_a_process_are_two_wandb_runs_of_the_same_ids",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long tests first in each half: xdist deals the halves to two workers, which then steal.

    A long test at the end would keep one worker busy while the other one has nothing left.
    """
    # Not above: xdist's controller, which collects nothing, would import torch and PEFT as well.
    import compositions
    import torch

    torch.set_num_threads(1)  # as fast for models this small, and steady on a shared machine
    compositions.install()
    if "PYTEST_XDIST_WORKER" in os.environ:
        long = [item for item in items if item.name.partition("[")[0] in LONG]
        rest = [item for item in items if item not in set(long)]
        middle = len(rest) // 2
        items[:] = [*long[::2], *rest[:middle], *long[1::2], *rest[middle:]]


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what was imported, and come less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    gc.enable()


# --- the command line ------------------------------------------------------------------------


def composed(*overrides: str) -> config.Config:
    """The typed config of a command line; a dtype of `auto` is that of a local checkpoint.

    Checkpoints that tests make are toys: they train by the recipe of the embedded bases.
    """
    from lorabench import model as base_model

    paths = [word.removeprefix("model.path=") for word in overrides if "model.path=" in word]
    if any(map(os.path.isdir, paths)):
        overrides = ("recipe=embedded", *overrides)
    (cfg,), *_ = cli.compose(list(overrides))
    found = config.typed(cfg)
    with contextlib.suppress(config.ConfigErrors):
        if Path(found.model.path).is_dir():
            return base_model.settled(found)
    return found


class Said(NamedTuple):
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()


def say(*arguments: Any) -> Said:
    """The command line in this process, where torch is imported already."""
    out, err = io.StringIO(), io.StringIO()
    with as_it_was(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return Said(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """Put back what the command line changes in its process."""
    argv, handlers = sys.argv, logging.root.handlers[:]
    before = {number: signal.getsignal(number) for number in interrupt.HEARD}
    try:
        yield
    finally:
        sys.argv = argv
        for number, handler in before.items():
            signal.signal(number, handler)
        for one in set(logging.root.handlers) - set(handlers):
            one.close()
        logging.root.handlers[:] = handlers


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    with as_it_was():
        yield


def recorded_runs(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every run below an output folder: its own folder and its record, to be changed at will."""
    paths = sorted(folder.glob("*/*/record.json"))
    found = [(path.parent, json.loads(path.read_text())) for path in paths]
    for _, record in found:
        record.pop("checksum", None)
    return found


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """The same, by the run's id."""
    return {path.name: record for path, record in recorded_runs(folder)}


def scores(record: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Metrics of a record's newest evaluation: split -> name -> value, number, definition."""
    return {split: one["metrics"] for split, one in record["evaluations"][-1]["splits"].items()}


def predictions(folder: Path) -> Path:
    """The predictions of a run's newest evaluation."""
    record = json.loads((folder / "record.json").read_text())
    return folder / record["evaluations"][-1]["predictions"]


def untouched(folder: Path) -> bool:
    return not any(folder.iterdir())


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where a model's shapes or weights are read."""
    from lorabench import model as base_model

    def refuse(*_: Any) -> None:
        raise AssertionError("a model was read before the errors were shown")

    for name in ("skeleton", "load", "load_verified", "tokenizer", "tokenizer_verified"):
        monkeypatch.setattr(base_model, name, refuse)


# --- stock PEFT ------------------------------------------------------------------------------


def stock_state(wrapped: Any) -> dict[str, torch.Tensor]:
    """What stock PEFT saves of a wrapped model; before 0.21 it left trained biases out."""
    import warnings

    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied layers
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    trained = {n: p.detach() for n, p in wrapped.named_parameters() if p.requires_grad}
    biases = {n: p for n, p in trained.items() if n.endswith(".base_layer.bias")}
    return biases | state


class DoubleTorch:
    """`torch` as a modelling file sees it, float32 replaced by float64."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return getattr(torch, "float64" if name in ("float", "float32") else name)


@pytest.fixture
def float64_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift the casts to float32 in norms and rotary embeddings, for both sides."""
    import torch
    from transformers.models.gemma import modeling_gemma
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.gemma3 import modeling_gemma3
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2

    for module in (
        modeling_gemma, modeling_gemma2, modeling_gemma3, modeling_llama, modeling_qwen2
    ):  # fmt: skip
        monkeypatch.setattr(module, "torch", DoubleTorch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


# --- short runs ------------------------------------------------------------------------------

SMOKE = [
    "trainer=smoke",
    "trainer.num_threads=1",
    "tracker=none",
    "target_modules=attention",
    "data.num_train=64",
    "data.num_validation=16",
    "data.num_test=16",
]
GRID = ["head=exclude,lora", "seed=0,1"]
SHORT_RUN = [
    "trainer=smoke",
    "trainer.num_threads=1",
    "trainer.lr=0.05",
    "tracker=none",
    "lora.r=4",
    "target_modules=attention",
    "data.num_train=64",
    "data.num_validation=4",
    "data.num_test=4",
    "trainer.eval_examples=2",
]


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Callable,  # noqa: F811
) -> Callable[..., Path]:
    """The folder of a short run on a tiny base, made once."""
    made: dict[tuple[str, ...], Path] = {}
    outputs = tmp_path_factory.mktemp("outputs")

    def make(kind: str, *overrides: str) -> Path:
        key = (kind, *overrides)
        if key not in made:
            out = outputs / str(len(made))
            base = ["model=local", f"model.path={tiny_folder(kind)}", f"output_dir={out}"]
            said = say("train", *SHORT_RUN, *base, *overrides)
            assert said.code == 0, said.err
            (made[key],) = (path.parent for path in out.glob("*/*/record.json"))
        return made[key]

    return make


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """Another interpreter, started where it is first asked for."""
    other = Elsewhere(tmp_path_factory.mktemp("elsewhere"))
    yield other
    other.close()


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multirun of four runs; tests may repeat its commands."""
    folder = tmp_path_factory.mktemp("outputs")
    said = say("train", "-m", *SMOKE, *GRID, f"output_dir={folder}")
    assert said.code == 0, said.err
    assert said.lines[-1] == (
        f"{folder}/default: 4 of 4 runs done; lorabench compare {folder}/default"
    )
    return folder


@pytest.fixture
def server() -> Iterator[Server]:
    """A W&B server of this machine."""
    one = Server()
    yield one
    one.close()


# --- files -----------------------------------------------------------------------------------


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """Sixty prompt/completion lines."""
    path = tmp_path / "examples.jsonl"
    rows = [{"prompt": f"add {i} and {i + 1} = ", "completion": str(2 * i + 1)} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of two to nine letters; the label is the first."""
    rng = random.Random(0)
    words = sorted({"".join(rng.choices("abc", k=rng.randint(2, 9))) for _ in range(160)})
    rows = [{"prompt": word, "completion": word[0]} for word in words]
    path = tmp_path_factory.mktemp("texts") / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
