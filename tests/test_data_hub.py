"""data=hub: a local folder, against datasets itself; a hub that cannot be reached."""

import os

import pytest
from sources import hub, hub_folder, texts, write

from lorabench import data
from lorabench.config import ConfigErrors, DataConfig, SourceConfig


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Datasets' cache in the test's folder; its progress bars off."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


def test_local_folder_as_hub(tmp_path, cache):
    folder = hub_folder(tmp_path)
    cfg = hub(folder)
    assert data.check(cfg) == []
    splits = data.load(cfg)
    table = cache.load_dataset(str(folder), split="test")
    assert set(texts(splits.test)) == {(f"{row['q']}=", str(row["n"])) for row in table}
    assert len(splits.train) + len(splits.validation) == 50
    assert splits.notes == []


def test_an_edit_that_keeps_size_and_time_is_trained_on(tmp_path, cache):
    """Datasets answers from its cache: the new hash would be recorded beside the old text."""
    folder = tmp_path / "d"
    folder.mkdir()
    cfg = hub(folder, test=SourceConfig(), prompt="{prompt}", completion="{completion}")
    seen = []
    for word in ("aaa", "zzz"):
        rows = [{"prompt": f"p{i}", "completion": word} for i in range(10, 50)]
        os.utime(write(folder / "train.jsonl", rows), (1e9, 1e9))
        splits = data.load(cfg)
        assert {e.completion for e in splits.train} == {word}
        assert splits.hashes == data.content_hashes(cfg)
        seen.append(splits.hashes["train"])
    assert seen[0] != seen[1]
    assert not list((tmp_path / "cache").glob("lorabench-*"))  # nothing stays behind


def test_a_folder_that_changes_while_it_is_read_is_refused(tmp_path, cache, monkeypatch):
    """Which of the two contents was trained on would be anybody's guess."""
    folder = hub_folder(tmp_path)
    load_dataset = cache.load_dataset

    def load_and_edit(*args, **kwargs):
        table = load_dataset(*args, **kwargs)
        (folder / "data" / "train-more.jsonl").write_text("{}")
        return table

    monkeypatch.setattr(cache, "load_dataset", load_and_edit)
    expected = r"must not change while it is read; .* was (\w{64}) before and (?!\1)\w{64} after;"
    with pytest.raises(ConfigErrors, match=expected):
        data.load(hub(folder))


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"prompt": "{qq}"}, "data.prompt: every column must be one of q, n, bad ('"),
        ({"completion": "{bad}"}, "row 1 of '"),
        ({"test": "nope"}, "data.test.path: must be a dataset that loads; "),
        ({"subset": "nope"}, "'nope' not found. Available: ['default']; correct the folder"),
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


def test_no_network_is_one_line(capfd):
    train = SourceConfig(path="no/such", revision="f00")
    with pytest.raises(ConfigErrors) as raised:
        data.load(DataConfig(name="h", source="hub", train=train))
    (line,) = str(raised.value).splitlines()
    assert line.startswith("data.train.path: must be a dataset that loads; 'no/such', split 't")
    assert "give a local folder as data.train.path" in line
    assert capfd.readouterr() == ("", "")
