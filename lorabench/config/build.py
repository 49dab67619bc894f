"""From the composed config to checked dataclasses."""

from __future__ import annotations

import functools
import os
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ValidationError

from lorabench.config import recipe
from lorabench.config.errors import ConfigErrors, did_you_mean
from lorabench.config.parts import named_sets
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
    config.recipe.applied = recipe.applied(cfg) or config.recipe.applied
    errors = range_errors(config)
    if errors:
        raise ConfigErrors(errors)
    return config


def _at_home(config: Config) -> Config:
    """Expand `~` in every path: zsh leaves it in KEY=~/..., and no shell sees those of a file."""
    config.output_dir = os.path.expanduser(config.output_dir)
    config.model.path = os.path.expanduser(config.model.path)
    data = config.data
    for source in (
        data.train, data.validation, data.test, *data.mixture, *named_sets(data).values(),
    ):  # fmt: skip
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
    built, specs = {}, {spec.name: spec for spec in fields(cls)}
    for key in (key for key in values if key in hints):
        try:
            if element := specs[key].metadata.get("each"):
                kind = list if "list" in str(specs[key].type) else dict
                built[key] = _build_each(element, kind, values[key], f"{prefix}{key}")
            else:
                built[key] = _build(hints[key], values[key], f"{prefix}{key}.")
        except ConfigErrors as inner:
            errors += inner.errors
    if errors:
        raise ConfigErrors(errors)
    return cls(**built)


def _build_each(cls: type, kind: type, values: Any, prefix: str) -> Any:
    """Build the elements of a list or of a mapping; nothing has checked their types before."""
    if not values:
        return values
    if not isinstance(values, kind):
        law = "a list of sources" if kind is list else "a mapping of names to sources"
        raise ConfigErrors(f"{prefix}: must be {law}; got {values!r:.60}")
    by_name: Any = dict(enumerate(values)) if isinstance(values, list) else values
    known = _hints(cls)
    errors: list[str] = []
    built: dict[Any, Any] = {}
    for name, value in by_name.items():
        key = f"{prefix}[{name}]" if kind is list else f"{prefix}.{name}"
        if not isinstance(value, dict):
            errors.append(f"{key}: must be a mapping; got {value!r:.60}; write {{path: ...}}")
            continue
        unknown = [str(one) for one in value if one not in known]
        errors += [f"{key}.{one}: no such key; got {did_you_mean(one, known)}" for one in unknown]
        if not unknown:
            try:
                built[name] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), value))
            except ValidationError as error:
                inner = f"{key}.{error.full_key}" if error.full_key else key
                errors.append(f"{inner}: must be of its type; got {str(error).splitlines()[0]}")
    if errors:
        raise ConfigErrors(errors)
    return list(built.values()) if kind is list else {str(name): one for name, one in built.items()}
