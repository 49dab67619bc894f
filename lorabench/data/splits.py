"""Which example is in train, validation and test, and the hash of them all."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lorabench.config import ConfigErrors, DataConfig
from lorabench.data import sources, templates
from lorabench.data.templates import SPLITS, own_sources

RULES_VERSION = 1  # of rendering, splitting and ordering; part of every content hash


class Example(NamedTuple):
    """What the model reads and what it should write."""

    prompt: str
    completion: str
    id: str  # 16 hex digits of the hash of both; a repetition within its set gets another


@dataclass
class Splits:
    """The examples of a run, and what its reader should know about them."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    notes: list[str] = field(default_factory=list)


def load(cfg: DataConfig) -> Splits:
    """The examples of all three sets.

    - A set without a path is taken from train: the values of `split_by` (or, without it, the
      prompts) are ordered by a hash, the first `test_fraction` of them are test, the last
      `validation_fraction` validation. Equal values stay together; every run, whatever its
      seeds, gets the same split; and each fraction may change without moving the other set.
    - Each set is in the order of its ids, which is random but fixed, so that its first N are a
      fair sample. `num_train`, `num_validation` and `num_test` keep the first N.
    - Skills keep the order in which they are made: the skills take turns.
    - An example without a completion is left out, and counted in the notes.

    Raises:
        ConfigErrors: what `check` finds, a dataset that does not load, an empty set.
    """
    if errors := sources.check(cfg):
        raise ConfigErrors(errors)
    notes: list[str] = []
    if cfg.source == "skills":
        sets = {split: _identified(sources.skill_examples(cfg, split)) for split in SPLITS}
    else:
        sets = _read(cfg, notes)
        for split in SPLITS:
            wanted, there = getattr(cfg, f"num_{split}"), len(sets[split])
            sets[split] = sorted(sets[split], key=lambda example: example.id)[:wanted]
            if wanted is not None and wanted > there:
                notes.append(f"{split}: only {there} examples; data.num_{split} asks for {wanted}")
    train_prompts = {example.prompt for example in sets["train"]}
    for split in ("validation", "test"):
        shared = sum(example.prompt in train_prompts for example in sets[split])
        if shared:
            notes.append(f"{split}: {shared} of {len(sets[split])} prompts are in train too")
    return Splits(**sets, notes=notes)


def _read(cfg: DataConfig, notes: list[str]) -> dict[str, list[Example]]:
    """The sets before they are ordered and capped."""
    own, groups = {}, []
    for split, source in own_sources(cfg).items():
        columns, _ = templates.columns_of(cfg, split)
        if cfg.source == "hub":
            rows: Iterable[dict[str, Any]] = sources.hub_rows(f"data.{split}.path", source, columns)
            if source.revision is None and not sources.local(source).is_dir():
                notes.append(
                    f"{split}: '{source.path}' has no data.{split}.revision; its content may change"
                )
        else:
            rows = (row for _, row, _ in sources.jsonl_rows(str(sources.local(source))) if row)
        parts = [
            templates.parse(templates.template_of(cfg, split, part)[1])
            for part in ("prompt", "completion")
        ]
        pairs, num_empty = [], 0
        for row in rows:
            prompt, completion = (templates.render(part, row) for part in parts)
            if not completion.strip():
                num_empty += 1
                continue
            pairs.append((prompt, completion))
            if split == "train":
                by = cfg.split_by
                groups.append(prompt if by is None else str(row[by]))
        if num_empty:
            notes.append(f"{split}: {num_empty} examples left out, their completion is empty")
        if not pairs:
            raise ConfigErrors(
                f"data.{split}.path: must hold at least one example with a "
                f"completion; '{source.path}' holds none"
            )
        own[split] = pairs
    missing = [split for split in SPLITS if split not in own]
    if missing:
        pairs = own["train"]
        sides = _sides(cfg, groups, missing)
        for split in ("train", *missing):
            own[split] = [pair for pair, side in zip(pairs, sides, strict=True) if side == split]
    return {split: _identified(own[split]) for split in SPLITS}


def _sides(cfg: DataConfig, groups: list[str], missing: list[str]) -> list[str]:
    """The set that each row of train belongs to, equal groups on the same side."""
    ordered = sorted(set(groups), key=lambda group: _hash(f"split\0{group}"))

    def number(split: str) -> int:
        fraction = getattr(cfg, f"{split}_fraction")
        return max(1, round(fraction * len(ordered))) if split in missing else 0

    num_test, num_validation = number("test"), number("validation")
    if num_test + num_validation >= len(ordered):
        by = f"column '{cfg.split_by}'" if cfg.split_by else "the prompt"
        paths = " and ".join(f"data.{split}.path" for split in missing)
        message = (
            f"data.train.path: must hold enough examples to take {' and '.join(missing)} from "
            f"them; got {len(ordered)} distinct values of {by} in '{cfg.train.path}'; give more, "
            f"or {paths}"
        )
        raise ConfigErrors(message)
    side = dict.fromkeys(ordered, "train")
    side.update(dict.fromkeys(ordered[:num_test], "test"))
    side.update(dict.fromkeys(ordered[len(ordered) - num_validation :], "validation"))
    return [side[group] for group in groups]


def _identified(pairs: Iterable[tuple[str, str]]) -> list[Example]:
    """Examples with ids that depend on content alone and occur once in the set."""
    seen: Counter[tuple[str, str]] = Counter()
    examples = []
    for pair in pairs:
        id = _hash(json.dumps([*pair, seen[pair]]))[:16]
        seen[pair] += 1
        examples.append(Example(*pair, id))
    return examples


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def content_hash(cfg: DataConfig) -> str:
    """sha256 of what decides the examples, without loading a dataset.

    Skills: the examples. jsonl: the bytes of the files, wherever they lie. hub: id, subset,
    split and revision, or the files of a local folder. With the last two, the templates and
    how the sets are split and capped. Nothing of tokens and metrics.

    Raises:
        ConfigErrors: what `check` finds.
    """
    if errors := sources.check(cfg):
        raise ConfigErrors(errors)
    facts: dict[str, Any] = {"rules": RULES_VERSION, "source": cfg.source}
    if cfg.source == "skills":
        facts |= {split: sources.skill_examples(cfg, split) for split in SPLITS}
    else:
        own = own_sources(cfg)
        for split in SPLITS:
            facts[f"num_{split}"] = getattr(cfg, f"num_{split}")
            if split not in own:
                facts["split_by"] = cfg.split_by
                facts[split] = getattr(cfg, f"{split}_fraction")
                continue
            source, path = own[split], sources.local(own[split])
            facts[split] = [
                templates.template_of(cfg, split, "prompt")[1],
                templates.template_of(cfg, split, "completion")[1],
            ]
            if cfg.source == "jsonl":
                facts[split] += [_file_hash(str(path), sources.stamp(path))]
            elif path.is_dir():
                facts[split] += [source.subset, source.split, _folder_hashes(path)]
            else:
                facts[split] += [source.subset, source.split, source.path, source.revision]
    return _hash(json.dumps(facts, sort_keys=True))


@lru_cache(maxsize=4096)
def _file_hash(path: str, stamp: tuple[int, int]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _folder_hashes(folder: Path) -> list[tuple[str, str]]:
    """Name and hash of every file in a dataset folder; datasets reads the split from the name."""
    files = sorted(
        (file.relative_to(folder).as_posix(), file) for file in folder.rglob("*") if file.is_file()
    )
    return [
        (name, _file_hash(str(file), sources.stamp(file)))
        for name, file in files
        if not any(part.startswith(".") for part in name.split("/"))
    ]
