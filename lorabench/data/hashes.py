"""The content hash of each split: sha256 of what decides its examples.

train   its source, templates and num_train; where a set without a path is taken out of it, also
        split_by and that set's fraction. A run id needs no more than this.
others  their own source, templates and num_*; where taken from train, what decides train's split.
mixture in place of train's source: of each of its sources what identifies it, its templates, its
        num and weight. Names decide nothing.

A source is, of skills and gym, the generated examples; of jsonl, the sha256 of the file, wherever
it lies; of hub, id, subset, split and revision, or subset, split and the files of a local folder;
of path, the kind of the files and the sha256 of each in order, wherever they lie, or as of hub.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lorabench.config import ConfigErrors, DataConfig, parts
from lorabench.data import mixing, sources, templates
from lorabench.data.templates import SPLITS, own_sources

# Of rendering, splitting and ordering, and of how prompts get BOS; part of every content hash.
RULES_VERSION = 2


def content_hashes(cfg: DataConfig) -> dict[str, str]:
    """Return the content hash of each split, without loading a dataset.

    That of a named set has its config key below `data`, such as `tests.NAME`.

    Raises:
        ConfigErrors: What `check` finds.
    """
    if errors := mixing.check(cfg):
        raise ConfigErrors(errors)
    read: dict[str, Any] = {}
    for name, view in mixing.named_views(cfg).items():
        read[name] = sources.identity(view.source, view.train)
    if cfg.source in sources.GENERATED:
        read |= {split: sources.generated(cfg, split) for split in SPLITS}
        return split_hashes(cfg, read)
    for split, own in own_sources(cfg).items():
        read[split] = sources.identity(cfg.source, own)
    if cfg.mixture:
        read["train"] = [
            sources.identity(view.source, view.train) for view in parts.by_source(cfg).values()
        ]
    return split_hashes(cfg, read)


def split_hashes(cfg: DataConfig, read: dict[str, Any]) -> dict[str, str]:
    """Return the content hashes, given what was read for each split that has its own source.

    Args:
        read: by split, named sets among them; of a mixture, `train` is a list.
    """
    facts: dict[str, dict[str, Any]] = {}
    named = mixing.named_views(cfg)
    for name, view in named.items():
        facts[name] = {"rules": RULES_VERSION, "source": view.source, "content": read[name]}
        num = parts.named_sets(cfg)[name].num
        facts[name] |= _format(view, "train") | {"num": num}
    for split in (split for split in SPLITS if split in read):
        facts[split] = {"rules": RULES_VERSION, "source": cfg.source, "content": read[split]}
        if split == "train" and cfg.mixture:
            facts[split]["content"] = _of_mixture(cfg, read[split])
        elif cfg.source not in sources.GENERATED:
            facts[split] |= _format(cfg, split)
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
    return {
        parts.key_of(split): _hash(json.dumps(facts[split], sort_keys=True))
        for split in (*SPLITS, *named)
    }


def _of_mixture(cfg: DataConfig, read: list[Any]) -> list[dict[str, Any]]:
    """What decides the examples of each source of a mixture."""
    return [
        {"content": content, **_format(view, "train"), "num": one.num, "weight": one.weight}
        for content, view, one in zip(read, parts.by_source(cfg).values(), cfg.mixture, strict=True)
    ]


def _format(cfg: DataConfig, split: str) -> dict[str, Any]:
    """What decides how a row becomes an example."""
    if cfg.format in templates.CONVERSATIONS:
        keys = ("format", "messages", "system", "merge_turns", "loss_on", "tools")
        return {key: getattr(cfg, key) for key in keys}
    texts = [
        _template(templates.template_of(cfg, split, part)[1])
        for part in templates.PARTS[cfg.format]
    ]
    return {"templates": texts} | ({"format": cfg.format} if cfg.format == "text" else {})


def _template(text: str) -> Any:
    """Return what stands for a template: its text, which used to be all of it, and its rules."""
    return {"text": text, "optional": 1} if "[[" in text else text


def combined(hashes: dict[str, str]) -> str:
    """Return one hash for all splits."""
    return _hash(json.dumps(hashes, sort_keys=True))


def content_hash(cfg: DataConfig) -> str:
    """Return one hash for all splits, as `content_hashes`."""
    return combined(content_hashes(cfg))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
