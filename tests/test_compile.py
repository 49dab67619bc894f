"""A compiled pack: one graph, the results of the pack that is not, and where that is written."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import composed, records, say
from equality import relative
from stock import TINY, packed, tokens_of, train_pack

from lorabench.pack import compiling
from lorabench.sweep import SweepFolder
from lorabench.sweep import compiling as costs
from lorabench.train import train

# torch's own, while it traces and compiles.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SHARED = ("seed=0", "seed=1", "seed=0 lora.r=3 head=lora", "seed=1 lora.lora_dropout=0.2")


@pytest.fixture
def alike(tmp_path: Path) -> Path:
    """Examples of one length."""
    path = tmp_path / "alike.jsonl"
    rows = [{"prompt": f"{i:02d}+{i:02d}=", "completion": f"{2 * i:03d}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_of(alike: Path, folder: Path) -> tuple[str, ...]:
    return (
        "train", "-m", "data=jsonl", f"data.train.path={alike}", "data.num_validation=4",
        "data.num_test=3", "data.max_length=32", "trainer=smoke", "trainer.steps=6",
        "tracker=none", "seed=0,1", "target_modules=attention", "trainer.num_threads=1",
        f"output_dir={folder}",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "backend"), [("llama", "aot_eager"), ("qwen3", "aot_eager"), ("gemma", "inductor")]
)
def test_a_pack_is_one_graph_with_the_results_of_the_pack_as_it_is(
    kind: str,
    backend: str,
    alike: Path,
    tiny_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = (
        *TINY, "data=jsonl", f"data.train.path={alike}", "model=local", "recipe=embedded",
        f"model.path={tiny_folder(kind)}", "model.dtype=float64", "trainer.steps=4",
        "trainer.batch_size=4", "target_modules=all-linear", "lora.r=2", "data.max_length=64",
    )  # fmt: skip
    configs = [composed(*common, *words.split()) for words in SHARED]
    graphs: list[Any] = []

    def compiled(body: Any) -> Any:
        torch._dynamo.reset()

        def counting(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return torch._dynamo.lookup_backend(backend)(graph, inputs)

        return torch.compile(body, fullgraph=True, dynamic=False, backend=counting)

    plain = packed(configs)
    expected = train_pack(plain)
    monkeypatch.setattr(compiling, "compiled", compiled)
    pack = packed(configs, compiled=True)
    tokens, pad_id = tokens_of(configs[0])
    losses, made = [], []
    for step in train(pack, tokens, pad_id):
        losses.append(step.loss)
        made.append(len(graphs))
    assert made[0] >= 1 and made == made[:1] * 4, "one graph for all steps"
    # Float64, and the same products: sums in another order at most.
    for mine, theirs in zip(zip(*losses, strict=True), expected, strict=True):
        assert list(mine) == pytest.approx(list(theirs), rel=1e-11)
    for run in range(len(configs)):
        theirs = plain.adapter_state(run)
        for name, tensor in pack.adapter_state(run).items():
            # Rotary tables are float32 in the architectures: rounding of 6e-8, in another order.
            assert relative(tensor, theirs[name]) < 1e-5, name


@pytest.mark.slow
def test_without_a_compiler_a_run_says_what_to_do(
    alike: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("g++: no such file")

    monkeypatch.setattr(importlib.import_module("torch._inductor.compile_fx"), "compile_fx", none)
    torch._dynamo.reset()
    said = say(*words_of(alike, tmp_path), "trainer.compile=always")
    assert said.code == 1
    assert "torch.compile failed here (FileNotFoundError: g++: no such file)" in said.err
    assert "set trainer.compile=never" in said.err
    torch._dynamo.reset()


def test_what_cannot_be_compiled_once_is_refused(tmp_path: Path) -> None:
    words = ("trainer.compile=always", "seed=0,1", f"output_dir={tmp_path}")
    for verb in ("plan", "train"):
        said = say(verb, "-m", "trainer=smoke", "tracker=none", *words)
        assert said.code == 2
        assert "trainer.compile: always must be a pack that compiles once" in said.err
        assert "different shapes" in said.err and "use trainer.compile=auto or never" in said.err
    said = say("plan", "trainer.compile=sometimes")
    assert said.code == 2 and "trainer.compile: must be one of auto, never, always" in said.err


@pytest.mark.slow
def test_a_compiled_pack_is_written_down_resumed_and_replayed(alike: Path, tmp_path: Path) -> None:
    words = words_of(alike, tmp_path)
    said = say(*words, "trainer.compile=always")
    assert said.code == 0, said.err
    (pack,) = SweepFolder(tmp_path / "default").read().packs
    assert pack.compiled and len(pack.runs) == 2
    found = records(tmp_path)
    assert all(one["plan"]["pack"]["compiled"] for one in found.values())
    # Asked for otherwise, the runs are the same: how they were computed is not in their ids.
    assert say(*words, "trainer.compile=never").code == 0
    assert records(tmp_path) == found
    run = next((tmp_path / "default").glob("*/record.json")).parent
    said = say("replay", run, "--verify", "--out", tmp_path / "again")
    assert said.code == 0 and "identical" in said.out, said


def test_the_table_of_costs_is_what_was_measured() -> None:
    """Of the committed results: the largest seconds of a call, the smallest share that is saved."""
    results = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu-compiling.json"
    rows = json.loads(results.read_text())["rows"]
    for kind in ("alike", "mixed"):
        mine = [row for name, row in rows.items() if name.split()[1] == kind]
        assert len(mine) == 2
        cost = costs.COSTS["cpu", kind]
        slowest = max(row["seconds_a_call"] for row in mine)
        assert cost.seconds_a_call == pytest.approx(slowest, rel=0.02)
        saved = max(0.0, min(row["saved"] for row in mine))
        assert cost.saved == pytest.approx(saved, abs=0.01)
        assert max(row["calls"] / row["modules"] for row in mine) < 1.2 * costs.CALLS_A_MODULE


@pytest.mark.parametrize(
    ("seconds", "ranks", "device", "expected"),
    [
        (1800, (16, 16), "cpu", True),
        (60, (16, 16), "cpu", False),  # compiling 28 modules takes longer than it saves
        (1800, (16, 32), "cpu", False),  # another graph, with more and smaller products
        (7200, (16, 32), "cpu", True),
        (3600, (16, 16), "cuda", False),  # not measured
    ],
)
def test_auto_compiles_where_the_table_says_that_it_pays(
    seconds: float, ranks: tuple[int, int], device: str, expected: bool
) -> None:
    modules = [f"layers.{i}.q_proj" for i in range(28)]
    jobs: Any = [
        SimpleNamespace(
            label="",
            config=composed("trainer.compile=auto", f"lora.r={r}"),
            plan=SimpleNamespace(
                alone=None, lora_modules=modules,
                lengths=SimpleNamespace(is_one_shape=lambda config: True),
            ),
        )
        for r in ranks
    ]  # fmt: skip
    needs: Any = SimpleNamespace(
        seconds=lambda jobs: seconds, seconds_at_most=lambda jobs: 1.5 * seconds
    )
    assert costs.to_compile(jobs, [[0, 1]], device, needs) == [expected]
