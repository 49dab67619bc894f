"""What a worker held is gone when nobody needs it: packs, optimizers, bases."""

from __future__ import annotations

import errno
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import records, say

from lorabench import machine
from lorabench import model as base_model
from lorabench.pack import ModulePack, StackedPack
from lorabench.sweep import SweepFolder

FAST = [
    "train", "-m", "tracker=none", "data.num_train=32", "data.num_validation=4", "data.num_test=4",
    "lora.r=2", "target_modules=attention", "trainer.batch_size=2", "trainer.num_threads=1",
    "trainer.steps=4",
]  # fmt: skip


class Watch:
    """Weak references to what a command makes, and how many of each kind were alive at once."""

    def __init__(self) -> None:
        self.packs: list[weakref.ref[Any]] = []
        self.tensors: list[weakref.ref[Any]] = []  # weights, gradients and moments that train
        self.bases: list[weakref.ref[Any]] = []
        self.most_packs = self.most_bases = 0

    def alive(self, found: list[weakref.ref[Any]]) -> int:
        return sum(one() is not None for one in found)

    def nothing_is_alive(self) -> bool:
        return not any(map(self.alive, (self.packs, self.tensors, self.bases)))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    found = Watch()

    def noted(kind: Any) -> None:
        build = kind.__init__

        def init(self: Any, *arguments: Any, **options: Any) -> None:
            build(self, *arguments, **options)
            found.packs.append(weakref.ref(self))
            found.most_packs = max(found.most_packs, found.alive(found.packs))
            for stacked in getattr(self, "stacked", {}).values():
                parts = (stacked.value, stacked.exp_avg, stacked.exp_avg_sq)
                found.tensors += map(weakref.ref, parts)
            for parameter in getattr(self, "parameters", {}).values():
                found.tensors.append(weakref.ref(parameter))

        monkeypatch.setattr(kind, "__init__", init)

    noted(StackedPack)
    noted(ModulePack)
    load = base_model.load_verified

    def loaded(*arguments: Any) -> Any:
        base = load(*arguments)
        found.bases.append(weakref.ref(base))
        found.tensors += [weakref.ref(p) for p in base.parameters()]
        found.most_bases = max(found.most_bases, found.alive(found.bases))
        return base

    monkeypatch.setattr(base_model, "load_verified", loaded)
    gc.collect()
    yield found


@pytest.mark.slow
def test_several_packs_over_two_bases(watch: Watch, tmp_path: Path) -> None:
    # Two bases: the same bytes in two precisions.
    words = ["model.dtype=float32,float64", "seed=0,1,2,3", "hydra.launcher.pack_size=2"]
    assert say(*FAST, *words, f"output_dir={tmp_path}").code == 0
    assert len(watch.packs) == 4 and watch.most_packs == 1
    assert len(watch.bases) == 2 and watch.most_bases == 1, "the packs of one base share it"
    assert watch.nothing_is_alive()


@pytest.mark.slow
def test_packs_of_one_under_hydras_basic_launcher(watch: Watch, tmp_path: Path) -> None:
    words = ["seed=0,1", "hydra/launcher=basic", "lora.use_dora=false,true"]
    assert say(*FAST, *words, f"output_dir={tmp_path}").code == 0
    assert len(watch.packs) == 4 and watch.most_packs == 1 and watch.most_bases == 1
    assert watch.nothing_is_alive()


@pytest.mark.slow
def test_after_memory_ran_out_in_mid_training(
    watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pack is gone before its halves are built, although an exception had its frames."""
    update = StackedPack.update

    def short(self: Any, lr: list[float]) -> Any:
        self.updates = getattr(self, "updates", 0) + 1
        if self.size > 1 and self.updates == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return update(self, lr)

    monkeypatch.setattr(StackedPack, "update", short)
    said = say(*FAST, "seed=0,1,2,3", f"output_dir={tmp_path}")
    assert said.code == 0, said.err
    told = [line for line in said.lines if "does not fit into memory" in line]
    assert told == [
        "a pack of 4 does not fit into memory; trying packs of 2",
        "a pack of 2 does not fit into memory; trying packs of 1",
        "a pack of 2 does not fit into memory; trying packs of 1",
    ]
    assert len(watch.packs) == 7 and watch.most_packs == 1
    assert len(watch.bases) == 1, "the base is kept"
    assert watch.nothing_is_alive()
    assert {r["plan"]["pack"]["size"] for r in records(tmp_path).values()} == {1}
    assert {r["status"] for r in records(tmp_path).values()} == {"finished"}
    packs = SweepFolder(tmp_path / "default").read().packs
    assert [len(pack.runs) for pack in packs] == [4, 2, 2, 1, 1, 1, 1]
    assert {pack.reason for pack in packs[1:]} == {"it does not fit into memory"}
    # The split is remembered: the folder's packs are those of one now.
    assert say(*FAST, "seed=0,1,2,3", f"output_dir={tmp_path}").code == 0


def test_a_run_alone_that_does_not_fit_fails_with_a_remedy(
    watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(self: StackedPack, lr: list[float]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(StackedPack, "update", short)
    said = say(*FAST, "seed=0", f"output_dir={tmp_path}")
    assert said.code == 1
    assert "use a smaller trainer.micro_batch_size or data.max_length" in said.err
    assert watch.nothing_is_alive()


@pytest.mark.parametrize(
    ("error", "is_short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublas"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_is_short(error: Exception, is_short: bool) -> None:
    assert machine.is_out_of_memory(error) is is_short
