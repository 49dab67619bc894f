"""Content hashes: what changes each of them, and that they are of the bytes that were read."""

import hashlib
import os
import time

import pytest
from sources import hub, hub_folder, jsonl, numbered, skills_config, texts, write

from lorabench import data, hashes
from lorabench.config import ConfigErrors, SourceConfig
from lorabench.data import files, sources
from lorabench.data.sources import files as source_files


@pytest.fixture
def settled(monkeypatch):
    """Files count as old at once, so that results are remembered in a test's short life."""
    monkeypatch.setattr(hashes, "RACY_SECONDS", 0.0)


def changed(cfg, other):
    """The splits whose hash differs."""
    one, two = data.content_hashes(cfg), data.content_hashes(other)
    assert set(one) == {"train", "validation", "test"}
    return {split for split in one if one[split] != two[split]}


ALL, HELD_OUT = {"train", "validation", "test"}, {"validation", "test"}


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"name": "x", "max_length": 7, "metric": ["nll"], "add_bos": False}, set()),
        ({"prompt": "Q {prompt}"}, ALL),
        ({"split_by": "completion"}, ALL),
        ({"test_fraction": 0.1}, ALL),
        ({"validation_fraction": 0.1}, ALL),
        ({"num_train": 3}, {"train"}),
        ({"num_test": 3}, {"test"}),
        ({"num_validation": 3}, {"validation"}),
    ],
)
def test_sets_taken_from_train(tmp_path, kwargs, expected):
    path = write(tmp_path / "a.jsonl", numbered(100))
    assert changed(jsonl(path), jsonl(path, **kwargs)) == expected


def test_where_a_file_lies_does_not_count_its_bytes_do(tmp_path):
    path = write(tmp_path / "a.jsonl", numbered(100))
    assert changed(jsonl(path), jsonl(write(tmp_path / "b.jsonl", numbered(100)))) == set()
    assert changed(jsonl(path), jsonl(write(tmp_path / "c.jsonl", numbered(99)))) == ALL


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"test": "c.jsonl"}, {"test"}),  # a run need not train again for another test set
        ({"validation": "c.jsonl"}, {"validation"}),
        ({"num_test": 3}, {"test"}),
        ({"split_by": "completion", "test_fraction": 0.3, "validation_fraction": 0.3}, set()),
    ],
)
def test_sets_of_their_own(tmp_path, kwargs, expected):
    """Settings that decide nothing about a split are no part of its hash."""
    for name, number in (("a", 100), ("b", 20), ("c", 30)):
        write(tmp_path / f"{name}.jsonl", numbered(number))
    own = {split: SourceConfig(path=str(tmp_path / "b.jsonl")) for split in HELD_OUT}
    other = {
        key: SourceConfig(path=str(tmp_path / value)) if key in HELD_OUT else value
        for key, value in kwargs.items()
    }
    path = tmp_path / "a.jsonl"
    assert changed(jsonl(path, **own), jsonl(path, **(own | other))) == expected
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    one = data.content_hashes(jsonl(path, **own))
    assert one["validation"] == one["test"]  # the same rows


def test_templates_of_one_split(tmp_path):
    path = write(tmp_path / "a.jsonl", numbered(100))
    test, other = SourceConfig(path=path), SourceConfig(path=path, prompt="Q {prompt}")
    assert changed(jsonl(path, test=test), jsonl(path, test=other)) == {"test"}


def test_skills_and_hub(tmp_path):
    assert changed(skills_config(), skills_config(name="x")) == set()
    assert changed(skills_config(), skills_config(num_test=19)) == {"test"}
    assert changed(skills_config(), skills_config(skills=["greek"])) == ALL
    one, two = (SourceConfig(path="a/b", revision=revision) for revision in ("1", "2"))
    assert changed(hub("a/b", train=one), hub("a/b", train=two)) == {"train", "validation"}
    folder = hub_folder(tmp_path)
    first = data.content_hashes(hub(folder))
    (folder / ".hidden").touch()
    moved = folder.rename(tmp_path / "moved")
    assert data.content_hashes(hub(moved)) == first
    (moved / "data" / "test-00000-of-00001.parquet").unlink()
    assert data.content_hashes(hub(moved)) != first


def test_load_hashes_what_it_read(tmp_path):
    path = write(tmp_path / "a.jsonl", [*numbered(100), {"prompt": "p", "completion": ""}])
    test = SourceConfig(path=write(tmp_path / "b.jsonl", numbered(9)))
    for cfg in (jsonl(path), jsonl(path, test=test, num_train=5), skills_config()):
        assert data.load(cfg).hashes == data.content_hashes(cfg)


def test_an_edit_between_check_and_load_shows_in_the_hash(tmp_path, monkeypatch):
    """A hash taken before reading would be that of other examples than were trained on."""
    path = tmp_path / "a.jsonl"
    cfg = jsonl(write(path, numbered(100)))
    before, check = data.content_hashes(cfg), sources.check

    def check_then_edit(cfg):
        errors = check(cfg)
        write(path, numbered(101))
        return errors

    monkeypatch.setattr(sources, "check", check_then_edit)
    splits = data.load(cfg)
    monkeypatch.undo()
    assert splits.hashes == data.content_hashes(cfg) != before
    assert ("p100", "c100") in texts([*splits.train, *splits.validation, *splits.test])


def test_a_line_that_breaks_between_check_and_load_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    cfg = jsonl(write(path, numbered(100)))
    monkeypatch.setattr(sources, "check", lambda cfg: [])
    path.write_text(path.read_text() + '{"prompt": ')
    with pytest.raises(ConfigErrors, match=r"must not change while it is read; line 101 of"):
        data.load(cfg)


@pytest.mark.usefixtures("settled")
def test_unchanged_files_are_read_once(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    cfg = jsonl(write(path, numbered(100)))
    first = data.content_hashes(cfg)
    monkeypatch.setattr(hashes, "fresh_hash", None)  # not called again
    monkeypatch.setattr(source_files, "_check", None)
    assert data.content_hashes(cfg) == first
    os.replace(write(tmp_path / "b.jsonl", numbered(100)), path)  # the same size, another inode
    with pytest.raises(TypeError):
        data.content_hashes(cfg)


def test_an_edit_that_keeps_size_and_time_is_seen(tmp_path):
    """Size and time of modification alone do not tell: editors and rsync restore the time."""
    path = tmp_path / "a.jsonl"
    seen = set()
    for word in ("aaa", "bbb", "ccc"):
        rows = [{"prompt": f"p{i}", "completion": word} for i in range(10, 99)]
        os.utime(write(path, rows), (1e9, 1e9))
        assert hashes.file_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()
        seen.add(data.content_hashes(jsonl(path))["train"])
    assert len(seen) == 3


def test_a_recent_file_is_never_remembered(tmp_path, monkeypatch):
    """Two edits within one tick of the file system's clock leave one stamp."""
    path = tmp_path / "a.jsonl"
    now = time.time_ns()
    same = hashes.Signature(1, 1, 4, 0, now)
    monkeypatch.setattr(hashes.Signature, "of", lambda path: same)
    path.write_text("aaaa")
    remembered = files.Remembered(9)
    results = iter((1, 2))
    assert remembered.get(path, "k", lambda: next(results)) == 1
    assert not remembered.results
    assert remembered.get(path, "k", lambda: next(results)) == 2
