"""What a plan says of memory and time, against torch's own accounts; and what it refuses.

Memory is measured by benchmarks/memory.py: every allocation that torch's CPU allocator reports to
its profiler during a real step, or torch.cuda.max_memory_allocated. Nothing of lorabench counts.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benches import benchmark
from conftest import say

from lorabench import cli, data, machine, sweep
from lorabench.pack import trace
from lorabench.plan import Planner
from lorabench.sweep import needs
from lorabench.sweep.needs import Needs

# The kernels' own scratch memory, which only a run can know, and rounding up by an allocator.
WITHIN = 0.15
# PEFT asks transformers by a name that 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def bench() -> Any:
    return benchmark("memory")


# --- memory, against torch's own accounting ---------------------------------------------------

SMALL = {
    "hidden_size": 128, "intermediate_size": 512, "vocab_size": 1000, "num_hidden_layers": 6,
    "num_attention_heads": 4,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 32}
CASES = [
    ("llama", "lora_dropout", "pack of 3"),
    ("qwen3", "gradient_checkpointing", "alone"),
    ("gemma", "plain", "head"),
    ("gemma2", "plain", "pack of 3"),
    ("bert", "plain", "pack of 3"),
]
WIDE = [
    case
    for case in itertools.product(
        ("llama", "qwen3", "gemma", "gemma2", "bert"),
        ("plain", "lora_dropout", "gradient_checkpointing"),
        ("alone", "pack of 3", "head"),
    )
    if case[0] != "bert" or case[2] != "head"  # which a classifier trains in full anyway
]


@pytest.mark.parametrize(("kind", "setting", "runs"), CASES)
def test_memory_of_a_step_is_what_torch_allocates(
    kind: str, setting: str, runs: str, bench: Any
) -> None:
    """Few of six layers are traced, so the layers that are added are held against real ones."""
    small = SMALL if kind == "bert" else GROUPED
    found = bench.cell(kind, bench.SETTINGS[setting], runs, [100, 60, 30], "cpu", **small)
    assert found["ratio"] == pytest.approx(1, abs=WITHIN), found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "setting", "runs"), WIDE)
def test_memory_of_a_wide_step_is_what_torch_allocates(
    kind: str, setting: str, runs: str, bench: Any
) -> None:
    """Activations of a pack take more than 1 GB, unless they are recomputed."""
    lengths = [512, 256, 256] if runs == "pack of 3" else [1024, 512, 512]
    found = bench.cell(kind, bench.SETTINGS[setting], runs, lengths, "cpu")
    if runs == "pack of 3" and setting != "gradient_checkpointing":
        assert found["measured_bytes"] > 1e9
    assert found["ratio"] == pytest.approx(1, abs=WITHIN), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "setting", "runs"), WIDE)
def test_memory_of_a_step_is_what_cuda_allocates(
    kind: str, setting: str, runs: str, bench: Any
) -> None:
    found = bench.cell(kind, bench.SETTINGS[setting], runs, [2048, 1024, 1024], "cuda")
    assert found["ratio"] == pytest.approx(1, abs=WITHIN), found


@pytest.mark.slow
def test_bfloat16_is_counted_with_its_copies(bench: Any) -> None:
    """Autocast keeps a bfloat16 copy of every float32 weight that a layer's backward needs."""
    words = ["trainer.dtype=bfloat16"]
    found = bench.cell("llama", words, "pack of 3", [100, 60, 30], "cpu", **GROUPED)
    assert found["ratio"] == pytest.approx(1, abs=WITHIN), found


# --- what cannot be traced -------------------------------------------------------------------


def test_a_step_that_cannot_be_traced_is_a_formula_and_the_plan_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no meta kernel for this")

    monkeypatch.setattr(trace, "trace", broken)
    said = say("plan", "--json", "tracker=none")
    found = json.loads(said.out)
    assert found["runs"][0]["memory_bytes"] > 450_000_000 and found["runs"][0]["seconds"] > 0
    assert any("are rough" in n and "no meta kernel" in n for n in found["notes"])


# --- what the command line says --------------------------------------------------------------

# Activations are most of what a step takes.
WORDS = ["tracker=none", "target_modules=all-linear", "lora.r=2", "trainer.batch_size=32"]


def planned(*words: str) -> tuple[list[sweep.Job], Needs]:
    """Jobs of a command, their lengths known."""
    from lorabench.worker import Shared

    planner = Planner()
    jobs = sweep.plan_jobs(*cli.compose(["-m", *words], planner)[:2], planner)
    Shared(planner).check_data(jobs)
    found = Needs(planner)
    found.know(jobs)
    return jobs, found


def with_memory(monkeypatch: pytest.MonkeyPatch, step_bytes: float) -> None:
    """A device that has that much left for a step of the embedded base."""
    total = int(needs.RUNTIME_BYTES + 4 * 872_576 + step_bytes)
    monkeypatch.setattr(machine, "total_memory", lambda device: total)
    monkeypatch.setattr(machine, "free_memory", lambda device: total)


@pytest.mark.slow
def test_a_run_larger_than_its_device_is_refused_with_what_fits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (job,), found = planned(*WORDS)
    step = found.memory([job]) - found.base_bytes(job)
    with_memory(monkeypatch, 0.6 * step)
    said = say("train", *WORDS, f"output_dir={tmp_path}")
    assert said.code == 2 and "trainer: must fit the device" in said.err
    assert "trainer.gradient_checkpointing=true (~" in said.err
    assert "trainer.micro_batch_size=16 (~" in said.err and "x the time)" in said.err
    assert not list(tmp_path.iterdir())
    said = say("plan", "--json", *WORDS)
    assert said.code == 2 and "must fit the device" in json.dumps(json.loads(said.out))
    for words in (["trainer.micro_batch_size=16"], ["trainer.gradient_checkpointing=true"]):
        (other,), theirs = planned(*WORDS, *words)
        sweep.check_memory([other], theirs)


@pytest.mark.slow
def test_a_base_larger_than_its_device_has_no_setting_that_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_memory(monkeypatch, -1_000_000)
    said = say("plan", *WORDS)
    assert said.code == 2 and "the base alone does not fit" in said.err


@pytest.mark.slow
def test_packs_are_as_large_as_fits_and_checkpointing_is_suggested_where_it_pays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [*WORDS, "seed=0,1,2,3"]
    jobs, found = planned(*words)
    two = found.memory(jobs[:2]) - found.base_bytes(jobs[0])
    with_memory(monkeypatch, 1.05 * two)
    total = machine.total_memory("cpu")
    packs = sweep.form_packs(jobs, 16, total, found)
    assert [len(pack) for pack in packs] == [2, 2]
    assert all(found.memory([jobs[i] for i in pack]) <= total for pack in packs)
    # A step that takes as long with one run as with four: larger packs pay.
    monkeypatch.setattr(Needs, "seconds", lambda self, jobs: 10.0)
    told = sweep.faster(jobs, packs, 16, total, found)
    assert told is not None and "gradient_checkpointing=true makes packs of 4 runs" in told
    assert "faster    trainer.gradient_checkpointing=true" in say("plan", "-m", *words).out
    # One that takes as much longer as it has runs: they do not.
    monkeypatch.setattr(Needs, "seconds", lambda self, jobs: 10.0 * len(jobs))
    assert sweep.faster(jobs, packs, 16, total, found) is None


def test_a_pack_far_from_the_limit_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` of a small model waits for no trace."""
    jobs, found = planned(*WORDS, "seed=0,1")
    monkeypatch.setattr(trace, "trace", lambda *args: pytest.fail("traced"))
    assert sweep.form_packs(jobs, 16, 1 << 40, found) == [[0, 1]]


def test_kernels_of_a_step_are_tried() -> None:
    """Not reckoned from their bytes alone, as those that are too large or have no example."""
    from lorabench.sweep import rates

    (job,), found = planned(*WORDS, "trainer.num_threads=1")
    step = found._trace([job])
    assert step is not None
    small = [call for call in step.calls if call.flops <= rates.TRIED_FLOPS]
    tried = []

    class Watched(rates.Rates):
        def _timed(self, *args: Any, **kwargs: Any) -> float:
            seconds = super()._timed(*args, **kwargs)
            tried.append(seconds)
            return seconds

    mine = Watched("cpu", 1)
    tried.clear()  # of the rates themselves
    mine.of(step)
    assert len(tried) > 0.9 * len(small) > 50


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_time_of_a_step_is_within_a_factor(count: int) -> None:
    """CPU time of one thread: a busy machine stretches the other clock.

    This one too changes with what runs beside it, by half within seconds, so the rates of the
    machine and the steps are measured in turns, and the median of the turns counts.
    """
    from lorabench.train import train
    from lorabench.worker import Shared, make_pack

    turns, steps = 5, 8
    seeds = ",".join(map(str, range(count)))
    words = [*WORDS, "trainer.num_threads=1", f"trainer.steps={turns * steps}", f"seed={seeds}"]
    jobs, found = planned(*words)
    shared = Shared(found.planner)
    machine.configure_torch(jobs[0].config)
    pack, *_ = make_pack(shared, jobs, "cpu")
    tokens = shared.dataset(jobs[0]).tokens["train"]
    training = iter(train(pack, tokens, data.pad_id(shared.tokenizer(jobs[0]))))
    ratios = []
    for _ in range(turns):
        estimate, _ = Needs(found.planner).step_seconds(jobs)
        took = []
        for _ in range(steps):
            begun = time.process_time()
            next(training)
            took.append(time.process_time() - begun)
        ratios.append(estimate / statistics.median(took))
    assert 1 / 1.5 < statistics.median(ratios) < 1.5, ratios
    assert found.seconds_at_most(jobs) >= found.seconds(jobs)
