"""Hydra's part of the command line: where configs are, and every config of a command."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple


def conf_folder() -> str:
    """conf/ of a checkout, or the copy inside an installed package."""
    package = Path(__file__).parent.parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


def register() -> None:
    """Make the schema and the run-id resolver known to Hydra."""
    from omegaconf import DictConfig, OmegaConf

    from lorabench import config
    from lorabench import plan as planning

    def resolve(*, _root_: DictConfig) -> str:
        parsed = config.typed(_root_)
        errors = planning.check(parsed)
        if errors:
            raise config.ConfigErrors(errors)
        return planning.run_id(parsed)

    config.register()
    OmegaConf.register_new_resolver("run_id", resolve, replace=True)


def refuse_values(arguments: list[str]) -> None:
    """Refuse a list of mappings where a group takes names of its files: Hydra breaks on one."""
    from lorabench.config import ConfigErrors

    for word in arguments:
        group, _, value = word.partition("=")
        folder = Path(conf_folder()) / group.lstrip("+")
        if group and re.match(r"\s*\[\s*\{", value) and folder.is_dir():
            names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
            raise ConfigErrors(
                f"{folder.name}: must name a file of its group ({names}) on the command line; got "
                f"'{value}'; write it into DIR/{folder.name}/NAME.yaml and give "
                f"hydra.searchpath=[file://DIR] {folder.name}=NAME"
            )


class Composed(NamedTuple):
    """What a command line asks for."""

    configs: list[Any]
    labels: list[str]
    hydra: Any  # Hydra's own settings


def compose(arguments: list[str]) -> Composed:
    """Every config of a command line with its label, as a multirun would make them.

    Uses Hydra's own parser and its basic sweeper's product, so `plan` shows what `train` does.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import open_dict

    refuse_values(arguments)
    multirun = any(a in ("-m", "--multirun") for a in arguments)
    overrides = [a for a in arguments if a not in ("-m", "--multirun")]
    register()
    with initialize_config_dir(conf_folder(), version_base="1.3", job_name="plan"):
        if not multirun:
            whole = hydra_compose("train", overrides, return_hydra_config=True)
            settings = whole.hydra
            with open_dict(whole):
                del whole["hydra"]
            return Composed([whole], [" ".join(overrides) or "defaults"], settings)
        fixed = [
            o
            for o in OverridesParser.create().parse_overrides(overrides)
            if not o.is_sweep_override()
        ]
        whole = hydra_compose(
            "train", [o.input_line for o in fixed if o.input_line], return_hydra_config=True
        )
        params = whole.hydra.sweeper.params or {}
        lines = [f"{key}={value}" for key, value in params.items()] + overrides
        parsed = OverridesParser.create().parse_overrides(lines)
        (jobs,) = BasicSweeper.split_arguments(parsed, None)
        configs = [hydra_compose("train", job) for job in jobs]
        return Composed(configs, [" ".join(job) for job in jobs], whole.hydra)


def say_if_sweep(hydra: Any) -> None:
    """Say of a single run whose experiment is a sweep that it is one run, and how to get all."""
    if params := hydra.sweeper.get("params"):
        print(f"one run of a sweep over {', '.join(params)}; -m runs them all", file=sys.stderr)
