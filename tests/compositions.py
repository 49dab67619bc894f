"""Hydra composes each choice of config files once; the values of a command line go into a copy.

Hydra takes 0.2 s to compose one config, and every command line needs several. Here the composition
of the chosen files is kept for the session, and the values are set by Hydra's own code, which is
what Hydra itself does next. test_config.py holds the result to Hydra's own.
"""

from __future__ import annotations

import os
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode

from lorabench import cli

inner = ConfigLoaderImpl._load_configuration_impl
kept: dict[Any, Any] = {}


def load(
    self: ConfigLoaderImpl,
    config_name: str | None,
    overrides: list[str],
    run_mode: RunMode,
    from_shell: bool = True,
    validate_sweep_overrides: bool = True,
) -> Any:
    """Stand in for `ConfigLoaderImpl._load_configuration_impl`."""
    options = (run_mode, from_shell, validate_sweep_overrides)
    places = {path.path for path in self.config_search_path.get_path()}
    known = places <= {"pkg://hydra.conf", cli.conf_folder(), "structured://"}
    parsed = OverridesParser.create().parse_overrides(overrides)
    groups = [one for one in parsed if is_group(one)]
    values = [one for one in parsed if not is_group(one) and not one.is_sweep_override()]
    sweeps = any(one.is_sweep_override() for one in parsed)
    if (
        not known  # files outside conf/ may be another test's, or change
        or (sweeps and run_mode != RunMode.MULTIRUN)
        or any(one.get_key_element() == "hydra.searchpath" for one in parsed)
    ):
        return inner(self, config_name, overrides, *options)
    chosen = [one.input_line for one in groups if not one.is_sweep_override()]
    key = (config_name, *chosen, *options)
    if key not in kept:
        kept[key] = inner(self, config_name, chosen, *options)
    cfg = kept[key].copy()
    self._apply_overrides_to_config(values, cfg)
    cfg.hydra.overrides.hydra = [one.input_line for one in parsed if one.is_hydra_override()]
    tasks = [one for one in parsed if not one.is_hydra_override()]
    cfg.hydra.overrides.task = [one.input_line for one in tasks]
    cfg.hydra.runtime.cwd = os.getcwd()
    naming = cfg.hydra.job.config.override_dirname
    cfg.hydra.job.override_dirname = get_overrides_dirname(
        tasks, kv_sep=naming.kv_sep, item_sep=naming.item_sep, exclude_keys=naming.exclude_keys
    )
    return cfg


def is_group(override: Override) -> bool:
    """Whether it chooses a file."""
    name = override.key_or_group
    return os.path.isdir(os.path.join(cli.conf_folder(), name)) or name.startswith("hydra/")


def install() -> None:
    ConfigLoaderImpl._load_configuration_impl = load  # type: ignore[method-assign]
