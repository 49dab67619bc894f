"""The files of conf/, and how they are composed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import compositions
import pytest
import yaml
from conftest import composed
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import OmegaConf

from lorabench import cli
from lorabench.cli import composing

CONF = Path(__file__).parents[1] / "conf"
FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.rglob("*.yaml"))
# What a file of a group cannot know: keys that it leaves to the user (`???` or null).
LEFT_TO_USER = {
    "model/local": ["model.path=/nowhere"],
    "target_modules/custom": ["target_modules.names=[q_proj]"],
    "data/jsonl": ["data.train.path=nowhere.jsonl"],
    "data/path": ["data.train.path=nowhere.csv"],
    "data/gym": ["data.gym={chain_sum: null}"],
    "data/hub": ["data.train.path=some/where"],
    "data/classes": ["task=seq_cls", "head=full"],
}


@pytest.mark.parametrize("mode", [RunMode.RUN, RunMode.MULTIRUN])
@pytest.mark.parametrize(
    "words",
    [
        ["lora.r=4", "head=lora", "data.train.path=a", "lora.rank_pattern={q_proj:12}"],
        ["experiment=lm_head", "lora.r=3", "target_modules=custom", "target_modules.names=[q,v]"],
        ["trainer=smoke", "seed=3", "seeds.data=1", "stages=last_layer_first", "+lora.foo=1"],
        ["head=exclude,lora", "seed=0,1", "hydra.sweep.dir=x", "hydra/launcher=basic", "~tracker"],
    ],
)
def test_the_shortcut_of_these_tests_composes_as_hydra_does(words, mode):
    cli.register()
    loader = ConfigLoaderImpl(composing._search_path(None, None))
    for shortcut in (False, True, True):  # composed, kept, copied
        load = compositions.load if shortcut else compositions.inner
        try:
            found = OmegaConf.to_container(load(loader, "train", words, mode), resolve=False)
        except ConfigCompositionException as error:
            found = str(error)
        if not shortcut:
            expected = found
        assert found == expected
    assert isinstance(found, dict) == (mode == RunMode.MULTIRUN or "seed=0,1" not in words)


def test_there_are_files_to_test():
    """The next test must not pass by testing nothing."""
    groups = {path.parts[0] for path in FILES if len(path.parts) == 2}
    assert groups == {
        "recipe",
        "model",
        "target_modules",
        "head",
        "lora",
        "data",
        "trainer",
        "stages",
        "tracker",
        "experiment",
    }
    assert all(path.parent == Path() or len(path.parts) == 2 for path in FILES)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_composes_and_says_what_it_is_for(file):
    text = (CONF / file).with_name(f"{file.name}.yaml").read_text()
    assert text.startswith("#")
    if file == Path("train"):
        composed()
        return
    group, name = file.parts
    found = composed(f"{group}={name}", *LEFT_TO_USER.get(str(file), []))
    if "@package _global_" in text:
        return
    given = {k: v for k, v in yaml.safe_load(text).items() if v not in ("???", None)}
    given.pop("defaults", None)
    ours = asdict(getattr(found, group))
    for key, value in given.items():
        if isinstance(value, dict):
            left = {k for k, v in value.items() if v is None}
            assert {k: ours[key][k] for k in value if k not in left} == {
                k: v for k, v in value.items() if k not in left
            }
        else:  # YAML 1.1 reads 1e-3 as text, OmegaConf as a number
            assert ours[key] == (float(value) if isinstance(ours[key], float) else value)
