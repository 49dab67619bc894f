"""Mixtures, named test sets and retention; references are json, hashlib and pandas."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import composed, say
from sources import write

from lorabench import data, identity, plan
from lorabench.config import ConfigErrors, DataConfig, SourceConfig, range_errors
from lorabench.config.schema import MixtureConfig, NamedSetConfig

SIZES = {"maths": 60, "words": 90, "chat": 120}


def rows(name: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name} {i} is ", "completion": str(i % 7)} for i in range(count)]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return {
        name: write(tmp_path / f"{name}.jsonl", rows(name, count)) for name, count in SIZES.items()
    }


def mixed(*parts: dict[str, Any], **changes: Any) -> DataConfig:
    sources = [MixtureConfig(**part) for part in parts]
    return DataConfig(**{"name": "m", "source": "jsonl", "mixture": sources, **changes})


def counted(*sets: Any) -> Counter[str]:
    return Counter(example.source for examples in sets for example in examples)


def number(*texts: Any) -> int:
    return int(hashlib.sha256(json.dumps([*texts]).encode()).hexdigest()[:16], 16)


# What is in a mixture


def test_sources_are_joined_and_named(files: dict[str, str]) -> None:
    found = data.load(mixed({"path": files["maths"]}, {"path": files["words"], "name": "w"}))
    sets = (found.train, found.validation, found.test)
    expected = {(r["prompt"], r["completion"], "maths.jsonl") for r in rows("maths", 60)}
    expected |= {(r["prompt"], r["completion"], "w") for r in rows("words", 90)}
    assert {(e.prompt, e.completion, e.source) for one in sets for e in one} == expected
    assert sum(map(len, sets)) == 150
    assert "data.mixture: 60 of 60 examples of maths.jsonl, 90 of 90 examples of w" in found.notes


def test_validation_and_test_are_what_a_single_file_would_give(files: dict[str, str]) -> None:
    """A mixture of everything is the file with all lines: the same examples in every set."""
    found = data.load(mixed(*({"path": path} for path in files.values())))
    whole = Path(files["maths"]).with_name("all.jsonl")
    whole.write_text("".join(Path(path).read_text() for path in files.values()))
    one = data.load(DataConfig(name="m", source="jsonl", train=SourceConfig(path=str(whole))))
    for split in ("train", "validation", "test"):
        ours, theirs = getattr(found, split), getattr(one, split)
        assert [e._replace(source="") for e in ours] == list(theirs)
        assert [e.id for e in ours] == [e.id for e in theirs]


def test_num_takes_the_first_by_id(files: dict[str, str]) -> None:
    found = data.load(mixed({"path": files["maths"], "num": 10}, {"path": files["words"]}))
    sets = (found.train, found.validation, found.test)
    assert counted(*sets) == {"maths.jsonl": 10, "words.jsonl": 90}
    pairs = [(r["prompt"], r["completion"]) for r in rows("maths", 60)]
    first = sorted(pairs, key=lambda pair: number(*pair, 0))[:10]
    ours = {(e.prompt, e.completion) for one in sets for e in one if e.source == "maths.jsonl"}
    assert ours == set(first)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 1, 1), (60, 60, 60)),
        ((2, 1, 1), (60, 30, 30)),
        ((1, 2, 2), (45, 90, 90)),
        ((0.1, 0.3, 0.3), (30, 90, 90)),  # 0.3 / 0.1 is below 3 in binary
        ((1000, 1, 1), (60, 1, 1)),
    ],
)
def test_weights_are_the_largest_proportion_without_repetition(
    weights: tuple[float, ...], expected: tuple[int, ...], files: dict[str, str]
) -> None:
    parts = [
        {"path": path, "name": name, "weight": weight}
        for (name, path), weight in zip(files.items(), weights, strict=True)
    ]
    found = data.load(mixed(*parts))
    every = counted(found.train, found.validation, found.test)
    assert every == dict(zip(files, expected, strict=True))


def test_each_source_is_read_in_its_own_format(tmp_path: Path, files: dict[str, str]) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    chat = write(tmp_path / "c.jsonl", [{"talk": turns}])
    text = write(tmp_path / "t.jsonl", [{"body": "Once upon a time"}])
    found = data.load(
        mixed(
            {"path": chat, "format": "messages", "messages": "talk"},
            {"path": text, "format": "text", "text": "{body}"},
            {"path": files["maths"], "prompt": "Q {prompt}", "completion": " {completion}"},
        )
    )
    every = {e.source: e for one in (found.train, found.validation, found.test) for e in one}
    assert json.loads(every["c.jsonl"].conversation)["messages"] == turns
    assert (every["t.jsonl"].prompt, every["t.jsonl"].completion) == ("", "Once upon a time")
    assert every["maths.jsonl"].prompt.startswith("Q maths")


# Tokens


class Letters:
    """A tokenizer whose ids are code points."""

    bos_token_id, eos_token_id, name_or_path = None, 1, "letters"

    def __call__(self, texts: Any, **_: Any) -> dict[str, Any]:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def test_tokens_follow_the_format_of_their_source(tmp_path: Path) -> None:
    """A text carries the loss on all but its first token, an example on its completion alone."""
    pairs = write(tmp_path / "p.jsonl", rows("maths", 40))
    texts = write(tmp_path / "t.jsonl", [{"text": f"text number {i}"} for i in range(40)])
    cfg = mixed({"path": pairs}, {"path": texts, "format": "text"}, max_length=8, add_bos=False)
    cfg = dataclasses.replace(cfg, max_length=14)
    found = data.load(cfg)
    tokens = data.tokenise(found.train, Letters(), cfg)
    assert list(tokens.indices) == sorted(tokens.indices), "the order of the examples"
    for place, index in enumerate(tokens.indices):
        example = found.train[index]
        begin = len(example.prompt) or 1
        ids = [*map(ord, example.prompt + example.completion), 1]
        assert tokens.ids[place].partition(".")[0] == example.id
        if "." not in tokens.ids[place]:
            assert list(tokens.input_ids[place]) == ids[:14]
            assert tokens.completion_start[place] == begin
    assert any("." in one for one in tokens.ids), "a text longer than max_length goes on"


# Hashes and ids


def test_names_decide_nothing_and_content_does(files: dict[str, str]) -> None:
    def hashes(*parts: dict[str, Any], **changes: Any) -> dict[str, str]:
        return data.content_hashes(mixed(*parts, **changes))

    first, second = {"path": files["maths"]}, {"path": files["words"]}
    before = hashes(first, second)
    assert hashes(first | {"name": "a"}, second) == before
    assert data.load(mixed(first, second)).hashes == before, "those of what was read"
    for other in (
        hashes(first | {"num": 10}, second),
        hashes(first | {"weight": 1.0}, second | {"weight": 2.0}),
        hashes(first | {"prompt": "Q {prompt}"}, second),
        hashes(first, {"path": files["chat"]}),
        hashes(first),
    ):
        assert other["train"] != before["train"]
    Path(files["maths"]).write_text(json.dumps(rows("maths", 61)[-1]) + "\n")
    assert hashes(first, second)["train"] != before["train"]


def test_named_sets_are_part_of_the_evaluation_and_not_of_the_training(
    files: dict[str, str],
) -> None:
    words = ["data.num_train=32", "data.num_validation=4", "data.num_test=4"]
    bare = plan.make(composed(*words))
    more = plan.make(composed(*words, f"data.retention.path={files['maths']}"))
    two = plan.make(composed(*words, f"data.tests={{law: {{path: '{files['words']}'}}}}"))
    assert bare.run_id == more.run_id == two.run_id
    assert len({bare.evaluation_id, more.evaluation_id, two.evaluation_id}) == 3
    assert set(more.contents) - set(bare.contents) == {"retention"}
    assert set(two.contents) - set(bare.contents) == {"tests.law"}
    assert identity.is_of_evaluation("data.tests.law.path")


def test_a_mixture_is_part_of_the_run_id(files: dict[str, str]) -> None:
    def run_id(*parts: dict[str, Any]) -> str:
        entries = ", ".join(
            "{" + ", ".join(f"{key}: '{value}'" for key, value in part.items()) + "}"
            for part in parts
        )
        return plan.make(
            composed("data=jsonl", "data.max_length=64", f"data.mixture=[{entries}]")
        ).run_id

    first, second = {"path": files["maths"]}, {"path": files["words"]}
    assert run_id(first, second) == run_id(first | {"name": "a"}, second) != run_id(first)


# What is refused


@pytest.mark.parametrize(
    ("parts", "law"),
    [
        ([{}], "data.mixture[0].path: must be given"),
        ([{"path": "a/x", "num": 0}], "data.mixture[0].num: must be at least 1"),
        ([{"path": "a/x", "weight": -1.0}], "data.mixture[0].weight: must be above 0"),
        ([{"path": "a/x"}, {"path": "b/x"}], "data.mixture[0].name: must be another one for each"),
        ([{"path": "x", "weight": 1.0}, {"path": "y"}], "data.mixture: must be such that weight"),
        ([{"path": "x", "weight": 1.0, "num": 3}], "data.mixture: must be such that weight"),
        ([{"path": "x", "format": "mesages"}], "data.mixture[0].format: must be one of prompt_com"),
        ([{"path": "x", "text": "{a}"}], "data.mixture[0].text: must be left out with"),
        ([{"path": "x", "format": "text", "prompt": "a"}], "data.mixture[0].prompt: must be left"),
    ],
)
def test_what_is_wrong_with_a_mixture(parts: list[dict[str, Any]], law: str) -> None:
    config = composed()
    config.data = mixed(*parts)
    assert [error for error in range_errors(config) if error.startswith(law)], range_errors(config)


@pytest.mark.parametrize(
    ("changes", "law"),
    [
        ({"tests": {"a": NamedSetConfig()}}, "data.tests.a.path: must be given"),
        ({"tests": {"test": NamedSetConfig(path="x")}}, "data.tests: must be named by letters"),
        ({"tests": {"a.b": NamedSetConfig(path="x")}}, "data.tests: must be named by letters"),
        ({"retention": NamedSetConfig(num=3)}, "data.retention.num: must be left out with data.re"),
        ({"train": SourceConfig(path="x")}, "data.train.path: must be left out beside data.mix"),
        ({"source": "skills", "skills": ["rot13"]}, "data.mixture: must be left out with data.sou"),
    ],
)
def test_what_is_wrong_beside_a_mixture(changes: dict[str, Any], law: str) -> None:
    config = composed()
    config.data = mixed({"path": "y"}, **changes)
    assert [error for error in range_errors(config) if error.startswith(law)], range_errors(config)


def test_errors_of_a_part_name_its_key(tmp_path: Path, files: dict[str, str]) -> None:
    bad = write(tmp_path / "bad.jsonl", [{"q": 1}])
    gone = str(tmp_path / "math.jsonl")
    retention = NamedSetConfig(path=bad)
    found = data.check(mixed({"path": files["words"]}, {"path": gone}, retention=retention))
    assert len(found) == 3, found  # the columns of the prompt and of the completion
    assert found[0].startswith("data.mixture[1].path: must be an existing file; ")
    assert f"did you mean '{files['maths']}'?" in found[0]
    assert all("line 1 of" in one for one in found[1:])
    with pytest.raises(ConfigErrors, match=r"data\.mixture\[0\]\.path: must hold at least one ex"):
        data.load(mixed({"path": write(tmp_path / "e.jsonl", [{"prompt": 1, "completion": ""}])}))


def test_refusals_on_the_command_line(files: dict[str, str]) -> None:
    said = say("plan", "data=jsonl", f"data.mixture=[{{pth: '{files['maths']}'}}]")
    assert said.code == 2 and "pth" in said.err and "did you mean 'path'?" in said.err, said.err
    said = say("plan", f"data.tests={{law: {{paht: '{files['maths']}'}}}}")
    assert said.code == 2 and "did you mean 'path'?" in said.err, said.err
    said = say(
        "plan", "data=classes", "task=seq_cls", "head=full", f"data.retention.path={files['maths']}"
    )
    assert said.code == 2 and "data.retention.path: must be null with task=seq_cls" in said.err


def test_labels_of_a_named_set_are_those_of_train(tmp_path: Path) -> None:
    pairs = [{"prompt": f"{label} {i}", "completion": label} for i in range(30) for label in "ab"]
    train = write(tmp_path / "a.jsonl", pairs)
    other = write(tmp_path / "b.jsonl", [{"prompt": "c 1", "completion": "c"}])
    cfg = DataConfig(
        name="m", source="jsonl", train=SourceConfig(path=train),
        tests={"more": NamedSetConfig(path=other)},
    )  # fmt: skip
    with pytest.raises(ConfigErrors, match=r"data\.tests\.more: every completion must be one of"):
        data.labels_of(cfg, "")
