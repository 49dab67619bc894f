"""Registers `hydra/sweeper=packed`: Hydra's basic sweeper without its trial composition.

The basic sweeper composes every job once to see whether it can, and the launcher composes it again.
The packed launcher composes all jobs before the first one runs, so the trial finds nothing that the
launcher would not, and takes 0.1 s per job.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins import basic_sweeper
from hydra.core.config_store import ConfigStore


@dataclass
class PackedSweeperConf(basic_sweeper.BasicSweeperConf):
    """The basic sweeper's settings."""

    _target_: str = "hydra_plugins.lorabench_launcher.packed_sweeper.PackedSweeper"


class PackedSweeper(basic_sweeper.BasicSweeper):
    """The grid of a command line or of an experiment."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> Any:
        """Try what only a launcher that composes job by job would find late."""
        if not getattr(self.launcher, "composes_all_first", False):
            super().validate_batch_is_legal(batch)


ConfigStore.instance().store(
    group="hydra/sweeper", name="packed", node=PackedSweeperConf, provider="lorabench_launcher"
)
