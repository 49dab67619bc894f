"""docs/config-reference.md: current, complete, and honest about which keys are in an id."""

from __future__ import annotations

import dataclasses
import re
from operator import attrgetter

import pytest
from conftest import composed

from lorabench import identity
from lorabench.config import keys, reference, schema

CONTENTS = dict.fromkeys(("hub", "revision", "weights", "tokenizer", "train", "validation"), "0")


def test_the_committed_page_is_current() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.text(), "run `make docs`"


def test_every_key_has_a_row_with_a_meaning() -> None:
    sections = re.split(r"^## ", reference.text(), flags=re.M)
    described = set()
    for section in sections[1:]:
        title = section.partition("\n")[0]
        if title == "`data.mixture[0]`":  # an element: its keys are no keys of the config
            continue
        groups = [one for one in re.findall(r"`([\w.]+)`", title) if ".NAME" not in one]
        for name, meaning in re.findall(
            r"^\| `([\w.]+)` \| `[^`]+` \| [^|]+ \| ([^|]*) \|", section, flags=re.M
        ):
            assert meaning.strip(), name
            shared = "," in title  # data.train, data.validation and data.test share a table
            described |= {f"{group}.{name}" for group in groups} if shared else {name}
    groups = {key.rpartition(".")[0] for key in keys()}
    assert described == {key for key in keys() if key not in groups}


def test_comments_are_those_of_the_source() -> None:
    @dataclasses.dataclass
    class Example:
        """A docstring with a # in it."""

        plain: int = 0  # of pages
        # A heading
        text: str = "# no comment"
        rest: list[str] = dataclasses.field(default_factory=lambda: ["a"])  # b | c

    assert reference.comments(Example) == {
        "plain": ("", "of pages"),
        "text": ("A heading", ""),
        "rest": ("", "b | c"),
    }


@pytest.mark.parametrize("group", ["model", "data", "lora", "trainer", "seeds"])
def test_a_key_is_said_to_be_in_the_run_id_where_it_is(group: str) -> None:
    config = composed()
    for neutral in identity.NEUTRAL:  # else a key that was added later is left out
        section, _, name = neutral.rpartition(".")
        if section:  # of the top level only start_from, which is there as a hash
            setattr(attrgetter(section)(config), name, "another value")
    there = identity.training(config, CONTENTS, {}, {}, ["a"], [], {"nll": "nll/1"})[group]
    for spec in dataclasses.fields(getattr(config, group)):
        if spec.name in ("validation", "test"):
            continue  # of the evaluation, as every key in them
        resolved = f"{group}.{spec.name}" in ("data.train", "data.labels", "model.revision")
        said = reference.part_of(f"{group}.{spec.name}") == "run"
        assert said == (spec.name in there and not resolved), spec.name


def test_names_of_groups_without_an_id_are_groups() -> None:
    known = {spec.name for spec in dataclasses.fields(schema.Config)}
    assert {*reference.NO_ID, *reference.RESOLVED_GROUPS} <= known
    for group, names in (*identity.RESOLVED.items(), *identity.NOT_DECIDING.items()):
        assert {f"{group}.{name}" for name in names} <= set(keys())
