"""The bytes of a base: their hash is never a stale one, and what was planned is what is loaded."""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed, say

from lorabench import hashes
from lorabench import model as base_model
from lorabench.config import ConfigErrors, ModelConfig
from lorabench.model import verified

# PEFT asks transformers by a name that 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

Folder = Callable[[str], Path]


@pytest.fixture
def base(tiny_folder: Folder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "base"))


def model_at(folder: Path) -> ModelConfig:
    return composed("model=local", f"model.path={folder}").model


def flip_a_byte(path: Path) -> None:
    """Other content of the same size and mtime, as after `touch -d`, in the same file."""
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def refusal(error: pytest.ExceptionInfo[ConfigErrors]) -> str:
    (line,) = error.value.errors
    return line


# --- hashes ----------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every file is large and old enough to be remembered, here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LARGE_BYTES", 0)
    monkeypatch.setattr(hashes, "RACY_SECONDS", 0.0)
    hashes._remembered.cache_clear()
    return tmp_path / "cache" / "lorabench" / "hashes"


def test_other_bytes_of_the_same_size_and_time_are_another_base(base: Path, cache: Path) -> None:
    """A cache keyed by path, size and mtime would call them the same."""
    first = base_model.identity(model_at(base))["weights"]
    assert base_model.identity(model_at(base))["weights"] == first
    flip_a_byte(base / "model.safetensors")
    second = base_model.identity(model_at(base))["weights"]
    assert second != first
    # Put in its place by a rename, with the same time too.
    other = base.parent / "other.safetensors"
    shutil.copy2(base / "model.safetensors", other)
    flip_a_byte(other)
    os.replace(other, base / "model.safetensors")
    assert base_model.identity(model_at(base))["weights"] == first


def test_a_file_written_a_moment_ago_is_not_remembered(
    base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one tick of the file system's clock a second write leaves no other time."""
    monkeypatch.setattr(hashes, "RACY_SECONDS", 3600.0)
    base_model.identity(model_at(base))
    assert not cache.exists() and hashes._remembered.cache_info().currsize == 0


@pytest.mark.parametrize("content", [b"", b"0" * 63, b"Z" * 64, b"\xff\xfe", b"0" * 64 + b"\n"])
def test_a_broken_memory_is_ignored(base: Path, cache: Path, content: bytes) -> None:
    expected = base_model.identity(model_at(base))
    assert list(cache.iterdir())
    for path in cache.iterdir():
        path.write_bytes(content)
    hashes._remembered.cache_clear()
    assert base_model.identity(model_at(base)) == expected


def test_the_memory_is_used_and_a_home_without_room_only_costs_time(
    base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = base_model.identity(model_at(base))
    hashes._remembered.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(hashes, "fresh_hash", lambda path: pytest.fail(f"{path} was read again"))
        assert base_model.identity(model_at(base)) == expected
    shutil.rmtree(cache)
    hashes._remembered.cache_clear()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert base_model.identity(model_at(base)) == expected
    assert not list(cache.iterdir()), "no temporary file stays"


# --- what is loaded --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_loaded_base_does_not_hang_on_its_file(base: Path) -> None:
    """In a process of its own: a mapped file that is truncated ends it with SIGBUS."""
    code = (
        "import os, sys\n"
        "from lorabench import config, model\n"
        "where = sys.argv[1]\n"
        "base = model.load(config.ModelConfig(name='local', path=where), 'cpu')\n"
        "before = model.checksum(base)\n"
        "path = where + '/model.safetensors'\n"
        "with open(path, 'r+b') as file:\n"
        "    file.seek(1000)\n"
        "    file.write(b'\\xff' * (os.path.getsize(path) - 1000))\n"
        "assert model.checksum(base) == before, 'overwritten'\n"
        "os.truncate(path, 0)\n"
        "assert model.checksum(base) == before, 'truncated'\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(base)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["gemma", "gpt2", "bert"])
def test_tied_tensors_stay_tied(kind: str, tiny_folder: Folder) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder(kind))
    ours = base_model.load(model_at(tiny_folder(kind)), "cpu")

    def shared(model: Any) -> set[frozenset[str]]:
        names: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), set()).add(name)
        return set(map(frozenset, names.values()))

    assert shared(ours) == shared(theirs) and any(len(group) > 1 for group in shared(ours))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


def test_the_planned_base_loads_and_another_is_refused(base: Path) -> None:
    model = model_at(base)
    planned = base_model.identity(model)
    loaded = base_model.load_verified(model, "cpu", 0, planned)
    assert base_model.checksum(loaded) == base_model.checksum(base_model.load(model, "cpu"))
    assert len(base_model.tokenizer_verified(model, planned)) > 1
    flip_a_byte(base / "model.safetensors")
    now = base_model.identity(model)
    with pytest.raises(ConfigErrors) as error:
        base_model.load_verified(model, "cpu", 0, planned)
    assert refusal(error) == (
        f"model.path: must still be the base that was planned, weights {planned['weights'][:12]}; "
        f"'{base}' now has {now['weights'][:12]}; put it back, or repeat the command to plan with "
        f"the new one"
    )
    base_model.tokenizer_verified(model, planned)
    (base / "tokenizer_config.json").write_text((base / "tokenizer_config.json").read_text() + " ")
    with pytest.raises(ConfigErrors, match=f"tokenizer {planned['tokenizer'][:12]}; .*now has"):
        base_model.tokenizer_verified(model, planned)
    # A file that no loader reads: what changed is said, not that it does not load.
    (base / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ConfigErrors, match="must still be the base that was planned"):
        base_model.load_verified(model, "cpu", 0, planned)
    (base / "config.json").unlink()
    with pytest.raises(ConfigErrors, match="now has fewer files"):
        base_model.load_verified(model, "cpu", 0, planned)


def test_a_base_that_is_written_while_it_loads_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the old bytes are back once they are hashed."""
    model = model_at(base)
    planned = base_model.identity(model)
    inner = verified.load

    def disturbed(*arguments: Any) -> Any:
        flip_a_byte(base / "model.safetensors")
        loaded = inner(*arguments)
        time.sleep(0.02)  # the clock's tick
        flip_a_byte(base / "model.safetensors")
        return loaded

    monkeypatch.setattr(verified, "load", disturbed)
    with pytest.raises(ConfigErrors, match="must stay as it is while it is loaded"):
        base_model.load_verified(model, "cpu", 0, planned)


# --- an adapter beside the base --------------------------------------------------------------


def with_adapter(folder: Path) -> None:
    """Save an adapter of stock PEFT into the folder of its base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings).save_pretrained(folder)


def test_an_adapter_beside_the_base_is_refused(base: Path) -> None:
    with_adapter(base)
    said = say("train", "model=local", f"model.path={base}", "tracker=none")
    assert said.code == 2 and said.lines == [
        f"model.path: a base must come without an adapter; '{base}' holds adapter_config.json, "
        f"whose adapter transformers would load on top of the base; move it out, or merge it first"
    ]
    from transformers import AutoModelForCausalLM

    for load in (
        lambda: base_model.load(model_at(base), "cpu"),
        lambda: base_model.plain(model_at(base), AutoModelForCausalLM, "float32"),
    ):
        with pytest.raises(ConfigErrors, match="must come without an adapter"):
            load()


@pytest.mark.slow
def test_a_base_of_the_hub_is_the_planned_commit_without_an_adapter(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    """From a cache, where `main` has moved to another commit; one has an adapter, one pickles."""
    repo = tmp_path / "hub" / "models--org--base"
    commits = ["a" * 40, "b" * 40, "c" * 40, "d" * 40]
    for kind, commit in zip(("llama", "qwen3", "llama", "llama"), commits, strict=True):
        shutil.copytree(tiny_folder(kind), repo / "snapshots" / commit)
    with_adapter(repo / "snapshots" / commits[2])
    pickled = repo / "snapshots" / commits[3]
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commits[1])
    code = (
        "import sys\n"
        "from lorabench import config, model\n"
        "one = config.ModelConfig(name='hub', path='org/base')\n"
        "planned = {'hub': 'org/base', 'revision': sys.argv[1], 'weights': '', 'tokenizer': ''}\n"
        "try:\n"
        "    model.tokenizer_verified(one, planned)\n"
        "    print(model.load_verified(one, 'cpu', 0, planned).config.model_type)\n"
        "except config.ConfigErrors as error:\n"
        "    print(error)\n"
    )
    said = []
    for commit in commits:
        done = subprocess.run(
            [sys.executable, "-c", code, commit], capture_output=True, text=True, check=True,
            env=os.environ | {"HF_HOME": str(tmp_path)},
        )  # fmt: skip
        said.append(done.stdout.strip())
    assert said[:2] == ["llama", "qwen3"]
    assert "'org/base' holds adapter_config.json" in said[2]
    assert said[3].startswith("model.path: weights must be safetensors"), said[3]
    assert "'org/base' has pytorch_model.bin" in said[3] and "save_pretrained('NEW')" in said[3]


# --- the tokenizer's files -------------------------------------------------------------------


def test_every_file_that_a_tokenizer_of_transformers_reads_is_hashed(tmp_path: Path) -> None:
    from transformers import models

    names = set()
    for package in pkgutil.iter_modules(models.__path__):
        for module in pkgutil.iter_modules([f"{models.__path__[0]}/{package.name}"]):
            if not module.name.startswith("tokenization_"):
                continue
            try:
                found = importlib.import_module(f"{models.__name__}.{package.name}.{module.name}")
            except (ImportError, NameError):  # of a library that is not installed
                continue
            for one in vars(found).values():
                files = getattr(one, "vocab_files_names", None)
                if isinstance(files, dict):
                    names |= {name for name in files.values() if isinstance(name, str)}
    assert len(names) > 15, names
    assert names <= set(base_model.TOKENIZER_FILES), names - set(base_model.TOKENIZER_FILES)
    (tmp_path / "additional_chat_templates").mkdir()
    seen = set()
    for name in (
        *sorted(names), "chat_template.jinja", "additional_chat_templates/tool.jinja",
        "tokenizer.4.0.0.json", "tekken.json",
    ):  # fmt: skip
        (tmp_path / name).write_text(name)
        (tmp_path / "config.json").write_text("{}")
        seen.add(base_model.identity(model_at(tmp_path))["tokenizer"])
    assert len(seen) == len(names) + len({"chat_template.jinja", "additional", "4.0.0", "tekken"})
