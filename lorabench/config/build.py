"""From the composed config to checked dataclasses."""

from __future__ import annotations

import functools
import os
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from lorabench.config.errors import ConfigErrors, did_you_mean
from lorabench.config.ranges import range_errors
from lorabench.config.schema import Config


def register() -> None:
    """Put the typed schema where `conf/train.yaml` finds it, and the run-id resolver beside it."""
    from hydra.core.config_store import ConfigStore

    known = ConfigStore.instance()
    if "schema.yaml" not in known.repo:  # to read the types of all keys again takes 25 ms
        known.store(name="schema", node=Config)


def typed(cfg: DictConfig) -> Config:
    """The composed config as dataclasses, interpolations resolved.

    Raises:
        ConfigErrors: a required key is missing, or a value is out of its range.
    """
    known = [spec.name for spec in fields(Config)]
    unknown = [
        f"{key}: no such key; got {did_you_mean(key, known)}"
        for key in map(str, cfg)
        if key not in (*known, "hydra")
    ]
    if unknown:
        raise ConfigErrors(unknown)
    missing: set[str] = set()
    plain = {}
    for key in known:  # one by one: a copy of all but Hydra's own node costs more than the rest
        if key not in cfg.keys():  # noqa: SIM118 - `in cfg` is false for a key without a value
            continue
        if OmegaConf.is_missing(cfg, key):
            missing.add(key)
        elif OmegaConf.is_config(node := cfg[key]):
            missing |= OmegaConf.missing_keys(node)
            plain[key] = OmegaConf.to_container(node, resolve=True)
        else:
            plain[key] = node
    if missing:
        raise ConfigErrors(
            f"{key}: must be given; got nothing; set {key}=..." for key in sorted(missing)
        )
    config = _at_home(_build(Config, plain))
    errors = range_errors(config)
    if errors:
        raise ConfigErrors(errors)
    return config


def _at_home(config: Config) -> Config:
    """Expand `~` in every path: zsh leaves it in KEY=~/..., and no shell sees those of a file."""
    config.output_dir = os.path.expanduser(config.output_dir)
    config.model.path = os.path.expanduser(config.model.path)
    for source in (config.data.train, config.data.validation, config.data.test):
        source.path = source.path and os.path.expanduser(source.path)
    return config


_hints = functools.cache(get_type_hints)


def _build(cls: type, values: Any, prefix: str = "") -> Any:
    """Nested dataclasses from plain containers (types were checked when Hydra composed them)."""
    if not is_dataclass(cls):
        return values
    hints = _hints(cls)
    # `+lora.foo=1` gets past Hydra
    errors = [
        f"{prefix}{key}: no such key; got {did_you_mean(str(key), hints)}"
        for key in values
        if key not in hints
    ]
    errors += [  # OmegaConf takes lists and null as elements of any list
        f"{prefix}{key}: every element must be a text; got {values[key]!r}"
        for key in values
        if key in hints
        and "list[str]" in str(hints[key])
        and not all(isinstance(text, str) for text in values[key] or ())
    ]
    built = {}
    for key in (key for key in values if key in hints):
        try:
            built[key] = _build(hints[key], values[key], f"{prefix}{key}.")
        except ConfigErrors as inner:
            errors += inner.errors
    if errors:
        raise ConfigErrors(errors)
    return cls(**built)
