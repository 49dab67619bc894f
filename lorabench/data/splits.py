"""Which example is in train, validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorabench.config import ConfigErrors, DataConfig, SourceConfig, parts
from lorabench.data import conversations, mixing, sources, templates
from lorabench.data.examples import Example, Examples
from lorabench.data.hashes import split_hashes
from lorabench.data.references import check_references
from lorabench.data.rows import Rows, hashes_of, identified
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
    named: dict[str, Sequence[Example]] = field(default_factory=dict)  # test sets beside test


def load(cfg: DataConfig) -> Splits:
    """Return the examples of all sets.

    - A set without a path is taken from train, by a hash of the value of `split_by` (or, without
      it, of the prompt) in [0, 1): below `test_fraction` it is test, from 1 - `validation_fraction`
      on it is validation. Equal values stay together; every run, whatever its seeds, gets the same
      split; more rows move none of the others; and each fraction may change without moving the
      other set. Where no value qualifies, the one nearest to that end is taken.
    - Each set is in the order of its ids, which is random but fixed, so that its first N are a
      fair sample. `num_train`, `num_validation` and `num_test` keep the first N.
    - The sources of a mixture are read one after the other, and each gives the first so many of its
      ids (`mixing.shares`). What follows, splits included, is done to all of them together.
    - A named test set is read by itself; its `num` keeps the first N.
    - Generated examples keep the order in which they are made: skills, or tasks, take turns.
    - An example without a completion is left out, and counted in the notes.
    - Of a conversation, the prompt is all that comes before the last turn that is trained on; of a
      text, all of it is the completion, and its split is decided by its hash.

    Raises:
        ConfigErrors: What `check` finds, a dataset that does not load, rows of another format, a
            source that changes while it is read, an empty set.
    """
    if errors := mixing.check(cfg):
        raise ConfigErrors(errors)
    notes: list[str] = []
    read: dict[str, Any]
    if cfg.source in sources.GENERATED:
        read = {split: sources.generated(cfg, split) for split in SPLITS}
        sets = {split: identified(read[split]) for split in SPLITS}
        prompts = {split: hashes_of(example.prompt for example in sets[split]) for split in SPLITS}
    else:
        sets, prompts, read = _read(cfg, notes)
    scored = ("validation", "test")
    notes += check_references(cfg, {s: (one.completion for one in sets[s]) for s in scored})
    named: dict[str, Sequence[Example]]
    named, theirs, read_too = _read_named(cfg, notes)
    for split, examples in ({name: sets[name] for name in SPLITS[1:]} | named).items():
        shared = int(np.isin((prompts | theirs)[split], prompts["train"]).sum())
        if shared:
            view = mixing.named_views(cfg).get(split, cfg)
            what = "texts" if view.format == "text" else "prompts"
            harm = (
                "it hides what training makes the base forget"
                if split == parts.RETENTION
                else f"its scores overstate how well a run does on new {what}"
            )
            notes.append(
                f"data.{parts.key_of(split)}: {shared} of {len(examples)} {what} are in the "
                f"training set too, so {harm}; remove them from one of the two"
                f"{_split_off(cfg, split)}"
            )
    return Splits(**sets, notes=notes, hashes=split_hashes(cfg, read | read_too), named=named)


def _split_off(cfg: DataConfig, split: str) -> str:
    """Return what else keeps the prompts of a set out of train."""
    if split not in SPLITS:
        return ""
    if getattr(cfg, split).path is not None:
        return f", or take the set from train: data.{split}.path=null"
    return "" if cfg.split_by is None else ", or split by prompt: data.split_by=null"


def _read(
    cfg: DataConfig, notes: list[str]
) -> tuple[dict[str, Examples], dict[str, np.ndarray], dict[str, Any]]:
    """Return the sets, the hashes of their prompts, and what identifies each source."""
    found: dict[str, Rows] = {}
    read: dict[str, Any] = {}
    for split, source in own_sources(cfg).items():
        found[split], read[split] = _rows(cfg, split, source, notes)
    if cfg.mixture:
        found["train"], read["train"] = _mixed(cfg, notes)
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
        sets[split] = Examples(rows.table, all_of_it.rows[order], all_of_it.id_numbers[order])
        prompts[split] = rows.prompts[chosen[order]]
        if wanted is not None and wanted > there:
            notes.append(
                f"data.{split}: has {there} examples, fewer than data.num_{split}={wanted} "
                f"asks for; all are used; give more, or set data.num_{split}={there}"
            )
    return sets, prompts, read


def _mixed(cfg: DataConfig, notes: list[str]) -> tuple[Rows, list[Any]]:
    """Return the examples of a mixture, and what identifies each of its sources."""
    found, read = [], []
    for i, (name, view) in enumerate(parts.by_source(cfg).items()):
        rows, identity = _part(view, f"data.mixture[{i}]", notes, name)
        found.append(rows)
        read.append(identity)
    there = [len(rows) for rows in found]
    counts = mixing.shares(cfg.mixture, there)
    for i, (one, count) in enumerate(zip(cfg.mixture, there, strict=True)):
        if one.num is not None and one.num > count:
            notes.append(_too_few(f"data.mixture[{i}]", count, f"num={one.num}"))
    told = [
        f"{count} of {have} examples of {name}"
        for name, count, have in zip(parts.source_names(cfg), counts, there, strict=True)
    ]
    notes.append(f"data.mixture: {', '.join(told)}")
    chosen = [rows.first(count)[1] for rows, count in zip(found, counts, strict=True)]
    return Rows.joined(list(zip(found, chosen, strict=True))), read


def _read_named(
    cfg: DataConfig, notes: list[str]
) -> tuple[dict[str, Sequence[Example]], dict[str, np.ndarray], dict[str, Any]]:
    """Return the named test sets as `_read` returns the others."""
    sets: dict[str, Sequence[Example]] = {}
    prompts, read = {}, {}
    for name, view in mixing.named_views(cfg).items():
        key, num = f"data.{parts.key_of(name)}", parts.named_sets(cfg)[name].num
        rows, read[name] = _part(view, key, notes)
        sets[name], order = rows.first(num)
        prompts[name] = rows.prompts[order]
        if num is not None and num > len(rows):
            notes.append(_too_few(key, len(rows), f"num={num}"))
    return sets, prompts, read


def _part(view: DataConfig, key: str, notes: list[str], name: str = "") -> tuple[Rows, Any]:
    """Return the examples of a part that is `train` of its own config, and what identifies it."""
    told: list[str] = []
    with mixing.errors_as(key):
        rows, identity = _rows(view, "train", view.train, told, name)
    notes += [mixing.told_as(note, key) for note in told]
    return rows, identity


def _too_few(key: str, there: int, asked: str) -> str:
    return f"{key}: has {there} examples, fewer than {asked} asks for; all are used"


def _rows(
    cfg: DataConfig, split: str, source: SourceConfig, notes: list[str], name: str = ""
) -> tuple[Rows, Any]:
    """Return the examples of one source, and what identifies it.

    Args:
        name: of the source, in a mixture.
    """
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
        group = None if by is None else str(row.columns[by])
        if by is None and cfg.format == "text":
            group = completion  # a text has no prompt
        rows.add(prompt, completion, conversation, group, name)
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
    texts = [
        templates.parse(templates.template_of(cfg, split, part)[1])
        for part in templates.PARTS[cfg.format]
    ]
    if cfg.format == "text":
        return lambda row: ("", templates.render(texts[0], row), "")
    return lambda row: (templates.render(texts[0], row), templates.render(texts[1], row), "")


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
        key = "data.mixture" if cfg.mixture else "data.train.path"
        where = ", ".join(parts.source_names(cfg)) or cfg.train.path
        raise ConfigErrors(
            f"{key}: must hold enough examples to take {' and '.join(missing)} from "
            f"them; got {len(np.unique(places))} distinct values of {by} in '{where}'; "
            f"give more, or {paths}"
        )
    return side
