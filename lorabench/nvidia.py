"""Why torch cannot use the NVIDIA device of this machine, and which wheels its driver runs."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

DRIVER_FILE = Path("/proc/driver/nvidia/version")
DEVICES = Path("/dev")
UNKNOWN = "of unknown version"
INDEX = "https://download.pytorch.org/whl/"
# The least driver of each index of wheels, newest first, as in docs/install.md. CUDA 12 runs on
# every driver since 525, CUDA 13 since 580 ("minor version compatibility"). Source:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html, table 1, and
# for 12.8 https://docs.nvidia.com/cuda/archive/12.8.0/cuda-toolkit-release-notes, table 3.
WHEELS = (("cu130", (580, 65)), ("cu128", (570, 26)), ("cu126", (525, 60)))


@functools.cache
def driver() -> str | None:
    """Return the version of the driver of an NVIDIA device that this process can see, or None.

    A container without the device shows its host's driver too: that is none.
    """
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
            if found := re.match(r"\d+[\d.]*", done.stdout):
                return found[0]
        except (OSError, subprocess.SubprocessError):  # it finds no device, or hangs on a sick one
            pass
    if not any(DEVICES.glob("nvidia[0-9]*")):
        return None
    try:
        found = re.search(r"\s(\d{3,}\.[\d.]+)\s", DRIVER_FILE.read_text())
    except OSError:
        found = None
    return found[1] if found else UNKNOWN


def wheels(version: str) -> str | None:
    """Return the newest index of torch's wheels that a driver runs; None: it is too old for any."""
    if version == UNKNOWN:
        return WHEELS[-1][0]
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return next((name for name, least in WHEELS if numbers >= least), None)


def unusable(wanted: str) -> list[str]:
    """Refuse to go without an NVIDIA device that is there; nothing where there is none.

    Args:
        wanted: trainer.device.
    """
    version = driver()
    if version is None:
        return []
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    law = (
        f"trainer.device: must be a device that torch can use; got {wanted}: an NVIDIA GPU with "
        f"driver {version}, and torch {torch.__version__}, {built}"
    )
    index = wheels(version)
    if index is None:
        oldest = ".".join(map(str, WHEELS[-1][1]))
        return [f"{law}; use a driver of {oldest} or newer, or set trainer.device=cpu"]
    major = (torch.version.cuda or "").partition(".")[0]
    if major and int(major) <= int(index[2:4]):  # this torch runs on this driver
        return [
            f"{law}, cannot open it; check `nvidia-smi`, CUDA_VISIBLE_DEVICES and the rights on "
            f"/dev/nvidia*, or set trainer.device=cpu"
        ]
    return [
        f"{law}; use `pip install --force-reinstall torch --index-url {INDEX}{index}`, or set "
        f"trainer.device=cpu"
    ]
