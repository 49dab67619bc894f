"""What a command does before it trains is done once, and nothing is imported that it does not use.

The references are Hydra's own loader, pyarrow's own arrays and the modules of a fresh process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import compositions
import numpy as np
import pyarrow as pa
import pytest
from conftest import say
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from hydra_plugins.lorabench_launcher._loader import for_jobs
from lorabench import adapters, arrays, cli
from lorabench import model as base_model
from lorabench.cli import composing
from lorabench.sweep.needs import Needs

TINY = [
    "trainer.steps=1", "trainer.batch_size=2", "trainer.num_threads=1", "trainer.device=cpu",
    "trainer.eval_base=false", "data.num_train=8", "data.num_validation=2", "data.num_test=2",
    "lora.r=1", "tracker=none", "target_modules=attention",
]  # fmt: skip
# Installed beside lorabench, imported at will by what it does import, and of no use to `train`.
UNUSED = (
    "pandas", "sklearn", "datasets", "wandb", "matplotlib", "tensorboard", "torchvision",
    "scipy.stats", "pyarrow.dataset", "transformers.trainer", "torch._inductor.compile_fx",
)  # fmt: skip


@pytest.mark.slow
def test_train_imports_nothing_it_does_not_use(tmp_path: Path) -> None:
    """One process: pandas came with the first pyarrow.array, which cost 0.3 s."""
    code = (
        "import gc, json, sys\n"
        "from lorabench.cli import main\n"
        f"words = {['train', *TINY, f'output_dir={tmp_path}']!r}\n"
        "code = main(words)\n"
        f"found = [name for name in {UNUSED!r} if name in sys.modules]\n"
        "print(json.dumps([code, found, gc.isenabled(), gc.get_freeze_count()]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    code, found, is_collecting, num_frozen = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert found == []
    assert is_collecting
    # Everything torch, transformers and PEFT made: collections and the exit pass over it.
    assert num_frozen > 100_000


def test_a_command_does_what_its_runs_share_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six runs of one base and two adapters: one skeleton, two trials of PEFT, each file once."""
    calls: dict[str, list[Any]] = {"skeleton": [], "attach": [], "read": []}
    skeleton, attach = base_model.skeleton, adapters.inject._attach_skeleton
    read = ConfigRepository.load_config

    def counted_skeleton(*args: Any) -> Any:
        calls["skeleton"].append(args)
        return skeleton(*args)

    def counted_attach(*args: Any) -> Any:
        calls["attach"].append(args)
        return attach(*args)

    def counted_read(self: ConfigRepository, config_path: str) -> Any:
        calls["read"].append(config_path)
        return read(self, config_path)

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", compositions.inner)
    monkeypatch.setattr(base_model, "skeleton", counted_skeleton)
    monkeypatch.setattr(adapters.inject, "_attach_skeleton", counted_attach)
    monkeypatch.setattr(ConfigRepository, "load_config", counted_read)
    # What a traced step does is its own: it puts adapters on skeletons of fewer layers.
    monkeypatch.setattr(Needs, "_trace", lambda self, jobs: None)
    words = [*TINY, f"output_dir={tmp_path}", "-m", "lora.r=1,2", "seed=0,1,2"]
    said = say("plan", "--json", *words)
    assert said.code == 0, said.err
    assert len(calls["skeleton"]) == 1
    assert len(calls["attach"]) == 2
    # Once for the sweep's own settings, once for all of its jobs.
    assert max(calls["read"].count(path) for path in calls["read"]) <= 2, calls["read"]


JOBS = [
    ["head=exclude", "lora.r=16", "seed=0"],
    ["head=exclude", "lora.r=32", "seed=1"],
    ["head=lora", "lora.r=16", "hydra.launcher.pack_size=2"],
    ["head=exclude", "lora.r=16", "seed=0"],
    ["experiment=lm_head", "target_modules=custom", "target_modules.names=[q,v]"],
    ["trainer=smoke", "+lora.foo=1", "~tracker", "hydra.job.name=other"],
    ["hydra.searchpath=[file://{own}]", "lora=mine", "seed=2"],
    ["lora=r32", "data.train.path=${{oc.env:HOME}}", "lora.rank_pattern={{q_proj:12}}"],
]


def test_jobs_are_composed_as_hydra_composes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, types and flags of every node; no job sees what another one set."""
    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", compositions.inner)
    monkeypatch.setattr(ConfigRepository, "load_config", compositions.load_config)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine.yaml").write_text("r: 3\nlora_alpha: 5\n")
    cli.register()
    stock = ConfigLoaderImpl(composing._search_path(None, None))
    master = stock.load_configuration("train", ["lora.lora_alpha=7"], RunMode.MULTIRUN)
    ours = for_jobs(stock)
    assert ours is not stock
    for words in JOBS:
        words = [word.format(own=tmp_path) for word in words]
        expected = stock.load_sweep_config(master, words)
        found = ours.load_sweep_config(master, words)
        assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(expected)
        assert nodes(found) == nodes(expected)


def test_a_job_is_refused_as_hydra_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", compositions.inner)
    cli.register()
    stock = ConfigLoaderImpl(composing._search_path(None, None))
    master = stock.load_configuration("train", [], RunMode.MULTIRUN)
    ours = for_jobs(stock)
    for words in (["head=none"], ["lora.rank=4"], ["seed=0,1"], ["lora.r="], ["lora.r=many"]):
        said = []
        for loader in (stock, ours, ours):  # a refusal leaves nothing behind
            with pytest.raises(HydraException) as refused:
                loader.load_sweep_config(master, words)
            said.append(f"{refused.value} {refused.value.__cause__}")
        assert said[0] == said[1] == said[2]


def nodes(node: Any) -> Any:
    """A config as plain data: of every node its type, its flags and its value, unresolved."""
    meta = node._metadata
    flags = sorted((meta.flags or {}).items())
    head = (type(node), meta.ref_type, meta.object_type, meta.optional, meta.key, flags)
    content = node.__dict__["_content"] if isinstance(node, DictConfig | ListConfig) else None
    if isinstance(content, dict):
        return head, {key: nodes(child) for key, child in content.items()}
    if isinstance(content, list):
        return head, [nodes(child) for child in content]
    return head, node._value()


@pytest.mark.parametrize("texts", [[], [""], ["a", "", "é\n", "日本" * 1000], ["x"] * 5000])
def test_texts_become_the_array_that_pyarrow_makes(texts: list[str]) -> None:
    found = arrays.strings(texts)
    found.validate(full=True)
    assert found.equals(pa.array(texts, pa.string()))


@pytest.mark.parametrize("values", [
    np.arange(7), np.array([0.5, np.nan, np.inf]), np.array([1, 0], np.int8),
    np.arange(12.0).reshape(3, 4)[:, 1], np.array([], np.float64),
])  # fmt: skip
def test_numbers_become_the_array_that_pyarrow_makes_and_come_back(values: np.ndarray) -> None:
    found = arrays.numbers(values)
    found.validate(full=True)
    expected = pa.array(values)
    assert found.type == expected.type
    np.testing.assert_array_equal(found.to_numpy(), expected.to_numpy())
    column = pa.chunked_array([expected, expected.slice(1)])
    np.testing.assert_array_equal(arrays.values_of(column), column.to_numpy())
