"""The content hash of each split: sha256 of what decides its examples.

train   its source, templates and num_train; where a set without a path is taken out of it, also
        split_by and that set's fraction. A run id needs no more than this.
others  their own source, templates and num_*; where taken from train, what decides train's split.

A source is, of skills and gym, the generated examples; of jsonl, the sha256 of the file, wherever
it lies; of hub, id, subset, split and revision, or subset, split and the files of a local folder.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lorabench.config import ConfigErrors, DataConfig
from lorabench.data import sources, templates
from lorabench.data.templates import SPLITS, own_sources
from lorabench.hashes import file_hash

# Of rendering, splitting and ordering, and of how prompts get BOS; part of every content hash.
RULES_VERSION = 2


def content_hashes(cfg: DataConfig) -> dict[str, str]:
    """Return the content hash of train, validation and test, without loading a dataset.

    Raises:
        ConfigErrors: What `check` finds.
    """
    if errors := sources.check(cfg):
        raise ConfigErrors(errors)
    if cfg.source in sources.GENERATED:
        return split_hashes(cfg, {split: sources.generated(cfg, split) for split in SPLITS})
    read: dict[str, Any] = {}
    for split, source in own_sources(cfg).items():
        is_file = cfg.source == "jsonl"
        read[split] = file_hash(sources.local(source)) if is_file else sources.hub_identity(source)
    return split_hashes(cfg, read)


def split_hashes(cfg: DataConfig, read: dict[str, Any]) -> dict[str, str]:
    """Return the content hashes, given what was read for each split that has its own source."""
    facts: dict[str, dict[str, Any]] = {}
    for split, content in read.items():
        facts[split] = {"rules": RULES_VERSION, "source": cfg.source, "content": content}
        if cfg.source not in sources.GENERATED:
            facts[split]["templates"] = [
                templates.template_of(cfg, split, part)[1] for part in ("prompt", "completion")
            ]
    missing = [split for split in SPLITS if split not in read]
    if missing:
        facts["train"] |= {
            "split_by": cfg.split_by,
            "fractions": {split: getattr(cfg, f"{split}_fraction") for split in missing},
        }
    for split in missing:
        facts[split] = {**facts["train"], "taken": split}
    if cfg.source not in sources.GENERATED:
        for split in SPLITS:
            facts[split]["num"] = getattr(cfg, f"num_{split}")
    return {split: _hash(json.dumps(facts[split], sort_keys=True)) for split in SPLITS}


def combined(hashes: dict[str, str]) -> str:
    """Return one hash for all three splits."""
    return _hash(json.dumps(hashes, sort_keys=True))


def content_hash(cfg: DataConfig) -> str:
    """Return one hash for all three splits, as `content_hashes`."""
    return combined(content_hashes(cfg))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
