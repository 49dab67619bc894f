"""What is wrong with a file, a template, a key or a skill, told before anything is read."""

import pytest
from sources import jsonl, numbered, skills_config, write

from lorabench import data
from lorabench.config import ConfigErrors, DataConfig, SourceConfig


def only_error(cfg):
    errors = data.check(cfg)
    assert len(errors) == 1, errors
    assert "\n" not in errors[0]
    with pytest.raises(ConfigErrors) as raised:
        data.load(cfg)
    assert raised.value.errors == errors
    return errors[0]


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", numbered(3))
    error = only_error(jsonl(tmp_path / "trian.jsonl"))
    assert error.startswith("data.train.path: must be an existing file; ")
    assert f"did you mean '{tmp_path / 'train.jsonl'}'?" in error


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "must hold at least one example; {} is empty"),
        (b"\n \n", "must hold at least one example; {} is empty"),
        (b'{"prompt": "a", "completion": "\xff"}\n', "must be UTF-8 text; invalid start byte in"),
        (b'{"prompt": "a", "completion": "b"}\n\n{"prompt": "a",\n', "line 3 of {}: Expecting"),
        (b'[{"prompt": "a", "completion": "b"}]\n', "line 1 of {}: it is [{{'prompt'"),
        (b'"text"\n', "line 1 of {}: it is 'text'"),
        (b'{"prompt": "a", "completion": null}\n', "line 1 of {}: column 'completion' holds None"),
        (b'{"prompt": "a", "completion": ["b"]}\n', "line 1 of {}: column 'completion' holds ['b"),
        (b'{"prompt": true, "completion": "b"}\n', "line 1 of {}: column 'prompt' holds True"),
        (b'{"prompt": "a", "completion": NaN}\n', "line 1 of {}: column 'completion' holds nan"),
        (b'{"prompt": "\\ud800", "completion": "b"}\n', "line 1 of {}: column 'prompt' holds"),
        (b'{"prompt": 1' + b"0" * 5000 + b', "completion": "b"}\n', "line 1 of {}: Exceeds"),
        (
            b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n{"prompt": "b"}\n',
            "line 2 of {}: no column 'completion' (and 1 more); correct or remove the line",
        ),
        (
            b'{"promt": "a", "completion": "b"}\n',
            "every column must be one of promt, completion (line 1 of {}); unknown: 'prompt' "
            "(did you mean 'promt'?)",
        ),
    ],
)
def test_bad_files(tmp_path, content, expected):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    assert expected.format(path) in only_error(jsonl(path))


def test_a_mended_file_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{")
    assert data.check(jsonl(path))
    write(path, numbered(100))
    assert data.check(jsonl(path)) == []


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"prompt": "{promt}"}, "data.prompt: every column must be one of prompt, completion"),
        ({"prompt": "{prompt.x}"}, "unknown: 'prompt.x' (did you mean 'prompt'?)"),
        ({"prompt": "{prompt"}, "data.prompt: must be a template over columns"),
        ({"prompt": "{prompt!r}"}, "must be the name of a column alone"),
        ({"prompt": "{}"}, "must be the name of a column alone"),
        # What str.format would follow to the interpreter, or to all memory.
        ({"prompt": "{prompt.__class__.__mro__}"}, "unknown: 'prompt.__class__.__mro__'"),
        ({"prompt": "{prompt[0]}"}, "unknown: 'prompt[0]'"),
        ({"prompt": "{prompt[__globals__]}"}, "unknown: 'prompt[__globals__]'"),
        ({"prompt": "{__class__}"}, "unknown: '__class__'"),
        ({"prompt": "{0.__init__.__globals__}"}, "unknown: '0.__init__.__globals__'"),
        ({"prompt": "{prompt:1000000000}"}, "must be the name of a column alone"),
        ({"prompt": "{prompt:{prompt}}"}, "must be the name of a column alone"),
        ({"completion": "{completion!s:>999999999}"}, "must be the name of a column alone"),
        ({"completion": "yes"}, "data.completion: must name at least one column; got 'yes'"),
        ({"split_by": "topic"}, "data.split_by: every column must be one of prompt, completion"),
        ({"test": SourceConfig(split="test")}, "data.test.split: must be left out with data.test"),
        ({"test": SourceConfig(prompt="{x}")}, "data.test.prompt: must be left out with data"),
    ],
)
def test_bad_templates(tmp_path, kwargs, expected):
    path = write(tmp_path / "a.jsonl", numbered(100))
    assert expected in only_error(jsonl(path, **kwargs))


def test_keys_that_would_do_nothing(tmp_path):
    source = SourceConfig(write(tmp_path / "a.jsonl", numbered(100)), revision="main")
    error = only_error(DataConfig(name="mine", source="jsonl", train=source))
    assert error.startswith("data.train.revision: must be left out with data.source=jsonl; got 'm")


def test_all_errors_come_at_once(tmp_path):
    cfg = jsonl(tmp_path / "a.jsonl", prompt="{", test=SourceConfig(path=str(tmp_path)))
    errors = data.check(cfg)
    assert [error.split(":")[0] for error in errors] == [
        "data.prompt", "data.train.path", "data.test.path",
    ]  # fmt: skip
    assert "is a folder; use data=hub" in errors[2]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"skills": ["rot31"]}, "data.skills: every name must be one of"),
        ({"num_test": None}, "data.num_test: must be given with data.source=skills"),
        ({"max_word_length": 30}, "data.min_word_length, data.max_word_length: words must have"),
        ({"max_word_length": 3, "num_train": 20_000}, "data.num_train: at most 14"),
        ({"train": SourceConfig(path="x.jsonl")}, "data.train.path: must be left out with da"),
    ],
)
def test_bad_skills(kwargs, expected):
    assert only_error(skills_config(**kwargs)).startswith(expected)
