"""The machine a process runs on: device, threads, determinism, memory."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import time
from pathlib import Path

from lorabench import nvidia
from lorabench.config import Config, ConfigErrors

CGROUPS = Path("/sys/fs/cgroup")


def choose_device(wanted: str) -> str:
    """`auto` becomes what this machine has; anything else must be there.

    Raises:
        ConfigErrors: it is not there, or torch cannot use the GPU that is.
    """
    import torch

    if errors := check_device(wanted):
        raise ConfigErrors(errors)
    if wanted == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    return wanted


def check_device(wanted: str) -> list[str]:
    """What is wrong with trainer.device; imports torch only to look for an accelerator."""
    if wanted == "cpu" or (wanted == "auto" and nvidia.driver() is None):
        return []
    import torch

    if not wanted.startswith("mps") and not torch.cuda.is_available():
        errors = nvidia.unusable(wanted)
        if errors or wanted == "auto":
            return errors
    kind, _, index = wanted.partition(":")
    if kind == "mps":
        there, count = torch.backends.mps.is_available(), 1
    else:
        there, count = torch.cuda.is_available(), torch.cuda.device_count()
    if there and int(index or 0) < count:
        return []
    return [f"trainer.device: must be on this machine; got {wanted}; use auto or cpu"]


def configure_torch(config: Config) -> None:
    """Threads and determinism of this process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if config.trainer.deterministic:  # transformers hands it on to FlashAttention's backward pass
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    else:  # of a run before in this process
        os.environ.pop("FLASH_ATTENTION_DETERMINISTIC", None)
    import torch

    trainer = config.trainer
    if trainer.num_threads is not None and torch.get_num_threads() != trainer.num_threads:
        torch.set_num_threads(trainer.num_threads)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    torch.use_deterministic_algorithms(trainer.deterministic)
    # Filling new tensors finds reads of memory nobody wrote: for debugging, it changes no bits.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = trainer.allow_tf32
    torch.backends.cudnn.allow_tf32 = trainer.allow_tf32
    # It builds a plan for every new shape, seconds in all where each batch has other lengths.
    torch.backends.cuda.enable_cudnn_sdp(False)


class PeakMemory:
    """The most memory a run held: on the device, or of this process on a CPU."""

    def __init__(self, device: str):
        import torch

        self.device = device
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # Linux: forget the high-water mark of the runs before.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        import torch

        if self.device.startswith("cuda"):
            return int(torch.cuda.max_memory_allocated(self.device))
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.partition("VmHWM:")[2].split()[0]) * 1024
        except (OSError, IndexError):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if os.uname().sysname == "Darwin" else peak * 1024


def free_memory(device: str) -> int:
    """Bytes a pack may plan with: most of a GPU's free memory, half of what a CPU has left."""
    import torch

    if device.startswith("cuda"):
        return int(0.85 * torch.cuda.mem_get_info(device)[0])
    return available_memory() // 2


def total_memory(device: str) -> int:
    """Bytes of memory that a device has; of a host, no more than its control group may take."""
    import psutil
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[1])
    limits = [most for most, _ in _groups()]
    return min([psutil.virtual_memory().total, *limits])


def describe(device: str) -> str:
    """Return the device's name and its free memory, of how much, for people."""
    import psutil
    import torch

    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        name = f"{device}, {torch.cuda.get_device_name(device)}"
    else:
        free, total = available_memory(), psutil.virtual_memory().total
        name = f"{device}, {torch.get_num_threads()} threads" if device == "cpu" else device
    return f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def available_memory() -> int:
    """Bytes of the host's memory that this process may still take, its control group considered."""
    import psutil

    left = [max(0, most - taken) for most, taken in _groups()]
    return min([psutil.virtual_memory().available, *left])


def resident_memory() -> int:
    """Bytes of memory that this process holds."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _groups() -> list[tuple[int, int]]:
    """Limit of each control group around this process, and what is taken: containers, Slurm."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, kinds, name = line.split(":", 2)
        if kinds == "":  # version 2
            root, limit, used, cache = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in kinds.split(","):
            root, limit, used = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        place = root / name.lstrip("/")
        for folder in [place, *place.parents]:
            if not folder.is_relative_to(root):
                break
            try:
                most = int((folder / limit).read_text())
                counts = (folder / "memory.stat").read_text()
                free = int(counts.partition(f"\n{cache} ")[2].split()[0])
                taken = int((folder / used).read_text()) - free
            except (OSError, ValueError, IndexError):  # no limit ("max"), or not this machine's
                continue
            found.append((most, taken))
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a device or on the host."""
    import torch

    text = str(error)
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (
            isinstance(error, RuntimeError)
            and any(
                told in text
                for told in ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")
            )
        )
    )


def release_memory() -> None:
    """Give memory that torch keeps for later back to the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@functools.cache
def matmul_flops() -> float:
    """Matrix-multiplication FLOPs per second of the device that will train, measured once."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(1024, 1024, device=device)
    rates = []
    for _ in range(4):
        begun = time.perf_counter()
        (a @ a).sum().item()
        rates.append(2 * 1024**3 / (time.perf_counter() - begun))
    return max(rates)
