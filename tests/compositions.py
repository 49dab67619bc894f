"""Hydra composes each choice of config files once; the values of a command line go into a copy.

Hydra takes 0.2 s to compose one config, and every command line needs several. Here the composition
of the chosen files is kept for the session, and the values are set by Hydra's own code, which is
what Hydra itself does next. test_config_files.py holds the result to Hydra's own. What the parsers
make of a word and of an interpolation is kept too, and so are a base on the meta device and what
PEFT makes of it and an adapter's settings: they are read, never changed.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import omegaconf._utils
import omegaconf.base
import omegaconf.grammar_parser
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import ConfigRepository
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode

from lorabench import cli
from lorabench import model as base_model
from lorabench.adapters import inject
from lorabench.config import Config, ModelConfig

MODELS = "lorabench-model://"  # hydra_plugins/lorabench_launcher/model_source.py
inner = ConfigLoaderImpl._load_configuration_impl
kept: dict[str, bytes] = {}


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
    known = places <= {"pkg://hydra.conf", cli.conf_folder(), "structured://", MODELS}
    parsed = OverridesParser.create().parse_overrides(overrides)
    groups = [one for one in parsed if is_group(one)]
    values = [one for one in parsed if not is_group(one) and not one.is_sweep_override()]
    sweeps = any(one.is_sweep_override() for one in parsed)
    if (
        not known  # files outside conf/ may be another test's, or change
        or any(not is_ours(f"model/{one.value()}") for one in groups if is_model(one))
        or (sweeps and run_mode != RunMode.MULTIRUN)
        or any(one.get_key_element() == "hydra.searchpath" for one in parsed)
    ):
        return inner(self, config_name, overrides, *options)
    chosen = [one.input_line for one in groups if not one.is_sweep_override()]
    # No defaults list in conf/ leaves a choice open: a run and a sweep compose the same files.
    key = repr((config_name, *chosen))
    if key not in kept:
        kept[key] = shared(key, lambda: pickle.dumps(inner(self, config_name, chosen, *options)))
    cfg = pickle.loads(kept[key])  # twenty times as fast as OmegaConf's own copy
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


def shared(key: str, make: Callable[[], bytes]) -> bytes:
    """What this worker or another one of the session made."""
    file = Path(os.environ["LORABENCH_TESTS"]) / hashlib.sha256(key.encode()).hexdigest()
    if file.exists():
        return file.read_bytes()
    content = make()
    part = file.with_suffix(f".{os.getpid()}")
    part.write_bytes(content)
    part.replace(file)
    return content


def is_group(override: Override) -> bool:
    """Whether it chooses a file."""
    name = override.key_or_group
    return os.path.isdir(os.path.join(cli.conf_folder(), name)) or name.startswith("hydra/")


def is_model(override: Override) -> bool:
    """Whether it chooses one base: a preset, a folder or a hub id."""
    return override.key_or_group == "model" and not override.is_sweep_override()


def is_ours(config_path: str) -> bool:
    """Whether a choice is a file of conf/, not a folder that comes and goes."""
    file = os.path.join(cli.conf_folder(), f"{config_path}.yaml")
    return not config_path.startswith("model/") or os.path.isfile(file)


load_config = ConfigRepository.load_config
files: dict[str, bytes] = {}


def read(self: ConfigRepository, config_path: str) -> Any:
    """Stand in for `ConfigRepository.load_config`: each of our own and Hydra's files once."""
    if not {one.path for one in self.sources} <= {"hydra.conf", cli.conf_folder(), ""}:
        return load_config(self, config_path)
    if not is_ours(config_path):
        return load_config(self, config_path)
    if config_path not in files:
        files[config_path] = pickle.dumps(load_config(self, config_path))
    return pickle.loads(files[config_path])


parse_rule = OverridesParser.parse_rule
words: dict[str, Override] = {}


def parse(self: OverridesParser, s: str, rule_name: str) -> Any:
    """Stand in for `OverridesParser.parse_rule`: a word that sets one value is parsed once."""
    if rule_name == "override" and s in words:
        return copy.copy(words[s])
    found = parse_rule(self, s, rule_name)
    if rule_name == "override" and isinstance(found._value, str | int | float | None):
        words[s] = copy.copy(found)  # its config_loader is set by others
    return found


built = base_model.skeleton
bases: dict[str, Any] = {}


def skeleton(model: ModelConfig, classes: int = 0) -> Any:
    """Stand in for `model.skeleton`: one for each config of a base."""
    architecture = base_model.architecture(model, classes).to_json_string(use_diff=False)
    key = repr((architecture, model, classes))
    if key not in bases:
        bases[key] = built(model, classes)
    return bases[key]


attached = inject._attach_skeleton
skeletons: dict[str, Any] = {}


def attach(skeleton: Any, config: Config, modules: list[str]) -> Any:
    """Stand in for `_attach_skeleton`: one for each class and config of a base, and adapter."""
    base = (type(skeleton).__name__, skeleton.config.to_json_string(use_diff=False))
    key = repr((base, config.model, config.task, config.lora, config.head, modules))
    if key not in skeletons:
        skeletons[key] = attached(skeleton, config, modules)
    return skeletons[key]


def install() -> None:
    ConfigLoaderImpl._load_configuration_impl = load  # type: ignore[method-assign]
    ConfigRepository.load_config = read  # type: ignore[method-assign]
    OverridesParser.parse_rule = parse  # type: ignore[method-assign]
    grammar = functools.cache(omegaconf.grammar_parser.parse)
    omegaconf.base.parse = omegaconf._utils.parse = grammar  # type: ignore[attr-defined]
    base_model.skeleton = skeleton
    inject._attach_skeleton = attach
