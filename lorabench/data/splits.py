"""Which example is in train, validation and test."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lorabench.config import ConfigErrors, DataConfig
from lorabench.data import sources, templates
from lorabench.data.hashes import split_hashes
from lorabench.data.templates import SPLITS, own_sources


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
    # The content hash of each split, of the bytes that these examples were read from.
    hashes: dict[str, str] = field(default_factory=dict)


def load(cfg: DataConfig) -> Splits:
    """Return the examples of all three sets.

    - A set without a path is taken from train, by a hash of the value of `split_by` (or, without
      it, of the prompt) in [0, 1): below `test_fraction` it is test, from 1 - `validation_fraction`
      on it is validation. Equal values stay together; every run, whatever its seeds, gets the same
      split; more rows move none of the others; and each fraction may change without moving the
      other set. Where no value qualifies, the one nearest to that end is taken.
    - Each set is in the order of its ids, which is random but fixed, so that its first N are a
      fair sample. `num_train`, `num_validation` and `num_test` keep the first N.
    - Generated examples keep the order in which they are made: skills, or tasks, take turns.
    - An example without a completion is left out, and counted in the notes.

    Raises:
        ConfigErrors: What `check` finds, a dataset that does not load, a source that changes while
            it is read, an empty set.
    """
    if errors := sources.check(cfg):
        raise ConfigErrors(errors)
    notes: list[str] = []
    read: dict[str, Any]
    if cfg.source in sources.GENERATED:
        read = {split: sources.generated(cfg, split) for split in SPLITS}
        sets = {split: _identified(read[split]) for split in SPLITS}
    else:
        sets, read = _read(cfg, notes)
        for split in SPLITS:
            wanted, there = getattr(cfg, f"num_{split}"), len(sets[split])
            sets[split] = sorted(sets[split], key=lambda example: example.id)[:wanted]
            if wanted is not None and wanted > there:
                notes.append(
                    f"data.{split}: has {there} examples, fewer than data.num_{split}={wanted} "
                    f"asks for; all are used; give more, or set data.num_{split}={there}"
                )
    train_prompts = {example.prompt for example in sets["train"]}
    for split in ("validation", "test"):
        shared = sum(example.prompt in train_prompts for example in sets[split])
        if shared:
            notes.append(
                f"data.{split}: {shared} of {len(sets[split])} prompts are in the training set "
                "too, so its scores overstate how well a run does on new prompts; remove them from "
                f"one of the two{_split_off(cfg, split)}"
            )
    return Splits(**sets, notes=notes, hashes=split_hashes(cfg, read))


def _split_off(cfg: DataConfig, split: str) -> str:
    """Return what else keeps the prompts of a set out of train."""
    if getattr(cfg, split).path is not None:
        return f", or take the set from train: data.{split}.path=null"
    return "" if cfg.split_by is None else ", or split by prompt: data.split_by=null"


def _read(cfg: DataConfig, notes: list[str]) -> tuple[dict[str, list[Example]], dict[str, Any]]:
    """Return the sets before they are ordered and capped, and what identifies each source."""
    own: dict[str, list[tuple[str, str]]] = {}
    read: dict[str, Any] = {}
    groups: list[str] = []
    for split, source in own_sources(cfg).items():
        key = f"data.{split}.path"
        columns, _ = templates.columns_of(cfg, split)
        if cfg.source == "hub":
            rows: Iterable[dict[str, Any]]
            rows, read[split] = sources.hub_rows(key, source, columns)
            if source.revision is None and not sources.local(source).is_dir():
                notes.append(
                    f"data.{split}: '{source.path}' is read at its newest commit, so its content "
                    f"may change between runs; set data.{split}.revision to a commit"
                )
        else:
            digest = hashlib.sha256()
            rows = sources.jsonl_columns(key, source, columns, digest)
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
        if cfg.source == "jsonl":
            read[split] = digest.hexdigest()
        if num_empty:
            total = len(pairs) + num_empty
            notes.append(
                f"data.{split}: {num_empty} of {total} examples are left out because their "
                "completion is empty; fill it in, or remove them"
            )
        if not pairs:
            raise ConfigErrors(
                f"{key}: must hold at least one example with a completion; '{source.path}' holds "
                "none; fill the completions in, or give another path"
            )
        own[split] = pairs
    missing = [split for split in SPLITS if split not in own]
    if missing:
        pairs = own["train"]
        side = _sides(cfg, set(groups), missing)
        for split in ("train", *missing):
            own[split] = [
                pair for pair, group in zip(pairs, groups, strict=True) if side[group] == split
            ]
    return {split: _identified(own[split]) for split in SPLITS}, read


def _sides(cfg: DataConfig, groups: set[str], missing: list[str]) -> dict[str, str]:
    """Return the set that each group of train belongs to.

    A group's place depends on its own hash alone, so that more rows move no other group. The only
    exception is the one group that is taken where none qualifies.
    """
    place = {group: _place(group) for group in groups}
    side = dict.fromkeys(groups, "train")
    if "test" in missing:
        chosen = [group for group in groups if place[group] < cfg.test_fraction]
        side.update(dict.fromkeys(chosen or [min(groups, key=place.__getitem__)], "test"))
    if "validation" in missing:
        chosen = [group for group in groups if place[group] >= 1 - cfg.validation_fraction]
        side.update(dict.fromkeys(chosen or [max(groups, key=place.__getitem__)], "validation"))
    if set(side.values()) != {"train", *missing}:
        by = f"column '{cfg.split_by}'" if cfg.split_by else "the prompt"
        paths = " and ".join(f"data.{split}.path" for split in missing)
        raise ConfigErrors(
            f"data.train.path: must hold enough examples to take {' and '.join(missing)} from "
            f"them; got {len(groups)} distinct values of {by} in '{cfg.train.path}'; give more, "
            f"or {paths}"
        )
    return side


def _place(group: str) -> float:
    """Return a number in [0, 1) that depends on the group alone: its hash as a fraction."""
    return int(_hash(f"split\0{group}")[:16], 16) / 2**64


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
