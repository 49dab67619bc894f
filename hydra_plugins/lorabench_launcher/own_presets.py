"""Puts `conf/` of the working directory before lorabench's own conf/ on Hydra's search path.

A file there takes the place of a preset of the same name. Thin: Hydra imports this file in every
app it starts.
"""

import os
import sys

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

SCHEME = "lorabench-own"
FOLDER = "conf"
PRIMARY = "train"  # conf/train.yaml of another Hydra app in this folder is no preset


class OwnPresets(FileConfigSource):
    """The presets of the working directory: files of groups, and whatever --config-name names."""

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def is_config(self, config_path: str) -> bool:
        return config_path != PRIMARY and super().is_config(config_path)


class OwnPresetsPath(SearchPathPlugin):
    """Adds the folder to lorabench's commands, and to no other app of the environment."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if "lorabench.cli" not in sys.modules or not os.path.isdir(FOLDER):
            return
        from lorabench.cli.words import conf_folder

        if not os.path.samefile(FOLDER, conf_folder()):
            place = f"{SCHEME}://{os.path.abspath(FOLDER)}"
            search_path.prepend("working directory", place, anchor="main")
