"""Hydra's part of the command line: where configs are, and every config of a command."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lorabench.plan import Planner


def conf_folder() -> str:
    """conf/ of a checkout, or the copy inside an installed package."""
    package = Path(__file__).parent.parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


def register(planner: Planner | None = None) -> None:
    """Make the schema and the run-id resolver known to Hydra.

    Args:
        planner: of the command, which plans each config once; None: one is made at need.
    """
    from omegaconf import DictConfig, OmegaConf

    from lorabench import config
    from lorabench import plan as planning

    def resolve(*, _root_: DictConfig) -> str:
        parsed = config.typed(_root_)
        errors = planning.check(parsed)
        if errors:
            raise config.ConfigErrors(errors)
        return (planner or planning.Planner()).make(parsed).run_id

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


def refuse_flags(verb: str, arguments: Sequence[str], own: Sequence[str] = ()) -> None:
    """Refuse a flag that is neither Hydra's nor the verb's own: argparse would exit with a usage.

    Args:
        own: flags of the verb, named first.
    """
    from hydra._internal.utils import get_args_parser

    from lorabench.config import ConfigErrors, did_you_mean

    hydras = list(get_args_parser()._option_string_actions)
    shown = ["-m", "--multirun", *own, "--config-dir", "--cfg", "--info", "-h", "--help"]
    unknown = [
        word
        for word in arguments
        if word.startswith("-") and word.partition("=")[0] not in (*hydras, *own)
    ]
    if unknown:
        raise ConfigErrors(
            f"{verb}: a flag must be one of {', '.join(shown)}; "
            f"got {did_you_mean(unknown[0], [*shown, *hydras])}"
        )


class Composed(NamedTuple):
    """What a command line asks for."""

    configs: list[Any]
    labels: list[str]
    hydra: Any  # Hydra's own settings
    is_sweep: bool

    @property
    def pack_size(self) -> int:
        """The most runs of a pack; 1 under another launcher than packed."""
        return self.hydra.launcher.get("pack_size", 1)


def compose(arguments: list[str], planner: Planner | None = None) -> Composed:
    """Compose every config of a command line, with its label, as `train` would run them.

    Hydra's own parser, config loader and sweeper do it, up to the launcher: that is where jobs
    would start, and here they are collected instead.
    """
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode
    from omegaconf import open_dict

    refuse_values(arguments)
    register(planner)
    args = get_args_parser().parse_args(in_hydras_order(arguments))
    name = args.config_name or "train"
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("train", _search_path(args.config_path, args.config_dir))
    try:
        is_sweep = (
            args.multirun
            or hydra.get_mode(config_name=name, overrides=args.overrides) == RunMode.MULTIRUN
        )
        whole = hydra.compose_config(
            config_name=name,
            overrides=args.overrides,
            run_mode=RunMode.MULTIRUN if is_sweep else RunMode.RUN,
            with_log_configuration=False,
        )
        settings = whole.hydra
        if is_sweep:
            return Composed(*_swept(hydra.config_loader, whole), settings, True)
        with open_dict(whole):
            del whole["hydra"]
        return Composed([whole], [" ".join(args.overrides) or "defaults"], settings, False)
    finally:
        GlobalHydra.instance().clear()


def in_hydras_order(arguments: Sequence[str]) -> list[str]:
    """Put the flags first, each once: argparse refuses overrides on both sides of one."""
    from hydra._internal.utils import get_args_parser

    actions = get_args_parser()._option_string_actions
    flags: list[str] = []
    overrides: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        action = actions.get(word)
        if action is None:
            (flags if word.startswith("-") else overrides).append(word)  # --config-dir=DIR
            continue
        value: list[str] = []
        takes_one = action.nargs is None or (action.nargs == "?" and "=" not in "".join(words[:1]))
        if takes_one and words and not words[0].startswith("-"):
            value = [words.pop(0)]
        if word not in flags:
            flags += [word, *value]
    return [*flags, *overrides]


def _search_path(config_path: str | None, config_dir: str | None) -> Any:
    from hydra._internal.utils import create_automatic_config_search_path
    from hydra.core.config_search_path import SearchPathQuery

    from lorabench.config import ConfigErrors

    found = create_automatic_config_search_path(None, None, config_path or conf_folder())
    if config_dir is not None:
        place = os.path.abspath(config_dir)
        if not os.path.isdir(place):
            raise ConfigErrors(f"--config-dir: must be a folder; '{place}' is none; correct it")
        found.prepend(
            provider="command-line", path=f"file://{place}", anchor=SearchPathQuery("schema")
        )
    return found


def _swept(loader: Any, whole: Any) -> tuple[list[Any], list[str]]:
    """The task configs and labels of a multirun."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.plugins import Plugins
    from hydra.core.utils import JobReturn, JobStatus, filter_overrides
    from hydra.plugins.launcher import Launcher
    from hydra.types import HydraContext
    from omegaconf import OmegaConf, open_dict

    from hydra_plugins.lorabench_launcher._core import compose_jobs, task_config

    configs: list[Any] = []
    labels: list[str] = []

    class Collector(Launcher):
        """Stands in for the launcher: composes jobs as it would, and runs none."""

        composes_all_first = True

        def setup(self, **_: Any) -> None: ...

        def launch(
            self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
        ) -> Sequence[JobReturn]:
            configs.extend(
                task_config(job)
                for job in compose_jobs(loader, whole, job_overrides, initial_job_idx)
            )
            labels.extend(" ".join(filter_overrides(words)) for words in job_overrides)
            return [
                JobReturn(status=JobStatus.COMPLETED, _return_value=float("nan"))
                for _ in job_overrides
            ]

    sweeper = Plugins.instance().instantiate_sweeper(
        config=whole,
        hydra_context=HydraContext(config_loader=loader, callbacks=Callbacks()),
        task_function=lambda _: None,
    )
    words: Any = OmegaConf.to_container(whole.hydra.overrides.task, resolve=False)
    planned = whole.copy()
    with tempfile.TemporaryDirectory(prefix="lorabench-plan-") as place, open_dict(planned):
        planned.hydra.sweep.dir = place  # sweepers write their own settings there
        sweeper.config, sweeper.launcher = planned, Collector()
        sweeper.sweep(arguments=words)
    return configs, labels


def say_if_sweep(hydra: Any) -> None:
    """Warn that only one run will train although the experiment defines a sweep; suggest -m."""
    if params := hydra.sweeper.get("params"):
        print(f"one run of a sweep over {', '.join(params)}; -m runs them all", file=sys.stderr)
