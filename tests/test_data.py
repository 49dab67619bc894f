"""The data room: references are json, datasets, hashlib and the zoo, called plainly."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from sources import jsonl, numbered, run_python, skills_config, texts, write

from lorabench import data
from lorabench.config import Config, ConfigErrors, DataConfig, SourceConfig, range_errors
from lorabench.config.parts import GENERATED
from lorabench.zoo import skills as zoo_skills

CONF = Path(__file__).parents[1] / "conf" / "data"


def test_import_and_check_are_light(tmp_path):
    path = write(tmp_path / "a.jsonl", numbered(100))
    code = (
        "import sys; from lorabench import data; from lorabench.config import *\n"
        f"cfg = DataConfig(name='a', source='jsonl', train=SourceConfig(path={path!r}))\n"
        "assert data.check(cfg) == []; data.content_hash(cfg)\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stderr


# What is read


def test_skills_are_the_zoos():
    splits = data.load(skills_config())
    assert texts(splits.train) == zoo_skills.examples(["rot13"], "train", 50)
    assert texts(splits.validation) == zoo_skills.examples(["rot13"], "validation", 10)
    assert texts(splits.test) == zoo_skills.examples(["rot13"], "test", 20)
    assert splits.notes == []


def test_values_are_those_of_the_file(tmp_path):
    """Datasets' own reader makes a datetime of the first and floats of the numbers."""
    rows = [
        {"prompt": "2020-01-01", "completion": 1, "other": [1]},
        {"prompt": "{prompt} {0} }{ \u2028 é\r", "completion": 2.5},
        {"prompt": "long", "completion": 123456789012345678901234567890},
    ]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    source = SourceConfig(path=str(path))
    cfg = jsonl(path, validation=source, test=source, prompt="{{Q}} {prompt}")
    expected = {("{Q} " + row["prompt"], str(row["completion"])) for row in rows}
    assert set(texts(data.load(cfg).train)) == expected


def test_templates_of_a_split_come_before_those_of_the_group(tmp_path):
    train = write(tmp_path / "a.jsonl", [{"q": i, "a": -i} for i in range(100)])
    test = SourceConfig(
        write(tmp_path / "b.jsonl", [{"question": "x", "answer": "y"}]),
        prompt="Q {question}", completion="{answer}",
    )  # fmt: skip
    splits = data.load(jsonl(train, test=test, prompt="Q {q}", completion="{a}"))
    assert texts(splits.test) == [("Q x", "y")]
    assert set(texts([*splits.train, *splits.validation])) == {
        (f"Q {i}", str(-i)) for i in range(100)
    }


def test_split_by_keeps_groups_together(tmp_path):
    rows = [{**row, "topic": i % 40} for i, row in enumerate(numbered(400))]
    cfg = jsonl(
        write(tmp_path / "a.jsonl", rows),
        split_by="topic",
        validation_fraction=0.1,
        test_fraction=0.2,
    )
    splits = data.load(cfg)
    topic = {row["prompt"]: row["topic"] for row in rows}
    sets = (splits.train, splits.validation, splits.test)
    sides = [{topic[example.prompt] for example in examples} for examples in sets]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert sum(map(len, sets)) == 400
    # by the rule as it is written down
    place = {t: place_of(str(t)) for t in range(40)}
    assert sides[2] == {t for t in range(40) if place[t] < 0.2}
    assert sides[1] == {t for t in range(40) if place[t] >= 0.9}
    assert all(sides)


def place_of(group):
    """The first 64 bits of sha256, as a fraction of their range."""
    digest = hashlib.sha256(b"split\0" + group.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@settings(deadline=None, max_examples=60)  # shared cores
@given(
    before=st.sets(st.integers(0, 400), min_size=3, max_size=60),
    more=st.sets(st.integers(0, 400), max_size=60),
    fractions=st.tuples(st.floats(0.02, 0.45), st.floats(0.02, 0.45)),
)
def test_more_rows_move_no_other_row(tmp_path_factory, before, more, fractions):
    """A split by rank moves examples from train to test whenever a line is added to the file."""
    folder = tmp_path_factory.mktemp("rows")
    test_fraction, validation_fraction = fractions

    def sides(numbers):
        rows = [{"prompt": f"p{n}", "completion": str(n)} for n in sorted(numbers)]
        cfg = jsonl(
            write(folder / "a.jsonl", rows),
            test_fraction=test_fraction,
            validation_fraction=validation_fraction,
        )
        try:
            splits = data.load(cfg)
        except ConfigErrors:  # nothing left for train
            return None
        return {
            example.prompt: name
            for name in ("train", "validation", "test")
            for example in getattr(splits, name)
        }

    def expected(numbers):
        place = {f"p{n}": place_of(f"p{n}") for n in numbers}
        found = {
            group: "test" if u < test_fraction
            else "validation" if u >= 1 - validation_fraction
            else "train"
            for group, u in place.items()
        }  # fmt: skip
        fallbacks = set()
        for name, nearest in (("test", min), ("validation", max)):
            if name not in found.values():
                fallbacks.add(nearest(place, key=place.get))
                found[nearest(place, key=place.get)] = name
        ok = set(found.values()) == {"train", "validation", "test"}
        return (found, fallbacks) if ok else (None, fallbacks)

    first, second = sides(before), sides(before | more)
    assert first == expected(before)[0] and second == expected(before | more)[0]
    if first and second:
        taken = expected(before)[1] | expected(before | more)[1]
        assert all(second[group] == side for group, side in first.items() if group not in taken)


def test_split_does_not_depend_on_line_order_or_the_other_fraction(tmp_path):
    rows = numbered(200) + numbered(50)  # 50 prompts twice
    one = data.load(jsonl(write(tmp_path / "a.jsonl", rows)))
    two = data.load(jsonl(write(tmp_path / "b.jsonl", rows[::-1])))
    assert (one.train, one.validation, one.test) == (two.train, two.validation, two.test)
    assert {e.prompt for e in one.test} == {
        row["prompt"] for row in rows if place_of(row["prompt"]) < 0.05
    }
    assert one.notes == []  # equal prompts are on one side
    more_test = data.load(jsonl(tmp_path / "a.jsonl", test_fraction=0.3))
    assert more_test.validation == one.validation
    assert set(one.test) < set(more_test.test)


def test_ids_are_unique_and_of_the_content(tmp_path):
    path = write(tmp_path / "a.jsonl", numbered(100) + numbered(100))
    same = SourceConfig(path=path)
    splits = data.load(jsonl(path, validation=same, test=same))
    assert len({e.id for e in splits.train}) == 200
    assert Counter(texts(splits.train)) == Counter({(f"p{i}", f"c{i}"): 2 for i in range(100)})
    assert splits.train == splits.test
    assert [e.id for e in splits.train] == sorted(e.id for e in splits.train)


def test_caps_keep_the_first(tmp_path):
    path = write(tmp_path / "a.jsonl", numbered(300))
    full = data.load(jsonl(path))
    capped = data.load(jsonl(path, num_train=50, num_validation=99, num_test=4))
    assert capped.train == full.train[:50]
    assert capped.test == full.test[:4]
    assert capped.validation == full.validation
    there = len(full.validation)
    assert capped.notes == [
        f"data.validation: has {there} examples, fewer than data.num_validation=99 asks for; all "
        f"are used; give more, or set data.num_validation={there}"
    ]


def test_notes_on_overlap_and_empty_completions(tmp_path):
    train = write(tmp_path / "a.jsonl", [*numbered(100), {"prompt": "p", "completion": " "}])
    rows = [*numbered(7), {"prompt": "x", "completion": 1}]
    test = SourceConfig(write(tmp_path / "b.jsonl", rows))
    splits = data.load(jsonl(train, validation=SourceConfig(path=test.path), test=test))
    assert splits.notes == [
        "data.train: 1 of 101 examples are left out because their completion is empty; fill it in, "
        "or remove them",
        *(
            f"data.{split}: 7 of 8 prompts are in the training set too, so its scores overstate "
            "how well a run does on new prompts; remove them from one of the two, or take the set "
            f"from train: data.{split}.path=null"
            for split in ("validation", "test")
        ),
    ]


def test_empty_sets_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", numbered(2))
    with pytest.raises(
        ConfigErrors,
        match=r"must hold enough examples to take validation and test"
        r" from them; got 2 distinct values of the prompt .* give more, or",
    ):
        data.load(jsonl(path))
    empty = write(tmp_path / "b.jsonl", [{"prompt": "a", "completion": ""}])
    with pytest.raises(ConfigErrors, match=r"^data\.train\.path: must hold at least one example"):
        data.load(jsonl(empty))


def test_smallest_file_that_splits(tmp_path):
    splits = data.load(jsonl(write(tmp_path / "a.jsonl", numbered(3))))
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [1, 1, 1]


def test_same_in_any_process(tmp_path):
    """Neither the process's hash seed nor its random state decides anything."""
    path = write(tmp_path / "a.jsonl", numbered(100))
    cfg = jsonl(path, split_by="completion")
    code = (
        "from lorabench import data; from lorabench.config import *\n"
        f"cfg = DataConfig(name='a', source='jsonl', train=SourceConfig(path={path!r}), "
        "split_by='completion')\n"
        "s = data.load(cfg)\n"
        "print(data.content_hash(cfg), data.order_hash(data.order(95, 8, 3, 50)), "
        "[e.id for e in s.train])"
    )
    expected = [
        data.content_hash(cfg),
        data.order_hash(data.order(95, 8, 3, 50)),
        [e.id for e in data.load(cfg).train],
    ]
    for hash_seed in ("1", "2"):
        done = run_python(code, PYTHONHASHSEED=hash_seed)
        assert done.stdout.strip() == " ".join(map(str, expected)), done.stderr


# Presets


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets(path, tmp_path):
    group = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(path))
    assert not OmegaConf.missing_keys(group)
    if group.source not in GENERATED and group.train.path is None:
        group.train.path = (
            write(tmp_path / "a.jsonl", numbered(100)) if group.source == "jsonl" else "a/b"
        )
    if group.source == "gym":
        group.gym = {"chain_sum": None}
    cfg = OmegaConf.to_object(group)
    assert cfg.name == path.stem
    assert data.check(cfg) == []
    task = "seq_cls" if "accuracy" in cfg.metric else "causal_lm"
    errors = range_errors(Config(data=cfg, task=task))
    assert not [error for error in errors if error.startswith("data.")]
    for split in ("train", "validation", "test"):
        source = getattr(cfg, split)
        pinned = cfg.source != "hub" or source.path in (None, "a/b") or len(source.revision) == 40
        assert pinned, split
    if cfg.source == "skills":
        assert len(data.load(cfg).train) == cfg.num_train


def test_metamathqa_pattern():
    import re

    pattern = OmegaConf.load(CONF / "metamathqa.yaml").answer_pattern
    for text, answer in [
        ("x <<1+1=2>> 2\n#### 1,234", "1,234"),
        ("so 70.\n#### 72\nThe answer is: 72", "72"),
        ("The answer is: -3.5.", "-3.5"),
        ("The answer is $18 each", "18"),
    ]:
        assert re.findall(pattern, text)[-1] == answer
