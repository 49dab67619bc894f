"""Composes the jobs of a multirun from files that are read once.

Hydra reads, parses and merges every config file again for each job: 0.1 s. The jobs of a sweep
choose from few files and differ in values, so here files are read once, and what they are merged
to is kept for each choice of files. The rest, all that depends on values, is Hydra's own code.
"""

from __future__ import annotations

import copy
import pickle

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig


def for_jobs(loader: ConfigLoader) -> ConfigLoader:
    """Return a loader that composes many jobs as `loader` does; files must not change meanwhile."""
    return JobLoader(loader) if type(loader) is ConfigLoaderImpl else loader


class JobLoader(ConfigLoaderImpl):
    """Hydra's loader, which keeps what it reads for as long as it lives."""

    def __init__(self, loader: ConfigLoaderImpl) -> None:
        self.config_search_path = loader.config_search_path
        self.repository = loader.repository
        self._files: dict[str, CachingConfigRepository] = {}  # by config name and search path
        self._merged: dict[str, bytes] = {}  # by what was chosen; unpickling is faster than a copy

    def _parse_overrides_and_create_caching_repo(
        self, config_name: str | None, overrides: list[str]
    ) -> tuple[list[Override], CachingConfigRepository]:
        parsed = OverridesParser.create().parse_overrides(overrides)
        places = [one.input_line for one in parsed if one.get_key_element() == "hydra.searchpath"]
        key = repr((config_name, places))
        if key not in self._files:
            self._files[key] = CachingConfigRepository(self.repository)
            self._process_config_searchpath(config_name, parsed, self._files[key])
        return parsed, self._files[key]

    def _compose_config_from_defaults_list(
        self, defaults: list[ResultDefault], repo: IConfigRepository
    ) -> DictConfig:
        assert isinstance(repo, CachingConfigRepository)
        sources = [(source.provider, source.path) for source in repo.get_sources()]
        key = repr((defaults, sources))
        if key not in self._merged:
            files = copy.copy(repo)
            files.cache = copy.deepcopy(repo.cache)  # merging takes their nodes out of them
            merged = super()._compose_config_from_defaults_list(defaults, files)
            self._merged[key] = pickle.dumps(merged)
        found: DictConfig = pickle.loads(self._merged[key])
        return found
