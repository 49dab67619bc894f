"""What nobody chose: values of the model's recipe (conf/recipe/), and warnings about choices.

A recipe is the first layer of a config. It holds its values under `recipe.values`, by key, and puts
`${recipe:KEY}` where the key belongs. Whatever else sets the key (a preset, an experiment, the
command line) replaces that text, so the keys that still have it are those that nobody chose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lorabench.config.schema import Config, flatten, model_name

MARK = "${recipe:"
EMBEDDED = "lorabench:"
TOY_SOURCES = ("skills",)
# The highest rate in microsoft/LoRA's examples: 5e-4 for RoBERTa base (NLU/roberta_base_mnli.sh),
# 4e-4 for RoBERTa large, 2e-4 for GPT-2 medium, 1.3e-4 for DeBERTa XXL.
MOST_LR = 5e-4
SHORT = 64  # tokens: the positions of the embedded bases


def register(fitting: Callable[[DictConfig, int], int]) -> None:
    """Make `${recipe:KEY}` known to OmegaConf.

    Args:
        fitting: Returns how many tokens an example can have on the base of a composed config, at
            most the number it is given.
    """

    def value(key: str, *, _root_: DictConfig) -> Any:
        found = _root_.recipe["values"][key]
        if key == "data.max_length":
            return fitting(_root_, found)
        # Of these two a run takes one: steps that somebody chose take the place of the ratio.
        if key == "trainer.warmup_ratio" and not _is_marked(_root_.trainer, "warmup_steps"):
            return None
        return found

    OmegaConf.register_new_resolver("recipe", value, replace=True)


def _is_marked(group: DictConfig, name: str) -> bool:
    return OmegaConf.is_interpolation(group, name)


def applied(cfg: DictConfig) -> list[str]:
    """Return the keys of a composed config that nothing but the recipe sets."""
    if cfg.get("recipe") is None or not cfg.recipe.get("name"):
        return []
    names = {key.partition(".")[0] for key in cfg.recipe["values"]}
    raw = {
        name: OmegaConf.to_container(cfg[name], resolve=False) for name in sorted(names & set(cfg))
    }
    return [key for key, value in flatten(raw).items() if str(value).startswith(MARK)]


def shown(config: Config) -> dict[str, Any]:
    """Return what a plan says of the recipe.

    Its name, the values that it gives, and those of its keys that something else sets. Of the
    values it gives, None and zero are left out, such as the warm-up steps beside a ratio.

    Returns:
        {} without a recipe, as of the embedded bases.
    """
    recipe = config.recipe
    if not recipe.name:
        return {}
    values = {
        key: getattr(getattr(config, group), name)
        for key in recipe.values
        for group, _, name in [key.partition(".")]
    }
    return {
        "recipe": recipe.name,
        "applied": {k: v for k, v in values.items() if k in recipe.applied and v},
        "otherwise": {k: v for k, v in values.items() if k not in recipe.applied},
    }


def warnings(config: Config) -> list[str]:
    """Warn of toy data, a toy learning rate or toy lengths on a real model."""
    if config.model.path.startswith(EMBEDDED):
        return []
    name, lr, length = model_name(config.model), config.trainer.lr, config.data.max_length
    found = []
    if config.data.source in TOY_SOURCES:
        found.append(
            f"data.source: {config.data.source} are toy data, made for the embedded bases, and say "
            f"little about '{name}'; choose data=path data.train.path=FILE, data=alpaca or data=gym"
        )
    if lr > MOST_LR:
        found.append(
            f"trainer.lr: {lr:g} is more than {MOST_LR:g}, the highest rate in the examples of "
            f"LoRA's authors (microsoft/LoRA, RoBERTa base); start from 2e-4, or compare several "
            f"with compare.select=trainer.lr"
        )
    if length <= SHORT and "data.max_length" not in config.recipe.applied:
        found.append(
            f"data.max_length: {length} tokens are few for real texts, and longer examples are "
            f"left out or cut; set what the data need, such as data.max_length=2048"
        )
    return found
