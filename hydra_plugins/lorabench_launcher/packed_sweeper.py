"""Registers `hydra/sweeper=packed`: Hydra's basic sweeper without its trial composition.

The basic sweeper composes every job once to see whether it can, and the launcher composes it again.
The packed launcher composes all jobs before the first one runs, so the trial finds nothing that the
launcher would not, and takes 0.1 s per job. For the same reason multirun.yaml is left to the packed
launcher, which writes it once no job is refused.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins import basic_sweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import open_dict


@dataclass
class PackedSweeperConf(basic_sweeper.BasicSweeperConf):
    """The basic sweeper's settings."""

    _target_: str = "hydra_plugins.lorabench_launcher.packed_sweeper.PackedSweeper"


class PackedSweeper(basic_sweeper.BasicSweeper):
    """The grid of a command line or of an experiment."""

    def sweep(self, arguments: list[str]) -> Any:
        if not getattr(self.launcher, "composes_all_first", False):
            return super().sweep(arguments)
        assert self.config is not None
        config = self.config.copy()
        with tempfile.TemporaryDirectory(prefix="lorabench-") as place, open_dict(config):
            config.hydra.sweep.dir = place  # the launcher has a config of its own
            self.config = config
            return super().sweep(arguments)

    @staticmethod
    def split_arguments(overrides: list[Override], max_batch_size: int | None) -> Any:
        for one in overrides:
            if one.is_discrete_sweep() and not any(True for _ in one.sweep_string_iterator()):
                name, value = one.get_key_element().lstrip("+~"), one.get_value_element_as_str()
                raise HydraException(f"{name}: a sweep must have at least one value; got {value}")
        if max_batch_size is not None and max_batch_size < 1:
            raise HydraException(
                f"hydra.sweeper.max_batch_size: must be at least 1; got {max_batch_size}"
            )
        return basic_sweeper.BasicSweeper.split_arguments(overrides, max_batch_size)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> Any:
        """Try what only a launcher that composes job by job would find late."""
        if not getattr(self.launcher, "composes_all_first", False):
            super().validate_batch_is_legal(batch)


ConfigStore.instance().store(
    group="hydra/sweeper", name="packed", node=PackedSweeperConf, provider="lorabench_launcher"
)
