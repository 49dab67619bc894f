"""Which PEFT, transformers and torch are installed, and what would need newer ones.

Reads the metadata of installed packages, so that nothing heavy is imported.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from lorabench.config import Config

SHOWN = ("peft", "transformers", "torch")
# What some options need besides: key, value, package, least version, and what does without it.
# None: the least version is the one lorabench itself requires.
OPTIONS = (
    (
        "model.attn_implementation",
        "flash_attention_2",
        "flash-attn",
        "2.3.3",  # transformers.utils.is_flash_attn_2_available
        "model.attn_implementation=sdpa",
    ),
    (
        "model.attn_implementation",
        "flash_attention_3",
        "flash-attn-3",
        "3.0.0b1",
        "model.attn_implementation=sdpa",
    ),
    ("data.source", "hub", "datasets", None, "data=jsonl"),
    ("tracker.kind", "wandb", "wandb", None, "tracker=none"),
    ("tracker.kind", "trackio", "trackio", "0.43", "tracker=none"),
    ("tracker.kind", "tensorboard", "tensorboard", "2.19", "tracker=none"),
)
EXPERTS = Requirement("peft>=0.20")  # earlier ones train their adapters and cannot load them again


@lru_cache
def installed(package: str) -> str | None:
    """Its version, or None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def shown() -> dict[str, str | None]:
    """The versions a plan names."""
    return {package: installed(package) for package in SHOWN}


@lru_cache
def _required() -> dict[str, Requirement]:
    """What lorabench's own metadata (pyproject.toml) asks for; empty where it is not installed."""
    try:
        lines = metadata.requires("lorabench") or []
    except metadata.PackageNotFoundError:
        return {}
    found = [Requirement(line) for line in lines]
    return {one.name: one for one in found if one.marker is None}


def check(config: Config) -> list[str]:
    """What the installed packages are too old for: every run, and this run's options."""
    errors = []
    for package in SHOWN:
        wanted, have = _required().get(package), installed(package)
        if wanted is not None and not _fits(have, wanted):
            errors.append(
                f"versions: lorabench needs {wanted}; {_has(package, have)}; pip install '{wanted}'"
            )
    for key, value, package, least, instead in OPTIONS:
        group, _, name = key.partition(".")
        if getattr(getattr(config, group), name) != value:
            continue
        wanted = Requirement(f"{package}>={least}") if least else _required().get(package)
        have = installed(package)
        if wanted is not None and not _fits(have, wanted):
            errors.append(
                f"{key}: {value} needs {wanted}; {_has(package, have)}; pip install '{wanted}', "
                f"or use {instead}"
            )
    return errors


def too_old_for_experts() -> str | None:
    """What a base with routed experts lacks, beside what every run needs; None where nothing."""
    have = installed("peft")
    if _fits(have, EXPERTS):
        return None
    return f"routed experts need {EXPERTS}; {_has('peft', have)}; pip install '{EXPERTS}'"


def _fits(have: str | None, wanted: Requirement) -> bool:
    return have is not None and wanted.specifier.contains(have, prereleases=True)


def _has(package: str, have: str | None) -> str:
    return f"{have} is installed" if have else f"{package} is not installed"


def unknown_architecture(content: dict[str, Any], known: Any) -> str | None:
    """Why the installed transformers cannot build a checkpoint; None where it can.

    Args:
        content: the checkpoint's config.json.
        known: the model types of the installed transformers.
    """
    model_type, have = content.get("model_type"), installed("transformers")
    auto_map = content.get("auto_map")
    if model_type in known or (model_type is None and not auto_map):
        return None
    law = f"transformers {have} does not know model_type '{model_type}'"
    if auto_map:
        return (
            f"{law}, and lorabench runs no code that a checkpoint brings along (config.json has "
            f"auto_map={auto_map}); use a version of transformers that has it, or another base"
        )
    saved = content.get("transformers_version")
    if saved and have and _newer(saved, have):
        return (
            f"{law}; the checkpoint was saved with {saved}; pip install -U 'transformers>={saved}'"
        )
    return f"{law}; use a newer transformers that has it, or correct model_type in its config.json"


def _newer(one: str, other: str) -> bool:
    try:
        return Version(one) > Version(re.sub(r"\+.*", "", other))
    except InvalidVersion:
        return False
