"""Defaults of real models: what nobody chose comes from the model's recipe (conf/recipe/)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from conftest import records, say
from omegaconf import OmegaConf

from lorabench import cli, config
from lorabench import model as base_model
from lorabench.config import recipe
from lorabench.model.positions import positions

RECIPES = Path(cli.conf_folder()) / "recipe"
REAL: dict[str, Any] = {
    key: float(value) if key == "trainer.lr" else value
    for key, value in yaml.safe_load((RECIPES / "real.yaml").read_text())["recipe"][
        "values"
    ].items()
}
EXPERIMENT = "# @package _global_\ntrainer:\n  lr: 1e-4\ndata:\n  max_length: 300\n"
FILES = {
    "conf/experiment/mine.yaml": EXPERIMENT,
    "conf/trainer/mine.yaml": "steps: 7\nbatch_size: 8\n",
    "conf/model/mine.yaml": "path: big\nname: mine\n",
    "conf/recipe/mine.yaml": "# @package _global_\ndefaults:\n  - real\n  - _self_\n\nrecipe:\n"
    "  name: mine\n  values:\n    trainer.lr: 3e-5\n",
    "conf/model/own.yaml": "defaults:\n  - override /recipe@_global_.recipe: mine\n\npath: big\n",
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with data and two bases: `big` has 8,192 positions, `small` 64."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n} is", "completion": ("even", "odd")[n % 2]} for n in range(40)]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("small", "big"):
        shutil.copytree(base_model.ZOO / "tiny-gemma", name)
    content = json.loads(Path("big/config.json").read_text())
    Path("big/config.json").write_text(json.dumps(content | {"max_position_embeddings": 8192}))


@pytest.fixture
def own(place: None) -> None:
    """Presets of one's own in the working directory."""
    for name, text in FILES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)


DATA = ["data=jsonl", "data.train.path=train.jsonl", "tracker=none"]
# On a preset's own path the Hub would be asked.
BIG = ["model=gemma-2b", "model.path=big"]


def composed(*words: str) -> config.Config:
    (cfg,) = cli.compose(list(words)).configs
    return config.typed(cfg)


def values(found: config.Config) -> dict[str, Any]:
    """What a run has of the keys of the recipe."""
    flat = config.flatten(dataclasses.asdict(found) | {"recipe": None})
    return {key: flat[key] for key in REAL}


def planned(*words: str) -> dict[str, Any]:
    said = say("plan", "--json", *words)
    assert said.code == 0, said.out
    (run,) = json.loads(said.out)["runs"]
    return run


MODELS = {
    "a preset": BIG,
    "a folder": ["model=big"],
    "local": ["model=local", "model.path=big"],
}


@pytest.mark.parametrize("name", MODELS)
def test_any_real_model_takes_the_recipe(name: str) -> None:
    assert values(composed(*MODELS[name], *DATA)) == REAL


@pytest.mark.slow
def test_the_plan_tells_what_applies_and_what_does_not() -> None:
    words = [*BIG, *DATA, "trainer.batch_size=32"]
    told = (
        "defaults  of gemma-2b (recipe=real): trainer.lr 0.0002, trainer.warmup_ratio 0.03, "
        "trainer.gradient_checkpointing true, data.max_length 2048 (set otherwise: "
        "trainer.batch_size 32)"
    )
    assert told in say("plan", *words).out.splitlines()
    run = planned(*words)
    assert run["defaults"] == {
        "recipe": "real",
        "applied": {k: v for k, v in REAL.items() if v and k != "trainer.batch_size"},
        "otherwise": {"trainer.batch_size": 32},
    }
    assert run["warnings"] == []


# The words, and what they change.
CHOSEN: dict[str, tuple[list[str], dict[str, Any]]] = {
    # What the schema or the embedded bases have is a choice as well once it is written.
    "words": (
        [
            "trainer.lr=1e-3", "trainer.batch_size=8", "data.max_length=512",
            "trainer.gradient_checkpointing=false",
        ],
        {
            "trainer.lr": 1e-3, "trainer.batch_size": 8, "data.max_length": 512,
            "trainer.gradient_checkpointing": False,
        },
    ),
    "warm-up steps": (
        ["trainer.warmup_steps=20"],
        {"trainer.warmup_steps": 20, "trainer.warmup_ratio": None},
    ),
    "no warm-up": (["trainer.warmup_steps=0"], {"trainer.warmup_ratio": None}),
    "a ratio": (["trainer.warmup_ratio=0.1"], {"trainer.warmup_ratio": 0.1}),
    "no ratio": (["trainer.warmup_ratio=null"], {"trainer.warmup_ratio": None}),
    "trainer=default": (["trainer=default"], {}),
    "trainer=smoke": (
        ["trainer=smoke"],
        {"trainer.lr": 1e-4, "trainer.batch_size": 2, "trainer.warmup_ratio": None},
    ),
    "data": (["data=skills"], {"data.max_length": 24}),
}  # fmt: skip
OWN: dict[str, tuple[list[str], dict[str, Any]]] = {
    "an experiment, and a word": (
        [*BIG, "experiment=mine", "trainer.lr=1e-5"],
        {"trainer.lr": 1e-5, "data.max_length": 300},
    ),
    "a trainer, and a model without a recipe": (
        ["model=mine", "trainer=mine"], {"trainer.batch_size": 8}
    ),
    "a recipe": ([*BIG, "recipe=mine"], {"trainer.lr": 3e-5}),
    "a model's own recipe": (["model=own"], {"trainer.lr": 3e-5}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_what_anybody_writes_wins(name: str) -> None:
    words, changed = CHOSEN[name]
    assert values(composed(*BIG, *DATA, *words)) == REAL | changed


@pytest.mark.parametrize("name", OWN)
def test_what_own_presets_say_wins(name: str, own: None) -> None:
    words, changed = OWN[name]
    assert values(composed(*words, *DATA)) == REAL | changed


def test_a_multirun_takes_the_recipe_of_each_model() -> None:
    words = ["-m", "model=tiny-gemma,bert-base,big", "data.max_length=64", *DATA]
    found = [config.typed(one) for one in cli.compose(words).configs]
    assert [(one.recipe.name, one.trainer.lr, one.trainer.batch_size) for one in found] == [
        (None, 1e-3, 8), ("encoder", 3e-4, 32), ("real", 2e-4, 16)
    ]  # fmt: skip
    found = [config.typed(one) for one in cli.compose(["-m", *BIG, "trainer.lr=1e-5,2e-5"]).configs]
    assert [one.trainer.lr for one in found] == [1e-5, 2e-5]
    assert not any("trainer.lr" in one.recipe.applied for one in found)


def test_the_embedded_bases_have_the_defaults_of_the_schema() -> None:
    default = values(config.Config())
    for words in ([], ["experiment=stages"]):
        found = composed(*words)
        assert values(found) == default | {"data.max_length": 24} and found.recipe.name is None
    assert planned()["defaults"] == {}


def test_a_run_keeps_its_recipe_through_its_record(tmp_path: Path) -> None:
    words = [*BIG, *DATA, "trainer=smoke", "trainer.steps=1", "lora.r=2", "data.num_test=2"]
    assert say("train", *words).code == 0
    ((_, record),) = records(tmp_path / "outputs").items()
    kept = config.typed(OmegaConf.create(record["config"]))
    # The ratio is null: trainer=smoke says how many steps.
    assert kept.recipe.applied == [
        "data.max_length", "trainer.warmup_ratio", "trainer.gradient_checkpointing"
    ]  # fmt: skip
    assert record["plan"]["defaults"]["applied"] == {
        "data.max_length": 2048, "trainer.gradient_checkpointing": True
    }  # fmt: skip
    # The same values, written out, are the same run.
    written = [f"{key}={json.dumps(value)}" for key, value in values(kept).items()]
    assert planned(*words, *written)["run_id"] == record["run_id"]


@pytest.mark.parametrize("kind", ["GPT2Config", "BertConfig", "LlamaConfig", "Gemma3Config"])
def test_positions_are_those_that_transformers_reads(kind: str, tmp_path: Path) -> None:
    getattr(transformers, kind)().save_pretrained(tmp_path / "base")
    read = transformers.AutoConfig.from_pretrained(tmp_path / "base").get_text_config()
    found = positions(config.ModelConfig(path=str(tmp_path / "base")))
    assert found == read.max_position_embeddings


def test_lengths_fit_the_positions_of_the_base() -> None:
    few = [f"model={Path('small').absolute()}", *DATA]
    assert composed(*few).data.max_length == 64
    # An answer needs positions after a prompt, which leaves a token to the completion.
    answers = ["data.metric=[nll,answer]", "data.answer_pattern='(e)'"]
    more = [*few, *answers, "data.answer_max_new_tokens=33"]
    assert composed(*more).data.max_length == 64 - 33 + 1
    assert say("plan", "--json", *more).code == 0
    said = say("plan", *more, "data.max_length=33")
    assert said.code == 2 and "must fit the 64 positions" in said.err


WARNED = {
    "data=skills": ["data.source: skills are toy data", "data.max_length: 24 tokens"],
    "trainer.lr=1e-3": ["trainer.lr: 0.001 is more than 0.0005"],
    "trainer.lr=5e-4": [],
    "data.max_length=64": ["data.max_length: 64 tokens"],
    "data.max_length=65": [],
}


@pytest.mark.parametrize("word", WARNED)
def test_toys_on_a_real_model_are_warned_of(word: str) -> None:
    found = planned(*BIG, *(DATA if word != "data=skills" else []), word)["warnings"]
    assert len(found) == len(WARNED[word])
    for text, start in zip(found, WARNED[word], strict=True):
        assert text.startswith(start)


def test_nothing_is_warned_of_on_an_embedded_base() -> None:
    assert planned("trainer.lr=1")["warnings"] == []


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_marks_the_keys_that_it_has_values_for(file: Path) -> None:
    name = file.stem
    (cfg,) = cli.compose([f"recipe={name}", "model=local", "model.path=big", *DATA]).configs
    assert {*recipe.applied(cfg)} == {*cfg.recipe["values"]}
    assert cfg.recipe.name == (None if name == "embedded" else name)
    assert {*cfg.recipe["values"]} <= {*config.keys()}
