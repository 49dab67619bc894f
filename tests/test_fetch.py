"""lorabench fetch and the Hub's refusals: the real client against a Hub of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import records, say
from hub_server import TOKEN, Hub, Repo, serving

from lorabench import fetch
from lorabench import hub as our_hub
from lorabench import model as base_model

RUN = [
    "trainer=smoke", "trainer.steps=1", "tracker=none", "lora.r=2", "target_modules=attention",
    "data.num_train=8", "data.num_validation=2", "data.num_test=2",
]  # fmt: skip
NAME = "org/name"


@pytest.fixture(scope="module")
def repo(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """A model as it is published: shards, the same weights in other formats, a README."""
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path_factory.mktemp("hub") / "m"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    others = ["pytorch_model.bin", "consolidated.safetensors", "original/params.json", "README.md"]
    return Repo.of(folder).files | dict.fromkeys(others, b"x" * 1000)


@pytest.fixture
def hub(repo: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that the client of this process asks, over an empty cache, without a token."""
    from huggingface_hub import constants

    with serving({f"models/{NAME}": Repo(dict(repo))}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        for name in (*our_hub.TOKENS, *fetch.PLACES):
            monkeypatch.delenv(name, raising=False)
        base_model.hub._hub_commit.cache_clear()
        base_model.dtypes._on_hub.cache_clear()
        yield hub
    base_model.hub._hub_commit.cache_clear()
    base_model.dtypes._on_hub.cache_clear()


def cached(tmp_path: Path) -> set[str]:
    folder = tmp_path / "cache" / "models--org--name" / "snapshots" / Repo({}).commit
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_fetch_downloads_what_a_run_needs_and_no_more(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", "/scratch/my home")
    words = ["-m", f"model={NAME}", "head=exclude,lora", *RUN]
    said = say("fetch", *words)
    assert said.code == 0, said.err
    files = hub.repos[f"models/{NAME}"].files
    weights = {name for name in files if name.startswith("model")}
    wanted = weights | {"config.json", "generation_config.json", "tokenizer.json"}
    assert cached(tmp_path) == wanted | {"tokenizer_config.json"} and len(weights) > 2
    assert set(hub.downloaded) == cached(tmp_path)
    total = sum(len(files[name]) for name in cached(tmp_path))
    model, place, _, command = said.out.splitlines()
    # Read first: the positions of the base, and the index, which names the shards.
    read = len(files["config.json"]) + len(files["model.safetensors.index.json"])
    assert model.startswith(f"model  {NAME} at {Repo({}).commit}: {len(cached(tmp_path))} files, ")
    assert f"{(total - read) / 1000:.1f} KB to download" in model
    assert place.endswith(f"/models--org--name/snapshots/{Repo({}).commit}")
    assert command == (
        "  HF_HOME='/scratch/my home' HF_HUB_OFFLINE=1 lorabench train " + " ".join(words)
    )
    hub.downloaded.clear()
    again = say("fetch", *words)
    assert again.code == 0 and "0 B to download" in again.out and hub.downloaded == []


@pytest.mark.slow
def test_what_was_fetched_trains_without_a_network(hub: Hub, tmp_path: Path) -> None:
    """The command that fetch prints, in a process of its own, after the Hub is gone."""
    words = [f"model={NAME}", *RUN, f"output_dir={tmp_path / 'out'}"]
    assert say("fetch", *words).code == 0
    hub.repos.clear()
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "cache")
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-m", "lorabench", "train", *words],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    (record,) = records(tmp_path / "out").values()
    assert record["provenance"]["revision"] == Repo({}).commit


def test_a_full_disk_is_refused_before_anything_is_downloaded(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: SimpleNamespace(free=12_000))
    said = say("fetch", f"model={NAME}")
    assert said.code == 2 and len(said.lines) == 1, said.err
    assert "got 0.0 MB free at" in said.err and "set HF_HOME to a folder on another" in said.err
    assert [name for name in hub.downloaded if name.endswith(".safetensors")] == []


@pytest.fixture
def data_set(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set of the Hub; returns its rows as they are stored."""
    import datasets

    lines = "".join(f'{{"q": "{i}+1", "a": "{i + 1}"}}\n' for i in range(60))
    files = {"README.md": b"---\n---\n", "data/train.jsonl": lines.encode()}
    hub.repos["datasets/org/set"] = Repo(files, commit="f" * 40)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "tables")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.address)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return lines


COLUMNS = ["data.prompt='{q}'", "data.completion='{a}'"]
PLACES = {
    "hub": ["data=hub", "data.train.path=org/set", *COLUMNS],
    "path": ["data=path", "data.train.path=org/set", *COLUMNS],
    "a mixture": ["data=path", "data.mixture=[{path: org/set}]", *COLUMNS],
    "generated data": ["data.retention={path: org/set, prompt: '{q}', completion: '{a}'}"],
}


@pytest.mark.parametrize("place", PLACES)
def test_a_data_set_is_fetched_with_its_model(place: str, hub: Hub, data_set: str) -> None:
    words = [f"model={NAME}", *PLACES[place]]
    said = say("fetch", *words)
    assert said.code == 0, said.err
    told = next(line for line in said.out.splitlines() if line.startswith("data"))
    size = f"{len(data_set) / 1000:.1f} KB"
    assert told == f"data   org/set at {'f' * 40}: 1 file, {size} to download"
    hub.downloaded.clear()
    said = say("fetch", *words)
    assert said.code == 0 and f"1 file, 0 B to download, {size} there already" in said.out
    assert "data/train.jsonl" not in hub.downloaded


def test_a_data_set_that_is_not_there_is_refused_by_its_key(hub: Hub, data_set: str) -> None:
    words = ["data=path", "data.train.path=org/set", "data.tests={more: {path: org/sat}}"]
    line = refused("fetch", f"model={NAME}", *words, *COLUMNS)
    assert line.startswith("data.tests.more.path: 'org/sat' is no local folder and cannot be had")


def refused(verb: str, *words: str) -> str:
    said = say(verb, *words)
    assert said.code == 2 and len(said.lines) == 1, said.err + said.out
    return said.err


@pytest.mark.parametrize("verb", ["fetch", "plan", "train"])
def test_a_gated_model_names_its_page_and_the_token(
    verb: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[f"models/{NAME}"].gated = True
    words = [f"model={NAME}", *RUN, f"output_dir={tmp_path / 'out'}"]
    line = refused(verb, *words)
    assert "is gated or private and this machine may not read it (token: none); accept" in line
    assert "accept the licence at https://huggingface.co/org/name and set HF_TOKEN" in line
    (tmp_path / "token").write_text("hf_of_a_login")
    assert f"(token: from the login in {tmp_path / 'token'})" in refused(verb, *words)
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    assert "(token: from HF_TOKEN in the environment)" in refused(verb, *words)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    if verb == "fetch":
        assert say(verb, *words).code == 0


def test_what_is_not_there_names_the_revisions_in_the_cache(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    line = refused("fetch", "model=org/nane")
    assert "knows no 'org/nane' at that revision, or it is private (token: none)" in line
    assert "cached" not in line
    commit = Repo({}).commit
    assert say("fetch", f"model={NAME}", f"model.revision={commit}").code == 0
    told = f"; cached: {commit}; use model.revision={commit}\n"
    for verb in ("fetch", "plan"):
        assert refused(verb, f"model={NAME}", "model.revision=v2", *RUN).endswith(told)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refused("plan", f"model={NAME}", *RUN)
    assert "while HF_HUB_OFFLINE is set; run `lorabench fetch` with the same words" in line
    assert line.endswith(told)
    assert say("plan", f"model={NAME}", f"model.revision={commit}", *RUN).code == 0
    assert "must have a network; got HF_HUB_OFFLINE" in refused("fetch", f"model={NAME}")


MISSING: dict[str, tuple[list[str], dict[str, bytes], str]] = {
    "a shard": (["model-00002"], {}, "lacks model-00002-of-"),
    "safetensors": (["model"], {}, "weights must be safetensors"),
    "any weights": (["model", "pytorch"], {}, "lacks model.safetensors; use another base"),
    "an adapter beside": ([], {"adapter_config.json": b"{}"}, "must come without an adapter"),
}


@pytest.mark.parametrize("case", MISSING)
def test_weights_that_no_run_could_load_are_not_downloaded(case: str, hub: Hub) -> None:
    gone, added, told = MISSING[case]
    found = hub.repos[f"models/{NAME}"]
    kept = {n: b for n, b in found.files.items() if not n.startswith(tuple(gone))}
    found.files = (kept if gone else found.files) | added
    assert told in refused("fetch", f"model={NAME}")
    assert not any(name.endswith("safetensors") for name in hub.downloaded)


def test_a_local_base_has_nothing_to_download(tiny_folder: Callable[[str], Path], hub: Hub) -> None:
    said = say("fetch", f"model={tiny_folder('llama')}")
    assert said.code == 0 and "a folder of this machine, nothing to download" in said.out
    assert hub.downloaded == []


def test_mistakes_are_refused_before_the_hub_is_asked(hub: Hub) -> None:
    for words in (["data=jsonl", "data.train.path=nowhere.jsonl"], ["trainer.steps=-1"]):
        assert refused("fetch", f"model={NAME}", *words)
    assert refused("fetch", "--smoke")
    assert hub.downloaded == []
