"""Files that cannot be read as what they seem: where, why and what to do, in one line."""

import gzip
import json
import os

import pytest
from rights import mode
from sources import numbered, write

from lorabench import data
from lorabench.config import ConfigErrors, DataConfig, SourceConfig, split_refusal

GOOD = '{"prompt": "a", "completion": "b"}\n'
PACKED = gzip.compress(GOOD.encode(), mtime=0)  # the same in every process
PACKED_PAR1 = gzip.compress(b"PAR1", mtime=0)
CSV = "prompt,completion\n"


def path_config(path, **kwargs):
    train = SourceConfig(path=str(path))
    return DataConfig(**{"name": "mine", "source": "path", "train": train, **kwargs})


def only_error(cfg):
    errors = data.check(cfg)
    assert len(errors) == 1, errors
    with pytest.raises(ConfigErrors) as raised:
        data.load(cfg)
    assert raised.value.errors == errors
    (error,) = errors
    assert "\n" not in error
    parts = split_refusal(error)
    assert parts["key"].startswith("data.") and parts["law"] and (parts["got"] or parts["remedy"])
    return error


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        # Bytes that are no text
        ("a.jsonl", GOOD.encode() + b'{"prompt": "caf\xe9"}', "in line 2 of {} (byte 50); conv"),
        (
            "a.csv",
            CSV.encode() + b"a,b\nc,\xff\xfe\n",
            "invalid start byte in line 3 of {} (byte 24)",
        ),
        ("a.csv", CSV.encode() + b"caf\xe9,b\n", "iconv -f WINDOWS-1252 -t UTF-8 '{}' > NEW"),
        ("a.csv", f"\ufeff{CSV}1,2\n".encode("utf-16-le") + b"\0", "truncated data in line 3 of"),
        ("a.csv", "\ufeffa\n".encode("utf-16-le") + b"\x00\xd8\n\0", "be UTF-16-LE text; illegal"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8"),
        # Other files
        (
            "a.jsonl",
            PACKED,
            "'{}' is compressed with gzip; rename it to 'a.js",
        ),
        (
            "a.parquet",
            PACKED_PAR1,
            "must be a parquet file; '{}' is none, or is torn",
        ),
        ("a.jsonl.gz", GOOD.encode(), "must be gzip, as its name says; '{}' is not; remove .gz"),
        (
            "a.jsonl.gz",
            PACKED[:-9],
            "must be a whole gzip file; '{}' is torn",
        ),
        (
            "a.jsonl.gz",
            PACKED + b"more",
            "'{}' is torn: Not a gzipped file",
        ),
        ("a.csv", b"PAR1....PAR1", "'{}' is a parquet file; rename it to end with .parquet"),
        ("a.csv", b"PK\x03\x04....", "'{}' is a zip archive or a spreadsheet; unpack it"),
        ("a.json", b"\x28\xb5\x2f\xfd....", "'{}' is compressed with zstd; unpack it with"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "torn: Parquet magic bytes"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\n",
            "Git LFS pointer, not the data",
        ),
        ("a.parquet", b"", "must be a parquet file; '{}' is none, or is torn: "),
        ("a.xml", b"<a/>", "must have a name that ends with .jsonl, .ndjson, .json, .csv, .tsv"),
        ("noname", GOOD.encode(), "got '{}'; rename the file, or use data=jsonl for JSON lines"),
        # JSON
        (
            "a.jsonl",
            b'{"prompt": 1, "completion": 2, "prompt": 3}',
            "line 1 of {}: key 'prompt' oc",
        ),
        (
            "a.json",
            b'[\n{"prompt": 1, "completion": 2},\n{"x": {"k": 1, "k": 1}}]',
            "line 3 of {}: key 'k' occurs",
        ),
        (
            "a.jsonl",
            b'{"prompt": "a", "completion": "b", "s": NaN}',
            "line 1 of {}: NaN is no JSON",
        ),
        ("a.json", b'[{"a": -Infinity}]', "line 1 of {}: -Infinity is no JSON number"),
        (
            "a.jsonl",
            GOOD.encode() + b'{"a": "\\ud83d"}',
            "line 2 of {}: column 'a' holds an unpair",
        ),
        ("a.json", b'[{"a": ["\\uDE00\\ud83d"]}]', "row 1 of {} (line 1): column 'a' holds an un"),
        ("a.json", b'[{"\\ud83d": 1}]', "column '\\ud83d' holds an unpaired surrogate"),
        (
            "a.jsonl",
            b'{"prompt": null, "completion": "b"}',
            "line 1 of {}: column 'prompt' holds No",
        ),
        ("a.jsonl", b'[{"prompt": "a"}]', "a file that is an array must be named .json"),
        ("a.json", b'[{"prompt": "a", "completion": "b"},\n {"prompt": "c"', "line 2 of {}: Expec"),
        ("a.json", b'[{"prompt": "a", "completion": "b"}] x', "line 1 of {}: text after the end"),
        ("a.json", b'[{"prompt": "a", "completion": "b"}, 7]', "row 2 of {} (line 1): it is 7"),
        ("a.json", b'[{"prompt": "a", "completion": oops}]', "Expecting value at 'oops}}]'"),
        ("a.json", b'"text"', "line 1 of {}: no object and no array"),
        ("a.json", b"[" * 100_000, "it is nested too deeply"),
        ("a.json", b"[]", "must hold at least one example; {} is empty"),
        ("a.json", b"", "must hold at least one example; {} is empty"),
        ("a.json", b'{"a": [{"x": 1}], "b": [{"y": 1}]}', "list of objects; {} holds 'a' and 'b'"),
        # csv
        ("a.csv", CSV.encode() + b"a,b\nc\n", "line 3 of {}: it has 1 cells, the header 2"),
        ("a.csv", CSV.encode() + b"a,b,c\n", "line 2 of {}: it has 3 cells, the header 2"),
        ("a.csv", CSV.encode() + b'a,"b\nc,d\n', "line 2 of {}: a quote is opened that no other"),
        ("a.csv", CSV.encode() + b'a,"b"c\n', "line 2 of {}: ',' expected after '\"'"),
        ("a.csv", b"prompt,completion\ra,b\r", "line 1 of {}: a carriage return stands outside"),
        (
            "a.csv",
            b"prompt;completion\na;b\n",
            "separated by commas; the first line of {} has semi",
        ),
        (
            "a.tsv",
            CSV.encode(),
            "must have cells separated by tabs; the first line of {} has commas",
        ),
        ("a.csv", b"a,b,a\n1,2,3\n", "'a' stands 2 times in the first line of {}"),
        ("a.csv", CSV.encode(), "must hold at least one example; {} is empty"),
        ("a.csv", b"promt,completion\na,b\n", "unknown: 'prompt' (did you mean 'promt'?)"),
    ],
)
def test_bad_files(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    assert expected.format(path) in only_error(path_config(path))


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([b"bytes"], "holds b'bytes'"),
        (["2020-01-01"], "holds datetime.date"),
        ([None], "holds None"),
        ([["list"]], "holds ['list']"),
    ],
)
def test_parquet_cells_that_are_no_text(tmp_path, cells, expected):
    import datetime

    import pyarrow as pa
    from pyarrow import parquet

    cells = [datetime.date(2020, 1, 1)] if cells == ["2020-01-01"] else cells
    parquet.write_table(pa.table({"prompt": ["a"], "completion": cells}), tmp_path / "a.parquet")
    error = only_error(path_config(tmp_path / "a.parquet"))
    assert f"row 1 of {tmp_path / 'a.parquet'}: column 'completion' {expected}" in error


def test_what_is_unused_may_hold_anything(tmp_path):
    rows = [{**row, "meta": [None, {"a": 1}], "score": None} for row in numbered(50)]
    assert data.check(path_config(write(tmp_path / "a.jsonl", rows))) == []


def test_pipes_devices_and_links(tmp_path):
    """Data is read to be checked and read again to be used: a pipe would be empty by then."""
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    for source in ("path", "jsonl"):
        error = only_error(path_config(pipe, source=source))
        assert "is a pipe, and data is read more than once; write it into a file first" in error
    assert "'/dev/null' is a device" in only_error(path_config("/dev/null"))
    write(tmp_path / "real.jsonl", numbered(50))
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    (tmp_path / "dead.jsonl").symlink_to("nowhere.jsonl")
    assert data.check(path_config(tmp_path / "link.jsonl")) == []
    assert "is a link to 'nowhere.jsonl', which does" in only_error(
        path_config(tmp_path / "dead.jsonl")
    )


def test_rights(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    file = folder / "a.jsonl"
    write(file, numbered(50))
    with mode(file, 0):
        assert f"must be readable; {file}: Permission denied" in only_error(path_config(file))
    with mode(folder, 0):
        for path in (file, folder, f"{folder}/*.jsonl"):
            assert "closed" in only_error(path_config(path))
        for path in (file, folder):
            assert "Permission denied; correct its rights" in only_error(path_config(path))


@pytest.mark.parametrize("path", ["a\0b.jsonl", "x" * 300 + ".jsonl", "~nobody-here/a.jsonl", ""])
def test_names_that_no_file_can_have(path):
    assert only_error(path_config(path)).startswith("data.train.path: must be ")


def test_a_row_that_breaks_between_check_and_load(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    rows = numbered(100)
    path.write_text(json.dumps(rows))
    cfg = path_config(path)
    assert data.check(cfg) == []
    monkeypatch.setattr(data.sources, "check", lambda cfg: [])
    path.write_text(json.dumps([*rows, 7]))
    with pytest.raises(ConfigErrors, match=r"must not change while it is read; row 101 of .*: it"):
        data.load(cfg)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigErrors, match=r"^data\.train\.path: must be UTF-8 text; "):
        data.load(cfg)
