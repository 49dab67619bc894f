"""A GPU that torch cannot use is no reason to train on the CPU without a word."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import say, untouched

from lorabench import machine, nvidia

SHORT = ["tracker=none", "trainer=smoke", "trainer.steps=1"]
INDEX = "https://download.pytorch.org/whl/"
CASES: dict[str, tuple[str, str | None, str]] = {
    "CPU build": ("580.95.05", None, f"--index-url {INDEX}cu130`, or set trainer.device=cpu"),
    "CPU build, driver of CUDA 12.8": ("570.124.06", None, f"--index-url {INDEX}cu128`"),
    "CPU build, driver of CUDA 12.4": ("550.54.15", None, f"--index-url {INDEX}cu126`"),
    "newer than the driver": ("570.124.06", "13.0", f"--index-url {INDEX}cu128`"),
    "no wheels": ("470.57.02", "12.6", "use a driver of 525.60 or newer, or set trainer.device"),
    "cannot be opened": ("580.95.05", "12.8", "check `nvidia-smi`, CUDA_VISIBLE_DEVICES and"),
    "newer by a minor version": ("580.95.05", "13.2", "check `nvidia-smi`, CUDA_VISIBLE_DEVICES"),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends an NVIDIA device with that driver, and a torch that was built otherwise."""

    def pretend(driver: str | None, cuda: str | None) -> None:
        monkeypatch.setattr(nvidia, "driver", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    return pretend


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_what_is_told_of_a_gpu_that_torch_cannot_use(wanted: str, case: str, gpu: Any) -> None:
    driver, cuda, remedy = CASES[case]
    gpu(driver, cuda)
    (line,) = machine.check_device(wanted)
    built = f"CUDA {cuda}" if cuda else "a CPU build"
    assert f"got {wanted}: an NVIDIA GPU with driver {driver}, and torch {torch.__version__}, " in (
        line
    )
    assert built in line and remedy in line
    assert machine.check_device("cpu") == []


def test_plan_and_train_refuse_and_cpu_overrides(gpu: Any, tmp_path: Path) -> None:
    gpu("570.124.06", None)
    words = [*SHORT, f"output_dir={tmp_path}"]
    for verb in ("plan", "train"):
        said = say(verb, *words)
        assert said.code == 2 and len(said.lines) == 1 and untouched(tmp_path)
        assert said.err.startswith("trainer.device: must be a device that torch can use; got auto")
    said = say("plan", *words, "trainer.device=cpu")
    assert said.code == 0 and "\ndevice    cpu, " in said.out


def test_a_device_that_is_not_there_is_refused(gpu: Any) -> None:
    gpu(None, None)
    assert machine.check_device("auto") == [] and machine.choose_device("auto") in ("cpu", "mps")
    assert machine.check_device("cuda") == [
        "trainer.device: must be on this machine; got cuda; use auto or cpu"
    ]


PROC = (
    "NVRM version: NVIDIA UNIX {}Kernel Module for x86_64  {}  Release Build  (dvs-builder@U16)\n"
    "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
)


@pytest.mark.parametrize(
    ("smi", "proc", "nodes", "expected"),
    [
        ("570.124.06\n570.124.06\n", None, 0, "570.124.06"),
        ("No devices were found\n", PROC.format("", "535.104.05"), 0, None),
        (None, PROC.format("Open ", "570.124.06"), 1, "570.124.06"),
        (None, PROC.format("", "535.104.05"), 2, "535.104.05"),
        (None, PROC.format("", "535.104.05"), 0, None),  # a container without the device
        (None, None, 0, None),
    ],
)
def test_the_driver_is_found(
    smi: str | None, proc: str | None, nodes: int, expected: str | None,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = "/usr/bin/nvidia-smi" if smi else None
    monkeypatch.setattr(nvidia.shutil, "which", lambda name: found)
    monkeypatch.setattr(nvidia.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=smi))
    (tmp_path / "nvidiactl").touch()
    for i in range(nodes):
        (tmp_path / f"nvidia{i}").touch()
    if proc:
        (tmp_path / "version").write_text(proc)
    monkeypatch.setattr(nvidia, "DEVICES", tmp_path)
    monkeypatch.setattr(nvidia, "DRIVER_FILE", tmp_path / "version")
    assert nvidia.driver.__wrapped__() == expected


def test_a_device_is_described_with_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    total = psutil.virtual_memory().total
    assert machine.describe("cpu").endswith(f" of {total / 1e9:.1f} GB free")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (78_000_000_000, 85_000_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert machine.describe("cuda:0") == "cuda:0, NVIDIA H100 80GB HBM3, 78.0 of 85.0 GB free"
