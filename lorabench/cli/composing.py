"""Hydra's part of the command line: every config of a command."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lorabench.cli import presets
from lorabench.cli.telling import tell
from lorabench.cli.words import conf_folder, parse, refuse_places, refuse_values

if TYPE_CHECKING:
    from lorabench.plan import Planner


def register(planner: Planner | None = None) -> None:
    """Make the schema and the run-id resolver known to Hydra.

    Args:
        planner: of the command, which plans each config once; None: one is made at need.
    """
    from omegaconf import DictConfig, OmegaConf

    from lorabench import config
    from lorabench import model as base_model
    from lorabench import plan as planning

    def resolve(*, _root_: DictConfig) -> str:
        parsed = config.typed(_root_)
        errors = planning.check(parsed)
        if errors:
            raise config.ConfigErrors(errors)
        return (planner or planning.Planner()).make(parsed).run_id

    config.register()
    config.recipe.register(base_model.fitting)
    OmegaConf.register_new_resolver("run_id", resolve, replace=True)
    OmegaConf.register_new_resolver("home", os.path.expanduser, replace=True)


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


def compose(arguments: list[str], planner: Planner | None = None, expand: bool = True) -> Composed:
    """Compose every config of a command line, with its label, as `train` would run them.

    Hydra's own parser, config loader and sweeper do it, up to the launcher: that is where jobs
    would start, and here they are collected instead.

    Args:
        expand: the jobs of a multirun are composed too; False: `configs` is empty for one.
    Raises:
        ConfigErrors: a group is given no name, or files would land outside the output folder.
    """
    from hydra._internal.hydra import Hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode
    from omegaconf import open_dict

    refuse_values(arguments)
    register(planner)
    args = parse(arguments)
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
        refuse_places(settings)
        if is_sweep:
            swept = _swept(hydra.config_loader, whole) if expand else ([], [])
            return Composed(*swept, settings, True)
        with open_dict(whole):
            whole.presets = presets.used(settings)
            del whole["hydra"]
        label = " ".join(settings.overrides.task) or "defaults"
        return Composed([whole], [label], settings, False)
    finally:
        GlobalHydra.instance().clear()


@contextlib.contextmanager
def loader() -> Iterator[Any]:
    """Hydra's config loader, as commands without options have it."""
    from hydra._internal.hydra import Hydra
    from hydra.core.global_hydra import GlobalHydra

    register()
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2("train", _search_path(None, None)).config_loader
    finally:
        GlobalHydra.instance().clear()


def _search_path(config_path: str | None, config_dir: str | None) -> Any:
    from hydra._internal.utils import create_automatic_config_search_path
    from hydra.core.config_search_path import SearchPathQuery

    from lorabench.config import ConfigErrors

    if config_path is not None and not (os.path.isabs(config_path) and os.path.isdir(config_path)):
        raise ConfigErrors(
            f"--config-path: must be the absolute path of a folder; got '{config_path}'; "
            f"leave it out, or use --config-dir for a folder besides conf/"
        )
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
        tell([f"one run of a sweep over {', '.join(params)}; -m runs them all"])
