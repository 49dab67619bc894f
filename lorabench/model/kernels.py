"""Which attention implementations a run can have here, and which of them repeat themselves."""

from __future__ import annotations

import re
from typing import Any

from packaging.version import Version

from lorabench import nvidia, versions
from lorabench.config import Config, ConfigErrors

PLAIN = ("sdpa", "eager")  # what torch has everywhere, and what transformers has for each base
# ORG/NAME, a commit and a function, as transformers reads them.
HUB = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}(:\w+)?")
KEY = "model.attn_implementation"
DETERMINISTIC = "2.4.1"  # of flash-attn: the first that can repeat its backward pass


def is_of_hub(name: str) -> bool:
    """Whether an implementation is a kernel of the Hub: code of others, run in this process."""
    return "/" in name


def errors(config: Config) -> list[str]:
    """What is wrong with the attention asked for, known without loading anything."""
    name, trainer = config.model.attn_implementation, config.trainer
    if name in PLAIN:
        return []
    found = _of_hub(config) if is_of_hub(name) else []
    if not _may_be_cuda(trainer.device):
        found.append(
            f"{KEY}: {name} trains on a CUDA device only; trainer.device={trainer.device} is none; "
            f"use {KEY}=sdpa, or eager where a base has no sdpa"
        )
    full = ("float32", "float64")
    if name != "flex_attention" and trainer.dtype in full and config.model.dtype in full:
        found.append(
            f"{KEY}: {name} computes in bfloat16; got trainer.dtype={trainer.dtype} and "
            f"model.dtype={config.model.dtype}; set trainer.dtype=bfloat16, or use {KEY}=sdpa"
        )
    if trainer.deterministic and (why := _varies(name)):
        found.append(
            f"trainer.deterministic: true needs an attention that repeats its sums; {why}; use "
            f"{KEY}=sdpa, or trainer.deterministic=false"
        )
    return found


def _of_hub(config: Config) -> list[str]:
    """Refuse a kernel that is not pinned, not allowed, or cannot be fetched."""
    name, found = config.model.attn_implementation, []
    if not HUB.fullmatch(name):
        found.append(
            f"{KEY}: a kernel of the Hub must be ORG/NAME@COMMIT or ORG/NAME@COMMIT:FUNCTION, with "
            f"the 40 hex digits of a commit, for branches and tags can move; got {name}"
        )
    if not config.model.allow_kernel_code:
        found.append(
            f"{KEY}: {name} is code that this process would download and run with your rights; "
            f"read it, then set model.allow_kernel_code=true, or use {KEY}=sdpa"
        )
    if versions.installed("kernels") is None:
        found.append(
            f"{KEY}: {name} needs kernels; kernels is not installed; pip install kernels, or use "
            f"{KEY}=sdpa"
        )
    return found


def _varies(name: str) -> str | None:
    """The reason why a backward pass may give other bits each time; None where it repeats them.

    FlashAttention 2 repeats them if it is told to (`machine.configure_torch`).
    """
    if name == "flash_attention_2":
        have = versions.installed("flash-attn")
        if have is None or Version(have) >= Version(DETERMINISTIC):  # None is refused elsewhere
            return None
        return f"flash-attn {have} has none, {DETERMINISTIC} has"
    if name == "flash_attention_3":
        return "flash_attention_3 varies even if told not to (Dao-AILab/flash-attention#2244)"
    if name == "flex_attention":
        return "torch promises nothing of flex_attention's kernels"
    return f"nothing is known of {name}"


def misfit(built: Any, name: str) -> str | None:
    """Refuse an implementation that an architecture has not, or would exchange for another.

    Args:
        built: the model, with or without weights.
    """
    if name in PLAIN:  # of which transformers says so itself
        return None
    kind = type(built).__name__
    supports = {
        "flex_attention": "_supports_flex_attn",
        "flash_attention_2": "_supports_flash_attn",
        "flash_attention_3": "_supports_flash_attn",
    }.get(name)
    if supports is not None and not getattr(built, supports, False):
        return f"{KEY}: must be one that {kind} has; got {name}; set {KEY}=eager"
    own = getattr(built, "_compatible_flash_implementations", None)
    if own and name != "flex_attention" and name not in own:
        return (
            f"{KEY}: transformers would run {own[0]} for {kind} in place of {name}, which is "
            f"another's code that the config does not name; set {KEY}=eager"
        )
    return None


def must_be_here(name: str) -> None:
    """Refuse a FlashAttention that transformers cannot import.

    It would fetch a kernel of the Hub instead, and run that.
    """
    from transformers import utils

    found = {
        "flash_attention_2": utils.is_flash_attn_2_available,
        "flash_attention_3": utils.is_flash_attn_3_available,
    }.get(name)
    if found is not None and not found():
        raise ConfigErrors(
            f"{KEY}: {name} must be what transformers can import on this machine; it cannot; "
            f"install it for this GPU and torch, or use {KEY}=sdpa"
        )


def _may_be_cuda(device: str) -> bool:
    if device == "auto":
        return nvidia.driver() is not None
    return device.startswith("cuda")
