"""Registers `hydra/launcher=packed`. Thin: Hydra imports this file in every app it starts.

Hydra executes it outside sys.modules, where dataclasses cannot read postponed annotations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class PackedLauncherConf:
    """Trains the jobs of a multirun in packs over one shared base model."""

    _target_: str = "hydra_plugins.lorabench_launcher.packed_launcher.PackedLauncher"
    pack_size: int = 16  # most runs trained together; memory may allow fewer


class PackedLauncher(Launcher):
    """Sees all jobs at once; any task function runs under it, lorabench's in packs."""

    composes_all_first = True  # so that a sweeper need not try whether it can

    def __init__(self, pack_size: int = 16) -> None:
        self.pack_size = pack_size
        self.config: DictConfig | None = None
        self.task_function: TaskFunction | None = None
        self.hydra_context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config = config
        self.hydra_context = hydra_context
        self.task_function = task_function

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from hydra_plugins.lorabench_launcher import _core

        assert self.config is not None and self.hydra_context is not None
        assert self.task_function is not None
        return _core.launch(
            self.hydra_context,
            self.task_function,
            self.config,
            job_overrides,
            initial_job_idx,
            self.pack_size,
        )


ConfigStore.instance().store(
    group="hydra/launcher", name="packed", node=PackedLauncherConf, provider="lorabench_launcher"
)
