"""The data room: references are json, datasets, hashlib and the tokenizers, called plainly."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lorabench import data
from lorabench.config import Config, ConfigErrors, DataConfig, SourceConfig, range_errors
from lorabench.zoo import TINY_GEMMA
from lorabench.zoo import skills as zoo_skills

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf" / "data"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_GEMMA)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Datasets' cache in the test's folder; its progress bars off."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(num, **columns):
    return [{"prompt": f"p{i}", "completion": f"c{i}", **columns} for i in range(num)]


def jsonl(train, **kwargs):
    source = SourceConfig(path=str(train))
    return DataConfig(**{"name": "mine", "source": "jsonl", "train": source, **kwargs})


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip


def only_error(cfg):
    errors = data.check(cfg)
    assert len(errors) == 1, errors
    assert "\n" not in errors[0]
    with pytest.raises(ConfigErrors) as raised:
        data.load(cfg)
    assert raised.value.errors == errors
    return errors[0]


def texts(examples):
    return [(example.prompt, example.completion) for example in examples]


# What can be wrong


def test_import_and_check_are_light(tmp_path):
    path = write(tmp_path / "a.jsonl", numbered(100))
    code = (
        "import sys; from lorabench import data; from lorabench.config import *\n"
        f"cfg = DataConfig(name='a', source='jsonl', train=SourceConfig(path={path!r}))\n"
        "assert data.check(cfg) == []; data.content_hash(cfg); data.load(cfg)\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stderr


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
            "line 2 of {}: no column 'completion' (and 1 more); mend or remove the line",
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


def skills_config(**kwargs):
    sizes = {"num_train": 50, "num_validation": 10, "num_test": 20}
    return DataConfig(**{"name": "s", "source": "skills", "skills": ["rot13"], **sizes, **kwargs})


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
    assert set(texts(splits.train + splits.validation)) == {(f"Q {i}", str(-i)) for i in range(100)}


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
    assert [len(side) for side in sides] == [28, 4, 8]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert sum(map(len, sets)) == 400
    # by the rule as it is written down
    by_hash = {hashlib.sha256(f"split\0{t}".encode()).digest(): str(t) for t in range(40)}
    ordered = [by_hash[digest] for digest in sorted(by_hash)]
    assert {str(t) for t in sides[2]} == set(ordered[:8])
    assert {str(t) for t in sides[1]} == set(ordered[-4:])


def test_split_does_not_depend_on_line_order_or_the_other_fraction(tmp_path):
    rows = numbered(200) + numbered(50)  # 50 prompts twice
    one = data.load(jsonl(write(tmp_path / "a.jsonl", rows)))
    two = data.load(jsonl(write(tmp_path / "b.jsonl", rows[::-1])))
    assert (one.train, one.validation, one.test) == (two.train, two.validation, two.test)
    assert len({e.prompt for e in one.test}) == len({e.prompt for e in one.validation}) == 10
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
    assert capped.notes == ["validation: only 15 examples; data.num_validation asks for 99"]


def test_notes_on_overlap_and_empty_completions(tmp_path):
    train = write(tmp_path / "a.jsonl", [*numbered(100), {"prompt": "p", "completion": " "}])
    rows = [*numbered(7), {"prompt": "x", "completion": 1}]
    test = SourceConfig(write(tmp_path / "b.jsonl", rows))
    splits = data.load(jsonl(train, validation=SourceConfig(path=test.path), test=test))
    assert splits.notes == [
        "train: 1 examples left out, their completion is empty",
        "validation: 7 of 8 prompts are in train too",
        "test: 7 of 8 prompts are in train too",
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


def hub_folder(tmp_path):
    import pandas

    folder = tmp_path / "maths"
    (folder / "data").mkdir(parents=True)
    frame = pandas.DataFrame({"q": [f"q{i}" for i in range(60)], "n": range(60), "bad": None})
    frame[:50].to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    frame[50:].to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


def hub(path, **kwargs):
    sources = {
        "train": SourceConfig(path=str(path)),
        "test": SourceConfig(path=str(path), split="test"),
    }
    templates = {"prompt": "{q}=", "completion": "{n}"}
    return DataConfig(**{"name": "h", "source": "hub", **sources, **templates, **kwargs})


def test_local_folder_as_hub(tmp_path, cache):
    folder = hub_folder(tmp_path)
    cfg = hub(folder)
    assert data.check(cfg) == []
    splits = data.load(cfg)
    table = cache.load_dataset(str(folder), split="test")
    assert set(texts(splits.test)) == {(f"{row['q']}=", str(row["n"])) for row in table}
    assert len(splits.train) == 48 and len(splits.validation) == 2
    assert splits.notes == []


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"prompt": "{qq}"}, "data.prompt: every column must be one of q, n, bad ('"),
        ({"completion": "{bad}"}, "row 1 of '"),
        ({"test": "nope"}, "data.test.path: must be a dataset that loads; "),
        ({"subset": "nope"}, "'nope' not found. Available: ['default']; mend the folder"),
    ],
)
def test_bad_hub(tmp_path, cache, kwargs, expected):
    folder = hub_folder(tmp_path)
    if "test" in kwargs:
        kwargs = {"test": SourceConfig(path=str(folder), split=kwargs["test"])}
    if "subset" in kwargs:
        kwargs = {"train": SourceConfig(path=str(folder), subset=kwargs["subset"])}
    with pytest.raises(ConfigErrors) as raised:
        data.load(hub(folder, **kwargs))
    assert len(raised.value.errors) == 1
    assert "\n" not in str(raised.value) and expected in str(raised.value)


def test_hub_paths_that_cannot_be(tmp_path):
    folder = hub_folder(tmp_path)
    errors = data.check(hub(tmp_path / "math"))
    assert len(errors) == 2 and f"did you mean '{folder}'?" in errors[0]
    file = next(folder.rglob("train*"))
    assert "is a file; give its folder" in data.check(hub(file))[0]
    assert data.check(hub("meta-math/MetaMathQA")) == []


def test_no_network_is_one_line(tmp_path):
    code = (
        "from lorabench import data; from lorabench.config import *\n"
        "train = SourceConfig(path='no/such', revision='f00')\n"
        "cfg = DataConfig(name='h', source='hub', train=train)\n"
        "try: data.load(cfg)\n"
        "except ConfigErrors as error: print(error)"
    )
    done = run_python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done
    assert lines[0].startswith("data.train.path: must be a dataset that loads; 'no/such', split 't")
    assert "give a local folder as data.train.path" in lines[0]
    assert done.stderr == ""


# The content hash


def test_content_hash_of_files(tmp_path):
    rows = numbered(100)
    cfg = jsonl(write(tmp_path / "a.jsonl", rows))
    first = data.content_hash(cfg)
    assert data.content_hash(jsonl(write(tmp_path / "elsewhere.jsonl", rows))) == first
    assert data.content_hash(jsonl(tmp_path / "a.jsonl", name="other", max_length=7)) == first
    changed = [
        jsonl(write(tmp_path / "b.jsonl", rows[:-1])),
        jsonl(cfg.train.path, prompt="Q {prompt}"),
        jsonl(cfg.train.path, split_by="completion"),
        jsonl(cfg.train.path, test_fraction=0.1),
        jsonl(cfg.train.path, num_test=3),
        jsonl(cfg.train.path, test=SourceConfig(path=cfg.train.path)),
    ]
    hashes = [data.content_hash(other) for other in changed]
    assert len({first, *hashes}) == 7
    write(tmp_path / "a.jsonl", numbered(101))  # the cache notices
    assert data.content_hash(cfg) != first


def test_content_hash_of_skills_and_hub(tmp_path):
    assert data.content_hash(skills_config()) == data.content_hash(skills_config(name="x"))
    assert data.content_hash(skills_config()) != data.content_hash(skills_config(skills=["greek"]))
    one, two = (SourceConfig(path="a/b", revision=revision) for revision in ("1", "2"))
    assert data.content_hash(hub("a/b", train=one)) != data.content_hash(hub("a/b", train=two))
    folder = hub_folder(tmp_path)
    first = data.content_hash(hub(folder))
    (folder / ".hidden").touch()
    moved = folder.rename(tmp_path / "moved")
    assert data.content_hash(hub(moved)) == first
    (moved / "data" / "test-00000-of-00001.parquet").unlink()
    assert data.content_hash(hub(moved)) != first


def test_same_in_any_process(tmp_path):
    """Neither the process's hash seed nor its random state decides anything."""
    path = write(tmp_path / "a.jsonl", numbered(100))
    cfg = jsonl(path, split_by="completion")
    code = (
        "from lorabench import data; from lorabench.config import *\n"
        f"cfg = DataConfig(name='a', source='jsonl', train=SourceConfig(path={path!r}), "
        "split_by='completion')\n"
        "s = data.load(cfg)\n"
        "print(data.content_hash(cfg), data.order_hash(95, 8, 3, 50), [e.id for e in s.train])"
    )
    expected = [
        data.content_hash(cfg),
        data.order_hash(95, 8, 3, 50),
        [e.id for e in data.load(cfg).train],
    ]
    for hash_seed in ("1", "2"):
        done = run_python(code, PYTHONHASHSEED=hash_seed)
        assert done.stdout.strip() == " ".join(map(str, expected)), done.stderr


# Tokens

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def examples(*pairs):
    return [data.Example(*pair, id=str(i)) for i, pair in enumerate(pairs)]


def config(**kwargs):
    return DataConfig(**{"name": "t", "source": "jsonl", "max_length": 64, **kwargs})


def plainly(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_bos_eos_and_the_boundary(tokenizer, add_bos, add_eos):
    pairs = examples(("rev:hello=", "olleh"), ("a=", "b"))
    tokens = data.tokenise(pairs, tokenizer, config(add_bos=add_bos, add_eos=add_eos))
    for pair, ids, start in zip(pairs, tokens.input_ids, tokens.completion_start, strict=True):
        bos = [tokenizer.bos_token_id] * add_bos
        eos = [tokenizer.eos_token_id] * add_eos
        assert ids[:start] == bos + plainly(tokenizer, pair.prompt)
        assert ids[start:] == plainly(tokenizer, pair.completion) + eos
        if add_bos:  # as the tokenizer itself opens a text
            assert ids[:start] == tokenizer(pair.prompt)["input_ids"]
    assert tokens.ids == ["0", "1"] and tokens.indices == [0, 1] and len(tokens) == 2


def test_bos_is_not_doubled(tokenizer):
    tokens = data.tokenise(examples(("<bos>a=", "b")), tokenizer, config())
    assert tokens.input_ids[0] == [*plainly(tokenizer, "<bos>a=b"), tokenizer.eos_token_id]
    assert tokens.input_ids[0].count(tokenizer.bos_token_id) == 1


def bpe(**special):
    """A tokenizer that knows '=5' as one token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["2", "=", "5", "=5", "<e>"])}
    model = models.BPE(vocab=vocabulary, merges=[("=", "5")])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)


def test_no_token_spans_prompt_and_completion():
    tokenizer = bpe(eos_token="<e>")
    assert plainly(tokenizer, "2=5") == [0, 3]  # together
    tokens = data.tokenise(examples(("2=", "5")), tokenizer, config())  # it has no BOS
    assert tokens.input_ids == [[0, 1, 2, 4]] and tokens.completion_start == [2]


def test_no_eos_is_refused():
    with pytest.raises(ConfigErrors, match=r"^data\.add_eos: must be false with a tokenizer that"):
        data.tokenise(examples(("2=", "5")), bpe(), config())
    tokens = data.tokenise(examples(("2=", "5")), bpe(), config(add_eos=False))
    assert tokens.input_ids == [[0, 1, 2]]


def test_too_long_and_empty_are_left_out_never_cut(tokenizer):
    pairs = examples(("abc", "d"), ("abc", "de"), ("abc", "def"), ("a", ""), ("a", "b"))
    tokens = data.tokenise(pairs, tokenizer, config(max_length=7))  # <bos> abc de <eos>
    assert tokens.indices == [0, 1, 4] and tokens.ids == ["0", "1", "4"]
    assert tokens.num_too_long == 1 and tokens.num_empty == 1
    assert max(map(len, tokens.input_ids)) == 7
    with pytest.raises(
        ConfigErrors,
        match=r"^data\.max_length: must let at least one of 5 examples "
        r"through; got 3, the shortest has 4 tokens; raise data\.max_length$",
    ):
        data.tokenise(pairs, tokenizer, config(max_length=3))


def test_empty_prompt_needs_a_bos(tokenizer):
    tokens = data.tokenise(examples(("", "b")), tokenizer, config())
    assert tokens.completion_start == [1]
    with pytest.raises(ConfigErrors, match=r"^data\.prompt: must give at least one token"):
        data.tokenise(examples(("", "b")), tokenizer, config(add_bos=False))


@pytest.fixture
def chat(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    return tokenizer


def test_chat_template(chat):
    tokens = data.tokenise(examples(("hi", "yo")), chat, config(chat_template=True))
    (ids,), (start,) = tokens.input_ids, tokens.completion_start
    assert chat.decode(ids[:start]) == "<bos>[user]hi<eos>\n[assistant]"
    assert chat.decode(ids[start:]) == "yo<eos>"  # the template's EOS, not a second; no newline
    assert ids.count(chat.bos_token_id) == 1
    whole = data.tokenise(examples(("hi", "yo")), chat, config(chat_template=True, add_eos=False))
    assert chat.decode(whole.input_ids[0][start:]) == "yo<eos>\n"


def test_chat_template_without_eos_gets_one(chat, monkeypatch):
    monkeypatch.setattr(chat, "chat_template", CHAT.replace("{{ eos_token }}", ""))
    tokens = data.tokenise(examples(("hi", "yo"), ("a", "")), chat, config(chat_template=True))
    start = tokens.completion_start[0]
    assert chat.decode(tokens.input_ids[0][start:]) == "yo\n<eos>"
    assert tokens.num_empty == 1


def test_bad_chat_templates(tokenizer, chat, monkeypatch):
    monkeypatch.setattr(chat, "chat_template", "{{ messages | length }}" + CHAT)
    with pytest.raises(
        ConfigErrors,
        match=r"must write a conversation that begins with its prompt; "
        r".* gives '2<bos>.*' in place of '1<bos>.*' at token 0",
    ):
        data.tokenise(examples(("hi", "yo")), chat, config(chat_template=True))
    monkeypatch.setattr(chat, "chat_template", None)
    with pytest.raises(ConfigErrors, match=r"^data\.chat_template: must be false with a tokenizer"):
        data.tokenise(examples(("hi", "yo")), chat, config(chat_template=True))


# Batches


def made(lengths):
    """Tokens of the given (prompt, completion) lengths."""
    ids = [list(range(1, p + c + 1)) for p, c in lengths]
    return data.Tokens(
        ids, [p for p, _ in lengths], [str(i) for i in range(len(ids))], list(range(len(ids))), 0, 0
    )


@pytest.mark.parametrize(
    ("longest", "max_length", "T"), [(5, 64, 8), (8, 64, 8), (9, 64, 16), (9, 11, 11)]
)
def test_padded_length(longest, max_length, T):
    assert data.padded_length(made([(1, 1), (longest - 2, 2)]), max_length) == T


@settings(deadline=None, max_examples=50)  # shared cores
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9),
    st.data(),
)
def test_batch(lengths, draw):
    tokens = made(lengths)
    indices = draw.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=5))
    T = data.padded_length(tokens, 100)
    input_ids_BT, labels_BT = data.batch(tokens, np.array(indices), T, pad_id=0)
    assert input_ids_BT.shape == labels_BT.shape == (len(indices), T)
    assert input_ids_BT.dtype == labels_BT.dtype == np.int64
    for index, ids, labels in zip(indices, input_ids_BT.tolist(), labels_BT.tolist(), strict=True):
        prompt, completion = lengths[index]
        padding = T - prompt - completion
        assert ids == [*range(1, prompt + completion + 1)] + [0] * padding
        assert labels == [-100] * prompt + ids[prompt : prompt + completion] + [-100] * padding


def test_labels_are_those_hugging_face_expects(tokenizer):
    """Its own loss on our labels is the mean over the completion's tokens, predicted from t - 1."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_GEMMA).eval()
    pairs = examples(("rev:hello=", "olleh"), ("copy:abc=", "abd"))
    tokens = data.tokenise(pairs, tokenizer, config())
    arrays_BT = data.batch(tokens, [0, 1], 24, data.pad_id(tokenizer))
    ids_BT, labels_BT = map(torch.from_numpy, arrays_BT)
    with torch.no_grad():
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        losses = []
        for ids, start in zip(tokens.input_ids, tokens.completion_start, strict=True):  # unpadded
            logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            losses += [-logs[t - 1, ids[t]] for t in range(start, len(ids))]
    # float32 sums in another order
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_pad_id(tokenizer):
    assert data.pad_id(tokenizer) == tokenizer.pad_token_id == 0
    assert data.pad_id(bpe(eos_token="<e>")) == 4
    assert data.pad_id(bpe()) == 0


@settings(deadline=None, max_examples=50)  # shared cores
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**63), st.integers(1, 30))
def test_order_is_epochs_of_permutations(num_examples, batch_size, seed, steps):
    batches = list(data.order(num_examples, batch_size, seed, steps))
    assert [len(indices) for indices in batches] == [batch_size] * steps
    sequence = np.concatenate(batches)
    whole = len(sequence) // num_examples * num_examples
    for epoch in sequence[:whole].reshape(-1, num_examples):
        assert sorted(epoch) == list(range(num_examples))
    rest = sequence[whole:].tolist()
    assert len(set(rest)) == len(rest)


small = st.integers(0, 30)


@settings(deadline=None, max_examples=50)  # shared cores
@given(st.integers(1, 40), st.integers(1, 50), small, small, small)
def test_order_resumes_anywhere(num_examples, batch_size, seed, steps, start):
    all_steps = [indices.tolist() for indices in data.order(num_examples, batch_size, seed, steps)]
    resumed = [i.tolist() for i in data.order(num_examples, batch_size, seed, steps, start)]
    assert resumed == all_steps[start:]


def test_order_differs_by_seed_and_epoch():
    first, second = data.order(100, 100, 0, 2)
    assert first.tolist() != second.tolist()
    assert first.tolist() != next(data.order(100, 100, 1, 1)).tolist()


def test_order_is_fair():
    """Each example comes first about equally often (chi-square, 9 degrees of freedom, p = 1e-4)."""
    first = [next(data.order(10, 1, seed, 1))[0] for seed in range(1000)]
    counts = np.bincount(first, minlength=10)
    assert ((counts - 100) ** 2 / 100).sum() < 33.7


def test_order_hash():
    sequence = np.concatenate(list(data.order(10, 4, 7, 6)))
    expected = hashlib.sha256(np.asarray(sequence, "<i8").tobytes()).hexdigest()
    assert data.order_hash(10, 4, 7, 6) == expected
    # written down: an order that changes makes old records irreproducible
    assert next(data.order(10, 10, 0, 1)).tolist() == [0, 4, 6, 9, 5, 1, 7, 8, 2, 3]


# Presets


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets(path, tmp_path):
    group = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(path))
    assert not OmegaConf.missing_keys(group)
    if group.source != "skills" and group.train.path is None:
        group.train.path = (
            write(tmp_path / "a.jsonl", numbered(100)) if group.source == "jsonl" else "a/b"
        )
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
