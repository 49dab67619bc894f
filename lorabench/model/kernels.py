"""Which attention implementations a run can have here, and which of them repeat themselves."""

from __future__ import annotations

import re

from lorabench import nvidia, versions
from lorabench.config import Config

FLASH = ("flash_attention_2", "flash_attention_3")
PLAIN = ("sdpa", "eager", "flex_attention")
# ORG/NAME, a revision and a function, as transformers reads them.
HUB = re.compile(r"[\w.-]+/[\w.-]+(?P<revision>@[\w.-]+)?(:\w+)?")
KEY = "model.attn_implementation"


def errors(config: Config) -> list[str]:
    """What is wrong with the attention asked for, known without loading anything."""
    name, trainer = config.model.attn_implementation, config.trainer
    of_hub = HUB.fullmatch(name)
    found = []
    if "/" in name and not of_hub:
        found.append(f"{KEY}: a kernel of the Hub must be named ORG/NAME@REVISION; got {name}")
    if of_hub and versions.installed("kernels") is None:
        found.append(
            f"{KEY}: {name} needs kernels; kernels is not installed; pip install kernels, or use "
            f"{KEY}=sdpa"
        )
    if of_hub and not of_hub["revision"]:
        found.append(
            f"{KEY}: a kernel of the Hub is code that others can change, and must name its "
            f"revision; got {name}; use {name.partition(':')[0]}@REVISION"
        )
    if name not in PLAIN and not _may_be_cuda(trainer.device):
        found.append(
            f"{KEY}: {name} needs a CUDA device; trainer.device={trainer.device} has none; use "
            f"{KEY}=sdpa"
        )
    if trainer.deterministic and (of_hub or name == "flex_attention"):
        found.append(
            f"trainer.deterministic: true needs an attention that promises to repeat its sums; "
            f"{name} does not; use {KEY}=sdpa, or trainer.deterministic=false"
        )
    return found


def _may_be_cuda(device: str) -> bool:
    if device == "auto":
        return nvidia.driver() is not None
    return device.startswith("cuda")
