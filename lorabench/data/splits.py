"""Which example is in train, validation and test."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorabench.config import ConfigErrors, DataConfig, SourceConfig
from lorabench.data import conversations, sources, templates
from lorabench.data.examples import Collector, Example, Examples
from lorabench.data.hashes import split_hashes
from lorabench.data.references import check_references
from lorabench.data.templates import SPLITS, own_sources


@dataclass
class Splits:
    """The examples of a run, and what its reader should know about them."""

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
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
    - Skills keep the order in which they are made: the skills take turns.
    - An example without a completion is left out, and counted in the notes.
    - Of a conversation, the prompt is all that comes before the last turn that is trained on; of a
      text, all of it is the completion, and its split is decided by its hash.

    Raises:
        ConfigErrors: What `check` finds, a dataset that does not load, rows of another format, a
            source that changes while it is read, an empty set.
    """
    if errors := sources.check(cfg):
        raise ConfigErrors(errors)
    notes: list[str] = []
    read: dict[str, Any]
    if cfg.source == "skills":
        read = {split: sources.skill_examples(cfg, split) for split in SPLITS}
        sets = {}
        for split in SPLITS:
            rows = Rows()
            for pair in read[split]:
                rows.add(*pair)
            sets[split] = rows.examples(np.arange(len(rows)))
        prompts = {split: _hashes(example.prompt for example in sets[split]) for split in SPLITS}
    else:
        sets, prompts, read = _read(cfg, notes)
    scored = ("validation", "test")
    notes += check_references(cfg, {s: (one.completion for one in sets[s]) for s in scored})
    train_prompts = prompts["train"]
    for split in ("validation", "test"):
        shared = int(np.isin(prompts[split], train_prompts).sum())
        if shared:
            what = "texts" if cfg.format == "text" else "prompts"
            notes.append(
                f"data.{split}: {shared} of {len(sets[split])} {what} are in the training set "
                f"too, so its scores overstate how well a run does on new {what}; remove them from "
                f"one of the two{_split_off(cfg, split)}"
            )
    return Splits(**sets, notes=notes, hashes=split_hashes(cfg, read))


def _split_off(cfg: DataConfig, split: str) -> str:
    """Return what else keeps the prompts of a set out of train."""
    if getattr(cfg, split).path is not None:
        return f", or take the set from train: data.{split}.path=null"
    return "" if cfg.split_by is None else ", or split by prompt: data.split_by=null"


class Rows:
    """What is read from one source: the rows as a table, and three numbers of each."""

    def __init__(self) -> None:
        self._rows = Collector()
        self._ids, self._prompts, self._places = array("Q"), array("Q"), array("d")

    def __len__(self) -> int:
        return len(self._ids)

    def add(
        self, prompt: str, completion: str, conversation: str = "", group: str | None = None
    ) -> None:
        """Add an example; equal groups will be in the same split (None: the prompt)."""
        self._rows.add(prompt, completion, conversation)
        self._ids.append(_id(prompt, completion, conversation, 0))
        self._prompts.append(_number(prompt or completion))
        self._places.append(_place(prompt if group is None else group))

    def finish(self) -> None:
        """Nothing is added any more."""
        self.table = self._rows.table()
        self.places, self.prompts = np.array(self._places), np.array(self._prompts, np.uint64)

    def examples(self, rows: np.ndarray) -> Examples:
        """Return some of the rows, with ids that occur once among them."""
        if not hasattr(self, "table"):
            self.finish()
        ids = np.array(self._ids, np.uint64)[rows]
        _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        seen: Counter[int] = Counter()
        for at in np.flatnonzero(counts[inverse] > 1):
            repeated = seen[first := int(ids[at])]
            seen[first] += 1
            if repeated:
                prompt, completion, conversation, _ = (
                    column[int(rows[at])].as_py() for column in self.table.columns
                )
                ids[at] = _id(prompt, completion, conversation, repeated)
        return Examples(self.table, rows, ids)


def _read(
    cfg: DataConfig, notes: list[str]
) -> tuple[dict[str, Examples], dict[str, np.ndarray], dict[str, Any]]:
    """Return the sets, the hashes of their prompts, and what identifies each source."""
    found: dict[str, Rows] = {}
    read: dict[str, Any] = {}
    for split, source in own_sources(cfg).items():
        found[split], read[split] = _rows(cfg, split, source, notes)
    missing = [split for split in SPLITS if split not in found]
    side = _sides(cfg, found["train"].places, missing)
    sets, prompts = {}, {}
    for number, split in enumerate(SPLITS):
        rows = found.get(split, found["train"])
        is_apart = split in found and split != "train"
        chosen = np.arange(len(rows)) if is_apart else np.flatnonzero(side == number)
        all_of_it = rows.examples(chosen)
        wanted, there = getattr(cfg, f"num_{split}"), len(chosen)
        # In the order of the ids, which is random but fixed: the first N are a fair sample.
        order = np.argsort(all_of_it.id_numbers, kind="stable")[:wanted]
        sets[split] = Examples(rows.table, chosen[order], all_of_it.id_numbers[order])
        prompts[split] = rows.prompts[chosen[order]]
        if wanted is not None and wanted > there:
            notes.append(
                f"data.{split}: has {there} examples, fewer than data.num_{split}={wanted} "
                f"asks for; all are used; give more, or set data.num_{split}={there}"
            )
    return sets, prompts, read


def _rows(cfg: DataConfig, split: str, source: SourceConfig, notes: list[str]) -> tuple[Rows, Any]:
    """Return the examples of one source, and what identifies it."""
    key = f"data.{split}.path"
    reading = sources.read(cfg, split)
    if source.revision is None and sources.is_remote(cfg.source, source):
        notes.append(
            f"data.{split}: '{source.path}' is read at its newest commit, so its content "
            f"may change between runs; set data.{split}.revision to a commit"
        )
    make = _maker(cfg, split)
    rows, num_empty = Rows(), 0
    bad: list[str] = []
    for row in reading:
        try:
            prompt, completion, conversation = make(row.columns)
        except ValueError as error:
            bad.append(f"{row.where}: {error}")
            continue
        if not completion.strip():
            num_empty += 1
            continue
        by = cfg.split_by if split == "train" else None
        rows.add(prompt, completion, conversation, None if by is None else str(row.columns[by]))
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise ConfigErrors(
            f"{key}: every row must hold a conversation with data.format={cfg.format}; "
            f"{bad[0]}{more}; correct or remove the row"
        )
    if num_empty:
        total = len(rows) + num_empty
        why = {"prompt_completion": "their completion is empty", "text": "their text is empty"}.get(
            cfg.format, "no assistant turn of theirs is trained on"
        )
        notes.append(
            f"data.{split}: {num_empty} of {total} examples are left out because {why}; fill it "
            "in, or remove them"
        )
    if not len(rows):
        raise ConfigErrors(
            f"{key}: must hold at least one example with a completion; '{source.path}' holds "
            "none; fill the completions in, or give another path"
        )
    rows.finish()
    return rows, reading.identity


def _maker(cfg: DataConfig, split: str) -> Any:
    """Return what makes prompt, completion and conversation of a row, or raises ValueError."""
    if cfg.format in templates.CONVERSATIONS:
        return lambda row: conversations.as_example(conversations.conversation(row, cfg))
    parts = [
        templates.parse(templates.template_of(cfg, split, part)[1])
        for part in templates.PARTS[cfg.format]
    ]
    if cfg.format == "text":
        return lambda row: ("", templates.render(parts[0], row), "")
    return lambda row: (templates.render(parts[0], row), templates.render(parts[1], row), "")


def _sides(cfg: DataConfig, places: np.ndarray, missing: list[str]) -> np.ndarray:
    """Return the set that each row of train belongs to: its number in SPLITS.

    A group's place depends on its own hash alone, so that more rows move no other group. The only
    exception is the one group that is taken where none qualifies.
    """
    side = np.zeros(len(places), np.int8)
    if "test" in missing:
        low = places < cfg.test_fraction
        side[low if low.any() else places == places.min()] = SPLITS.index("test")
    if "validation" in missing:
        high = places >= 1 - cfg.validation_fraction
        side[high if high.any() else places == places.max()] = SPLITS.index("validation")
    if {SPLITS[number] for number in np.unique(side)} != {"train", *missing}:
        by = f"column '{cfg.split_by}'" if cfg.split_by else "the prompt"
        paths = " and ".join(f"data.{split}.path" for split in missing)
        raise ConfigErrors(
            f"data.train.path: must hold enough examples to take {' and '.join(missing)} from "
            f"them; got {len(np.unique(places))} distinct values of {by} in '{cfg.train.path}'; "
            f"give more, or {paths}"
        )
    return side


def _place(group: str) -> float:
    """Return a number in [0, 1) that depends on the group alone: its hash as a fraction."""
    return _number(f"split\0{group}") / 2**64


def _id(prompt: str, completion: str, conversation: str, repeated: int) -> int:
    """Return an id that depends on content alone, and on how often it came before in its set."""
    what = [conversation] if conversation else [prompt, completion]
    return _number(json.dumps([*what, repeated]))


def _hashes(texts: Any) -> np.ndarray:
    return np.array([_number(text) for text in texts], np.uint64)


def _number(text: str) -> int:
    """Return the first 64 bits of a text's sha256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
