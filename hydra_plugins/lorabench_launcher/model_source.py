"""Makes `model=ORG/NAME` and `model=FOLDER` mean `model=local model.path=...`, wherever Hydra reads
a choice: the command line, a sweep, the defaults list of an experiment.

Files in conf/model/ come first: this source is behind them in the search path. Thin: Hydra imports
this file in every app it starts.
"""

import os
import re
import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

SCHEME = "lorabench-model"
HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+", re.ASCII)


class ModelSource(ConfigSource):
    """The configs of models that have no file: conf/model/local.yaml with a path."""

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return False

    def is_config(self, config_path: str) -> bool:
        group, _, path = config_path.partition("/")
        return group == "model" and (
            os.path.isdir(os.path.expanduser(path)) or HUB_ID.fullmatch(path) is not None
        )

    def load_config(self, config_path: str) -> ConfigResult:
        from lorabench.cli.words import conf_folder

        config = OmegaConf.load(os.path.join(conf_folder(), "model", "local.yaml"))
        config.path = os.path.expanduser(config_path.partition("/")[2])
        return ConfigResult(self.provider, self.full_path(), config, header={"package": None})

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []


class ModelSearchPath(SearchPathPlugin):
    """Adds the source to lorabench's commands, and to no other app of the environment."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if "lorabench.cli" in sys.modules:
            search_path.append("lorabench_launcher", f"{SCHEME}://")
