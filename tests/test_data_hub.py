"""data=hub: a local folder, against datasets itself; a hub that cannot be reached."""

import pytest
from sources import hub, hub_folder, run_python, texts

from lorabench import data
from lorabench.config import ConfigErrors, SourceConfig


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
