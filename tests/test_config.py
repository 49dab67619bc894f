"""The configs: every key there, every range kept, every error shown at once."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import asdict
from functools import cache

import pytest
import yaml
from conftest import composed
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig

from lorabench import cli, config
from lorabench.config import ConfigErrors, LoraSettings


def refused(*overrides: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        composed(*overrides)
    return caught.value.errors


@cache
def defaults() -> DictConfig:
    (cfg,), *_ = cli.compose([])
    return cfg


def with_values(*overrides: str) -> DictConfig:
    """The default config with values set as YAML reads them: Hydra's parser has its own tests."""
    cfg = defaults().copy()
    for override in overrides:
        key, _, value = override.partition("=")
        OmegaConf.update(cfg, key, OmegaConf.create(f"a: {value}").a)
    return cfg


def refused_values(*overrides: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        config.typed(with_values(*overrides))
    return caught.value.errors


OUT_OF_RANGE = [  # override, how its only error begins, what it must also hold
    ("task=seq_clas", "task: must be one of causal_lm, seq_cls", "(did you mean 'seq_cls'?)"),
    ("trainer.dtype=float33", "trainer.dtype: must be one of", "(did you mean 'float32'?)"),
    ("model.attn_implementation=sdap", "model.attn_implementation: must be one of", "'sdpa'"),
    ("head.policy=loar", "head.policy: must be one of exclude, lora, full", "'lora'"),
    ("target_modules.select=all-liner", "target_modules.select: must be one of", "'all-linear'"),
    (
        "target_modules.names=[q_proj]",
        "target_modules.names: must be left out",
        "target_modules=custom",
    ),
    ("lora.r=0", "lora.r: must be at least 1", "got 0"),
    ("lora.r=-4", "lora.r: must be at least 1", "got -4"),
    ("lora.lora_alpha=0", "lora.lora_alpha: must be above 0", "got 0"),
    ("lora.lora_alpha=-1", "lora.lora_alpha: must be above 0", "got -1"),
    ("lora.lora_alpha=.nan", "lora.lora_alpha: must be above 0", "got nan"),
    ("lora.lora_alpha=.inf", "lora.lora_alpha: must be above 0", "got inf"),
    ("lora.alpha_ratio=0", "lora.alpha_ratio: must be above 0", "got 0"),
    ("lora.lora_dropout=-0.1", "lora.lora_dropout: must be in [0, 1)", "got -0.1"),
    ("lora.lora_dropout=1", "lora.lora_dropout: must be in [0, 1)", "got 1"),
    ("lora.lora_dropout=.nan", "lora.lora_dropout: must be in [0, 1)", "got nan"),
    ("lora.bias=some", "lora.bias: must be one of none, lora_only, all", "'some'"),
    ("lora.init=gausian", "lora.init: must be one of", "'gaussian'"),
    ("lora.loraplus_lr_ratio=0", "lora.loraplus_lr_ratio: must be above 0", "got 0"),
    ("lora.loraplus_lr_ratio=.inf", "lora.loraplus_lr_ratio: must be above 0", "got inf"),
    ("lora.rank_pattern={q_proj: 0}", "lora.rank_pattern.q_proj: must be a", "got 0"),
    ("lora.alpha_pattern={q_proj: 0}", "lora.alpha_pattern.q_proj: must be above 0", "got 0"),
    ("data.skills=[]", "data.skills: must be at least one skill", "[]"),
    ("data.min_word_length=9", "data.min_word_length: must be in [1, max_word_length=8]", "got 9"),
    ("data.metric=[]", "data.metric: must be a list", "nll"),
    ("data.metric=[exact]", "data.metric: must be one of", "'exact_match'"),
    ("data.metric=[answer]", "data.answer_pattern: must be a regular expression where", "None"),
    ("data.answer_stop=['']", "data.answer_stop: must be a list of texts, none of them", "['']"),
    ("data.metric=[flexible]", "data.metric: must be one of nll, exact_match", "'flexible'"),
    ("data.answer_pattern='('", "data.answer_pattern: must be a regular expression", ""),
    ("data.max_length=1", "data.max_length: must be at least 2 tokens", "got 1"),
    ("data.num_train=0", "data.num_train: must be at least 1", "got 0"),
    ("data.answer_examples=0", "data.answer_examples: must be at least 1", "got 0"),
    ("data.validation_fraction=0", "data.validation_fraction: must be in (0, 1)", "got 0"),
    (
        "data.test_fraction=0.97",
        "data.test_fraction: must be such that some examples are left",
        "0.97",
    ),
    (
        "trainer.micro_batch_size=3",
        "trainer.micro_batch_size: must be a divisor of trainer.batch_size=8",
        "got 3",
    ),
    ("trainer.micro_batch_size=0", "trainer.micro_batch_size: must be a divisor", "got 0"),
    ("trainer.micro_batch_size=16", "trainer.micro_batch_size: must be a divisor", "got 16"),
    ("trainer.steps=0", "trainer.steps: must be at least 1", "got 0"),
    ("trainer.batch_size=0", "trainer.batch_size: must be at least 1", "got 0"),
    ("trainer.warmup_steps=-1", "trainer.warmup_steps: must be at least 0", "got -1"),
    ("trainer.checkpoint_minutes=nan", "trainer.checkpoint_minutes: must be 0 or more", "got nan"),
    ("trainer.checkpoint_every=-1", "trainer.checkpoint_every: must be at least 0", "got -1"),
    ("trainer.lr=0", "trainer.lr: must be above 0", "got 0"),
    ("trainer.lr=.inf", "trainer.lr: must be above 0", "got inf"),
    ("trainer.weight_decay=-1", "trainer.weight_decay: must be at least 0", "got -1"),
    ("trainer.eps=0", "trainer.eps: must be above 0", "got 0"),
    ("trainer.beta2=1", "trainer.beta2: must be in [0, 1)", "got 1"),
    ("trainer.max_grad_norm=0", "trainer.max_grad_norm: must be above 0 or null", "got 0"),
    ("trainer.num_threads=0", "trainer.num_threads: must be at least 1 or null", "got 0"),
    ("trainer.schedule=cosin", "trainer.schedule: must be one of", "'cosine'"),
    ("trainer.dtype=float64", "trainer.dtype: must be model.dtype=float32", "'float64'"),
    ("trainer.device=gpu", "trainer.device: must be auto, cpu, mps, cuda or cuda:N", "'gpu'"),
    ("tracker.kind=wanbd", "tracker.kind: must be one of wandb, trackio, ", "'wandb'"),
    ("tracker.mode=of", "tracker.mode: must be one of", "'of'"),
    ("seeds.init=-1", "seeds.init: must be at least 0", "got -1"),
    ("stages=[late]", "stages[0]: must be a mapping", "'late'"),
    ("sweep=a/b", "sweep: must be one folder name", "'a/b'"),
    ("sweep=..", "sweep: must be one folder name", "'..'"),
]


@pytest.mark.parametrize(
    ("override", "begins", "holds"), OUT_OF_RANGE, ids=[o for o, _, _ in OUT_OF_RANGE]
)
def test_a_value_out_of_range_is_refused_with_the_law_and_what_came(override, begins, holds):
    errors = refused_values(override)
    # A dtype no one knows is not the model's either: the law of its key comes first.
    errors = errors[:1] if override.startswith("trainer.dtype=") else errors
    assert len(errors) == 1
    assert errors[0].startswith(begins) and holds in errors[0]


def test_an_orthogonal_init_needs_even_ranks():
    orthogonal = "lora.init=orthogonal"
    assert refused_values(orthogonal, "lora.r=3") == [
        "lora.r: must be even with lora.init=orthogonal; got 3; use 4"
    ]
    assert refused_values(orthogonal, "lora.rank_pattern={q_proj: 5, v_proj: 4}") == [
        "lora.rank_pattern.q_proj: must be even with lora.init=orthogonal; got 5; use 6"
    ]
    (error,) = refused_values(orthogonal, "lora.r=-1")  # once
    assert error.startswith("lora.r: must be at least 1")
    assert config.typed(with_values(orthogonal, "lora.r=2")).lora.init == "orthogonal"


@pytest.mark.parametrize(
    "override",
    [
        "lora.r=1",
        "lora.lora_alpha=0.001",
        "lora.lora_dropout=0",
        "lora.lora_dropout=0.999",
        "trainer.micro_batch_size=8",
        "trainer.micro_batch_size=1",
        "trainer.max_grad_norm=null",
        "trainer.steps=1",
        "trainer.beta1=0",
        "trainer.device=cuda:1",
        "trainer.dtype=bfloat16",
        "data.max_length=2",
        "data.min_word_length=8",
        "sweep=a.b-c_1",
    ],
)
def test_the_edge_of_a_range_belongs_to_it(override):
    key, _, value = override.partition("=")
    node = asdict(config.typed(with_values(override)))
    for part in key.split("."):
        node = node[part]
    assert node == yaml.safe_load(value)


def test_alpha_given_twice_is_refused_whatever_the_values():
    (error,) = refused("lora.lora_alpha=32", "lora.alpha_ratio=2")
    assert "lora_alpha=32" in error and "alpha_ratio=2" in error and "one of them" in error


def test_all_errors_of_a_config_are_shown_at_once():
    wrong = {
        "lora.r": "0",
        "lora.lora_dropout": "2",
        "trainer.lr": "-1",
        "data.max_length": "0",
        "trainer.micro_batch_size": "3",
        "tracker.mode": "on",
        "seeds.data": "-1",
    }
    errors = refused(*(f"{key}={value}" for key, value in wrong.items()))  # through Hydra's parser
    assert sorted(error.partition(":")[0] for error in errors) == sorted(wrong)


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("+foo=1", "foo", ""),
        ("+trainr={}", "trainr", "'trainer'"),
        ("+lora.foo=1", "lora.foo", ""),
        ("+lora.lora_alfa=1", "lora.lora_alfa", "'lora_alpha'"),
        ("+data.train.splt=x", "data.train.splt", "'split'"),
    ],
)
def test_a_key_added_by_force_is_refused_with_the_nearest(override, key, meant):
    (error,) = refused(override)
    assert error.startswith(f"{key}: no such key") and meant in error


@pytest.mark.parametrize(
    "override",
    [
        "lora.r=abc",
        "lora.r=1.5",
        "lora.lora_dropout=high",
        "lora.use_rslora=some",
        "trainer.steps=many",
        "data.skills=greek",
        "lora.r=null",
        "seeds.init=x",
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_key(override, capsys):
    assert cli.main(["plan", override]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{override.partition('=')[0]}: ")


@pytest.mark.parametrize("key", ["model.path", "data.name"])
def test_a_key_without_a_value_is_named(key):
    (error,) = refused(f"{key}=???")
    assert error.startswith(f"{key}: must be given") and f"set {key}=" in error


@pytest.mark.parametrize("r", [1, 8, 64])
def test_alpha_is_twice_r_unless_given(r):
    assert config.lora_alpha(composed(f"lora.r={r}").lora) == 2 * r
    assert config.lora_alpha(composed(f"lora.r={r}", "lora.alpha_ratio=0.5").lora) == r / 2
    assert config.lora_alpha(composed(f"lora.r={r}", "lora.lora_alpha=3").lora) == 3


@pytest.mark.parametrize("name", ["r16", "r32", "r64"])
def test_the_lora_files_hold_what_they_are_called(name):
    lora = composed(f"lora={name}").lora
    assert lora.r == int(name[1:]) and config.lora_alpha(lora) == 2 * lora.r


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("r", "alpha"), [(4, 8), (16, 8), (64, 1)])
def test_the_scale_is_pefts_own(r, alpha, rslora):
    import torch
    from peft import get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    settings = LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=["0"])
    (stock,) = [m for m in get_peft_model(model, settings).modules() if hasattr(m, "scaling")]
    ours = config.scale(LoraSettings(r=r, lora_alpha=alpha, use_rslora=rslora))
    assert ours == pytest.approx(
        stock.scaling["default"], rel=1e-15
    )  # same two operations, in float64
    assert ours == pytest.approx(alpha / (math.sqrt(r) if rslora else r), rel=1e-15)


def test_our_defaults_are_pefts_where_both_have_one():
    """alpha and r are our choice (2 r, 16); the rest of a plain run is PEFT's."""
    peft, ours = LoraConfig(), LoraSettings()
    for key in ("lora_dropout", "bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        assert (getattr(ours, key) or None) == (getattr(peft, key) or None), key


# DESIGN.md, "Keys a user meets"
DESIGN_KEYS = [
    "model",
    "target_modules",
    "target_modules.names",
    "target_modules.exclude",
    "head",
    "lora.r",
    "lora.lora_alpha",
    "lora.alpha_ratio",
    "lora.lora_dropout",
    "lora.bias",
    "lora.use_rslora",
    "lora.init",
    "data.metric",
    "data.max_length",
    "task",
    "trainer.steps",
    "trainer.batch_size",
    "trainer.micro_batch_size",
    "trainer.lr",
    "trainer.checkpoint_every",
    "trainer.checkpoint_minutes",
    "trainer.dtype",
    "trainer.device",
    "stages",
    "tracker.mode",
    "tracker.project",
    "tracker.entity",
    "seed",
    "seeds.init",
    "seeds.data",
    "seeds.dropout",
    "sweep",
    "output_dir",
]


def test_all_keys_of_the_design_are_in_the_composed_config():
    (cfg,), *_ = cli.compose([])
    content = OmegaConf.to_container(cfg, resolve=True)
    for key in DESIGN_KEYS:
        node = content
        for part in key.split("."):
            assert part in node, key
            node = node[part]
    assert (
        content["seed"] == 0
        and content["output_dir"] == "outputs"
        and content["sweep"] == "default"
    )
    assert set(DESIGN_KEYS) <= set(config.keys())


def test_keys_lists_what_a_composed_config_holds():
    def dotted(node: object, prefix: str = "") -> set[str]:
        if not isinstance(node, dict) or not node:
            return {prefix[:-1]}
        return {prefix[:-1]} | {
            key for name, value in node.items() for key in dotted(value, f"{prefix}{name}.")
        }

    (cfg,), *_ = cli.compose([])
    assert set(config.keys()) == dotted(OmegaConf.to_container(cfg, resolve=True)) - {""}


def test_seed_moves_the_three_streams_and_each_can_move_alone():
    assert asdict(composed("seed=5").seeds) == {"init": 5, "data": 5, "dropout": 5}
    assert asdict(composed("seed=5", "seeds.data=1").seeds) == {"init": 5, "data": 1, "dropout": 5}


def test_the_computation_follows_the_models_dtype():
    assert composed("model.dtype=float64").trainer.dtype == "float64"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("google/gemma-2b", "gemma-2b"),
        ("lorabench:tiny-gemma", "tiny-gemma"),
        ("/data/models/mine/", "mine"),
        ("gpt2", "gpt2"),
    ],
)
def test_a_base_without_a_name_is_called_by_its_path(path, name):
    assert config.model_name(config.ModelConfig(path=path)) == name
    assert config.model_name(config.ModelConfig(path=path, name="other")) == "other"


def test_the_room_imports_without_torch_peft_and_hydra():
    code = (
        "import sys, lorabench.config; "
        "print([m for m in ('torch', 'peft', 'hydra') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
