"""Readers of data files: references are json, pandas, pyarrow and datasets, called plainly."""

import csv
import decimal
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorabench.data import readers
from lorabench.data.readers import objects, opening

# Without surrogates, which no UTF-8 file holds, and without zero bytes, which no text file does.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
OBJECTS = st.lists(st.dictionaries(TEXT, JSON, min_size=1, max_size=3), min_size=1, max_size=6)


def cells(path, **kwargs):
    found = list(readers.rows(path, **kwargs))
    assert not [row for row in found if row.error], found
    return [row.columns for row in found]


@pytest.fixture
def small_blocks(monkeypatch):
    """Values are cut by the ends of blocks, as in a file of gigabytes."""

    def set_to(size):
        monkeypatch.setattr(opening, "BLOCK_BYTES", size)

    return set_to


@settings(deadline=None, max_examples=60)  # shared cores
@given(
    rows=OBJECTS, block=st.integers(1, 40), indent=st.sampled_from([None, 1]), ascii=st.booleans()
)
def test_json_is_what_json_reads(tmp_path_factory, rows, block, indent, ascii):
    """Whatever the form, and wherever a block ends in it: within a number, an escape, a key."""
    folder = tmp_path_factory.mktemp("json")
    dumped = [json.dumps(row, ensure_ascii=ascii, indent=indent) for row in rows]
    wrapped = {"version": 12, "empty": [], "numbers": [1, 23], "data": rows, "last": {"a": -1.5}}
    forms = {
        "array.json": json.dumps(rows, ensure_ascii=ascii, indent=indent),
        "wrapped.json": json.dumps(wrapped, ensure_ascii=ascii, indent=indent),
        "lines.jsonl": "\r\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows),
    }
    if len(rows) > 1:  # a single object may itself be a wrapper
        forms["lines.json"] = "\n".join(dumped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "BLOCK_BYTES", block)
        for name, text in forms.items():
            (folder / name).write_text(text, encoding="utf-8", newline="")
            assert cells(folder / name) == rows, name
        patch.setattr(objects, "LOOK_CHARACTERS", 0)  # as if it were too large to be held
        assert cells(folder / "wrapped.json") == rows


@settings(deadline=None, max_examples=40)
@given(
    table=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=5),
    block=st.integers(1, 40),
    end=st.sampled_from(["\n", "\r\n"]),
    delimiter=st.sampled_from([("csv", ","), ("tsv", "\t")]),
    bom=st.booleans(),
)
# Blocks that hold a part of the byte order mark, and nothing but it.
@example(table=[("", "", "")], block=1, end="\n", delimiter=("csv", ","), bom=True)
@example(table=[("", "", "")], block=3, end="\n", delimiter=("csv", ","), bom=True)
def test_cells_are_the_text_that_was_written(tmp_path_factory, table, block, end, delimiter, bom):
    """Written by Python's csv. 007, 1e3, NA, true, dates and empty cells are text."""
    table = [
        ("007", "1e3", "NA"),
        ("true", "2020-01-01", ""),
        ('say "hi", ok', "a\r\nb", "\n"),
        *table,
    ]
    path = tmp_path_factory.mktemp("csv") / f"a.{delimiter[0]}"
    with open(path, "w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
        writer = csv.writer(  # unless told to, it leaves a carriage return without quotes
            file, delimiter=delimiter[1], lineterminator=end, quoting=csv.QUOTE_ALL
        )
        writer.writerows([("a", "b", "ö c"), *table])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "BLOCK_BYTES", block)
        assert [tuple(row.values()) for row in cells(path)] == table
    assert list(cells(path)[0]) == ["a", "b", "ö c"]


def test_csv_as_pandas_reads_it_as_text(tmp_path):
    """The lines are those of the file: a cell with line breaks spans several."""
    import pandas

    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n\n"1\n2",007\n" x ",\n3.0,NA\n', encoding="utf-8")
    frame = pandas.read_csv(path, dtype=str, keep_default_na=False)
    assert cells(path) == frame.to_dict("records")
    assert [row.number for row in readers.rows(path)] == [3, 5, 6]


def test_long_cells(tmp_path):
    """csv's own limit is 131,072 characters."""
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,completion\n{'x' * 200_000},y\n")
    assert len(cells(path)[0]["prompt"]) == 200_000


def test_parquet_is_what_pyarrow_reads(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {
            "messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": None}],
            "text": f"t{i}", "number": i, "nothing": None, "price": decimal.Decimal("1.50"),
        }
        for i in range(2500)  # several batches
    ]  # fmt: skip
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    expected = [{**row, "price": "1.50"} for row in parquet.read_table(path).to_pylist()]
    assert cells(path) == expected
    assert cells(path, only=["text"]) == [{"text": row["text"]} for row in rows]
    assert cells(path, only=["text", "other"]) == expected  # so that all names can be told


@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
def test_text_is_what_datasets_reads(tmp_path, sample_by):
    """Blank rows aside, which datasets keeps."""
    import datasets

    path = tmp_path / "a.txt"
    path.write_bytes("one\r\ntwo\n\nthree\u2028 four\nfive\n\n\n\nsix\n".encode())
    datasets.disable_progress_bars()
    table = datasets.load_dataset(
        "text", data_files=str(path), sample_by=sample_by, split="train", cache_dir=tmp_path / "c"
    )
    datasets.enable_progress_bars()
    expected = [text.strip("\n") for text in table["text"] if text.strip()]
    assert [row["text"].strip("\n") for row in cells(path, sample_by=sample_by)] == expected


def test_a_document_keeps_all_of_its_text(tmp_path):
    text = "\n  one\n\ntwo\n"
    (tmp_path / "a.txt").write_text(text)
    assert cells(tmp_path / "a.txt") == [{"text": text}]


ROWS = [{"prompt": f"é{i}\u2028", "completion": "😀"} for i in range(50)]


def written(kind, rows):
    if kind == "parquet":
        import pandas

        file = io.BytesIO()
        pandas.DataFrame(rows).to_parquet(file)
        return file.getvalue()
    if kind == "json":
        return json.dumps(rows, ensure_ascii=False).encode()
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0], delimiter="\t" if kind == "tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_the_digest_is_of_the_bytes_that_lie_there(tmp_path, kind, ending, small_blocks):
    """Two gzip members and all: what is hashed is what is trained on."""
    small_blocks(700)
    content = written(kind, ROWS)
    if ending:
        half = len(content) // 2
        content = gzip.compress(content[:half]) + gzip.compress(content[half:])
    path = tmp_path / f"A.{kind.upper()}{ending}"  # the case of an ending does not count
    path.write_bytes(content)
    digest = hashlib.sha256()
    assert cells(path, digest=digest) == ROWS
    assert digest.hexdigest() == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_encodings_that_a_byte_order_mark_tells(tmp_path, encoding, kind, small_blocks):
    small_blocks(33)  # characters are cut
    path = tmp_path / f"a.{kind}"
    path.write_bytes(written(kind, ROWS).decode().encode(encoding))
    assert cells(path) == ROWS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt.gz"])
def test_rows_are_not_held(tmp_path, name, small_blocks):
    """A reader that holds the file, or its rows, takes more than its 4 MB."""
    small_blocks(1 << 16)
    rows = [{"prompt": "p" * 400, "completion": str(i)} for i in range(10_000)]
    kind = name.split(".")[1]
    content = b"x" * 399 + b"\n"
    content = content * 10_000 if kind == "txt" else written(kind, rows)
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    del rows, content
    tracemalloc.start()
    count = sum(1 for _ in readers.rows(tmp_path / name, sample_by="line"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 10_000
    assert peak < 2e6  # some blocks of 64 KiB, as bytes, text and lines


def test_readers_are_light(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n1,2\n"))
    code = (
        "import sys; from pathlib import Path; from lorabench.data import readers\n"
        f"print(list(readers.rows(Path({str(path)!r})))[0].columns, "
        "[m for m in ('torch', 'datasets', 'pyarrow', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "{'a': '1', 'b': '2'} []", done.stderr
