"""data.source=path: what lies at a path, what is hashed, and what a look at it tells."""

import gzip
import hashlib
import json
import os

import pandas
import pytest
from sources import jsonl, numbered, texts, write
from test_readers_refusals import only_error, path_config

from lorabench import data
from lorabench.config import DataConfig, SourceConfig
from lorabench.data import sources
from lorabench.data.sources.look import look

ROWS = numbered(60)
EXPECTED = {(row["prompt"], row["completion"]) for row in ROWS}


def all_texts(cfg):
    splits = data.load(cfg)
    assert splits.hashes == data.content_hashes(cfg)
    return set(texts([*splits.train, *splits.validation, *splits.test]))


def split_over(folder, parts, ending):
    folder.mkdir(exist_ok=True)
    for number in range(parts):
        content = pandas.DataFrame(ROWS[number::parts]).to_csv(index=False).encode()
        name = f"part-{number}{ending}"
        (folder / name).write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    return folder


def test_a_file_a_folder_and_a_glob(tmp_path, monkeypatch):
    folder = split_over(tmp_path / "data [x]", 3, ".csv")
    (folder / ".hidden.json").write_text("{")
    (folder / "README.md").write_text("about")
    (folder / "test").mkdir()
    write(folder / "test" / "a.jsonl", numbered(3, other=1))
    assert all_texts(path_config(folder)) == EXPECTED  # a name with brackets is no pattern
    moved = folder.rename(tmp_path / "data")
    assert all_texts(path_config(f"{moved}/part-*.csv")) == EXPECTED
    assert all_texts(path_config(f"{tmp_path}/**/part-[0-2].csv")) == EXPECTED
    assert len(all_texts(path_config(moved / "part-1.csv"))) == 20
    monkeypatch.setenv("HOME", str(tmp_path))
    assert all_texts(path_config("~/data")) == EXPECTED
    monkeypatch.chdir(moved)
    assert all_texts(path_config("part-*.csv")) == all_texts(path_config(".")) == EXPECTED


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    folder = split_over(tmp_path / "a", 11, ".csv.gz")
    cfg = path_config(folder)
    reading = sources.read(cfg, "train")
    found = [row.columns["prompt"] for row in reading]
    names = sorted(os.listdir(folder))
    frames = [pandas.read_csv(folder / name) for name in names]
    assert found == list(pandas.concat(frames)["prompt"])
    hashes = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
    assert reading.identity == sources.identity("path", cfg.train) == ["csv", hashes]


def test_where_files_lie_does_not_count_their_bytes_do(tmp_path):
    one = split_over(tmp_path / "a", 2, ".csv")
    first = data.content_hashes(path_config(one))
    two = one.rename(tmp_path / "b")
    assert data.content_hashes(path_config(two)) == first
    assert data.content_hashes(path_config(f"{two}/*.csv")) == first
    stat = os.stat(two / "part-0.csv")
    (two / "part-0.csv").write_text((two / "part-0.csv").read_text().replace("c0", "d0"))
    os.utime(two / "part-0.csv", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert data.content_hashes(path_config(two)) != first
    (tmp_path / "a.txt").write_text("a\n\nb\n\nc\n")
    hashes = {
        data.content_hashes(
            path_config(
                tmp_path / "a.txt", train=SourceConfig(str(tmp_path / "a.txt"), sample_by=by),
                prompt="", completion="{text}",
            )
        )["train"]
        for by in ("document", "paragraph", "line")
    }  # fmt: skip
    assert len(hashes) == 3


def test_each_file_must_have_the_columns(tmp_path):
    folder = split_over(tmp_path / "a", 2, ".csv")
    (folder / "part-1.csv").write_text("prompt,answer\na,b\n")
    assert f"(line 2 of {folder / 'part-1.csv'})" in only_error(path_config(folder))
    (folder / "part-1.csv").write_text("")  # an empty one is none of a folder's faults
    assert len(all_texts(path_config(folder))) == 30


@pytest.mark.parametrize(
    ("names", "path", "expected"),
    [
        (["a.csv", "b.jsonl"], "", "hold files of one kind; '{}' has 'a.csv' and 'b.jsonl'; choos"),
        (["a.csv", "b.jsonl"], "*", "hold files of one kind; '{}' has 'a.csv' and 'b.jsonl'"),
        (["train.csv", "test-1.csv"], "", "files of one split; '{}' has 'test-1.csv' and 'train."),
        (["a.csv", "b.csv.zst"], "", "'{}' has 'b.csv.zst'; use files that end with .jsonl"),
        (["data-0.arrow", "state.json"], "", "has 'data-0.arrow'; write the dataset with its to_p"),
        (["dataset_dict.json"], "", "has 'dataset_dict.json'; write the dataset with its to_parq"),
        (["a.csv", "b.xml"], "*", "'{}' has 'b.xml'; use files that end with"),
        (["a.md", ".b.csv"], "", "must be a folder with data files; '{}' has none; put files tha"),
        (["x/a.csv", "y/a.csv"], "", "'{}' has none, but subfolders: x, y; give one of them"),
        (["a.csv"], "*.jsonl", "must match a file; '{}' matches no file, seen from "),
        (["train.csv"], "trian.csv", "'{}' does not exist, seen from "),
        (["train.csv"], "train", "did you mean '{folder}/train.csv'?"),
    ],
)
def test_paths_that_cannot_be_read_as_one(tmp_path, names, path, expected):
    folder = tmp_path / "data"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("prompt,completion\na,b\n")
    asked = folder / path if path else folder
    assert expected.format(asked, folder=folder) in only_error(path_config(asked))


def test_what_is_an_id_of_the_hub(tmp_path, monkeypatch):
    """Nothing here of that name, ORG/NAME, and no name of a data file."""
    monkeypatch.chdir(tmp_path)
    cfg = path_config("tatsu-lab/alpaca", test=SourceConfig("./none/here"))
    assert data.check(cfg)[0].startswith("data.test.path: must be a file, a folder, a glob or a da")
    cfg.test = SourceConfig(path="openai/gsm8k", split="test", subset="main", revision="f00")
    assert data.check(cfg) == []
    assert sources.remote_paths(cfg) == ["tatsu-lab/alpaca", "openai/gsm8k"]
    assert sources.identity("path", cfg.test) == ["main", "test", "openai/gsm8k", "f00"]
    (tmp_path / "openai").mkdir()
    assert "use data=hub if it is an id of the hub" in data.check(cfg)[0]
    for missing in ("alpaca", "data/train.jsonl", "/org/name", "org/name/", "a/b/c"):
        assert "does not exist, seen from" in data.check(path_config(missing))[0], missing
    write(tmp_path / "openai" / "gsm8k", ROWS)
    assert "must have a name that ends with" in data.check(cfg)[0]  # what is here comes first


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("a.jsonl", {"split": "test"}, "split: must be left out with a local file or folder; got "),
        ("a.jsonl", {"subset": "x"}, "subset: must be left out with a local file or folder"),
        ("a.jsonl", {"sample_by": "line"}, "sample_by: must be left out with jsonl files; got 'li"),
    ],
)
def test_keys_that_would_do_nothing(tmp_path, name, source, expected):
    path = write(tmp_path / name, ROWS)
    error = only_error(path_config(path, train=SourceConfig(path=path, **source)))
    assert error.startswith(f"data.train.{expected}")


def test_duplicate_keys_are_refused_for_jsonl_too(tmp_path):
    """json.loads keeps the last one; which one was meant is anybody's guess."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "completion": "c"}\n')
    assert "line 1 of" in only_error(jsonl(path)) and "twice" in only_error(jsonl(path))


def test_conversations_are_passed_on_as_they_are(tmp_path):
    """Lists, nulls and objects; `tools` may be there or not, and only text is checked as text."""
    turns = [
        [
            {"role": "user", "content": f"é{i}", "n": None},  # a struct of parquet has every key
            {"role": "assistant", "content": "a", "n": i},
        ]
        for i in range(40)
    ]
    rows = [{"messages": turn} for turn in turns]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    pandas.DataFrame(rows).to_parquet(tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.json", "c.parquet"):
        cfg = path_config(tmp_path / name, format="messages")
        assert [row.columns["messages"] for row in sources.read(cfg, "train")] == turns
        assert len(all_texts(cfg)) == 40
    cfg.messages = "massages"
    assert "data.messages: every column must be one of messages" in only_error(cfg)


# Parts in [[ ]]

ALPACA = "### Instruction:\n{instruction}\n\n[[### Input:\n{input}\n\n]]### Response:\n"


def test_alpaca_as_stanford_writes_it(tmp_path):
    """Two templates there, chosen by `input`; null and a missing key are plain here."""
    given = {"instruction": "Add [[1]] {x}", "output": "a"}
    inputs = {"text": "2 ]]", "empty": "", "blank": " \n", "null": None}
    rows = [{**given, "input": value} for value in inputs.values()] + [given, {**given, "input": 0}]
    with_input = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    without = "### Instruction:\n{instruction}\n\n### Response:\n"
    expected = [
        (with_input if row.get("input") == 0 or (row.get("input") or "").strip() else without)
        .replace("{instruction}", row["instruction"]).replace("{input}", str(row.get("input")))
        for row in rows
    ]  # fmt: skip
    test = SourceConfig(write(tmp_path / "a.jsonl", rows))
    train = SourceConfig(write(tmp_path / "b.jsonl", [{**given, "input": i} for i in range(30)]))
    cfg = DataConfig("a", "path", train=train, test=test, prompt=ALPACA, completion="{output}")
    found = sorted(example.prompt for example in data.load(cfg).test)
    assert found == sorted(expected)


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        ("[[a {x}]]b", {"x": ""}, "b"),
        ("[[a {x}]]b", {"x": "1"}, "a 1b"),
        ("[[{x}{y}]][[{y}]]", {"x": "", "y": "2"}, "2"),
        ("[[[{x}]]]", {"x": "1"}, "[1]"),
        ("[[[{x}]]]", {"x": ""}, ""),
        ("[[[[INST]]]] [[{x}]]", {"x": "1"}, "[[INST]] 1"),
        ("[[a[0] {x}]] [b]", {"x": "1"}, "a[0] 1 [b]"),
        ("{{[[{x}]]}}", {"x": "[[{y}]]"}, "{[[{y}]]}"),
        ("a ]] b {x}", {"x": "1"}, "a ]] b 1"),  # without [[ nothing has changed
    ],
)
def test_optional_parts(template, row, expected):
    assert data.templates.render(data.templates.parse(template), row) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("[[a {prompt}", "[[ must be closed by ]]; put two brackets of the text as four"),
        ("[[a [[{prompt}]]]]", "[[ must be closed by ]]"),
        ("[[{prompt}]] a ]]", "[[ must be closed by ]] before another one opens"),
        ("[[INST]] {prompt}", "between [[ and ]] there must be a column; four brackets are two of"),
        ("[[[[[{prompt}]]", "[[[[[ can be read in several ways"),
        ("[[{promt}]]", "data.prompt: every column must be one of prompt, completion"),
    ],
)
def test_bad_optional_parts(tmp_path, template, expected):
    assert expected in only_error(jsonl(write(tmp_path / "a.jsonl", ROWS), prompt=template))


def test_content_hashes_of_templates(tmp_path):
    """Taken at version 0.2.0: a template without [[ is hashed as it always was."""
    path = write(tmp_path / "a.jsonl", numbered(100))
    test = SourceConfig(write(tmp_path / "b.jsonl", numbered(9)))
    hashes = data.content_hashes(jsonl(path, test=test, prompt="Q ]] {prompt} [x]"))
    assert hashes["train"].startswith("91e8b3e37b93a339")
    assert data.content_hashes(jsonl(path))["test"].startswith("d426655270a9a8bd")


# Looking


def test_a_look(tmp_path):
    rows = [{"q": "é" * i, "n": i, "m": [{"role": "user"}]} for i in range(5)] + [{"q": None}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    seen = look(path)
    frame = pandas.DataFrame(rows)
    assert (seen.kind, seen.files, seen.num_rows) == ("json", [path], len(frame))
    assert list(seen.columns) == list(frame.columns)
    assert seen.columns["q"].types == {"str": 5, "NoneType": 1}
    assert seen.columns["q"].most_characters == frame["q"].str.len().max()
    empty = frame.isna().sum() + (frame == "").sum()
    assert {name: column.num_empty for name, column in seen.columns.items()} == dict(empty)
    assert seen.columns["n"].examples == [0, 1, 2]
    folder = split_over(tmp_path / "b", 3, ".csv.gz")
    assert (look(folder).num_rows, look(f"{folder}/*0*").num_rows) == (60, 20)
    assert look(folder).columns["prompt"].examples == ["p0", "p3", "p6"]
    path.write_text('[{"a": 1}, 2]')
    for bad, expected in ((path, "row 2 of .*: it is 2"), ("org/name", "this machine")):
        with pytest.raises(sources.Refused, match=expected):
            look(bad)
