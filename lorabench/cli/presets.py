"""Which config files a run was composed from that are not lorabench's own.

They lie in ./conf, in --config-dir or on hydra.searchpath. What they say is in the run's config;
their hashes tell which version of a file said it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lorabench.cli.words import conf_folder


def used(hydra: Any) -> dict[str, str]:
    """Return the sha256 of every file that is not lorabench's own, by its path.

    A path below the working directory is relative to it.

    Args:
        hydra: Hydra's own node of a composed config.
    """
    from lorabench.hashes import fresh_hash

    found = {}
    for path in _files(hydra):
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        found[str(shown)] = fresh_hash(path)
    return dict(sorted(found.items()))


def note(configs: Iterable[Any]) -> list[str]:
    """Say which files of others the runs are composed from, and which of lorabench's they hide.

    Args:
        configs: of the runs, typed.
    """
    paths = sorted({path for config in configs for path in config.presets})
    if not paths:
        return []
    shown = []
    for path in paths:
        folder, *name = Path(path).parts
        hides = folder == "conf" and Path(conf_folder(), *name).is_file()
        shown.append(f"{path} (in place of the built-in one)" if hides else path)
    return [f"composed with files of your own: {', '.join(shown)}"]


def _files(hydra: Any) -> Iterator[Path]:
    """Yield the files that are not lorabench's own, by the choices that Hydra made."""
    names = [str(hydra.job.config_name)]
    for key, choice in hydra.runtime.choices.items():
        group = str(key).partition("@")[0]
        for name in choice if isinstance(choice, list | tuple) else [choice]:
            if name is not None:
                names.append(f"{group}/{name}")
    seen: set[str] = set()
    while names:
        name = names.pop()
        path = None if name in seen else _place(name, hydra.runtime.config_sources)
        seen.add(name)
        if path is not None:
            yield path
            names += _defaults(path, name)


def _place(name: str, sources: Any) -> Path | None:
    """Return where Hydra finds a config, if that is a folder of somebody else's."""
    from hydra_plugins.lorabench_launcher.own_presets import PRIMARY, SCHEME

    for source in sources:
        if source["schema"] == "pkg":
            place = Path(str(importlib.import_module(source["path"]).__file__)).parent
        elif source["schema"] in ("file", SCHEME):
            place = Path(source["path"])
        else:
            continue
        path = place / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
        is_hidden = source["schema"] == SCHEME and name == PRIMARY
        if path.is_file() and not is_hidden:
            is_ours = source["schema"] == "pkg" or place == Path(conf_folder())
            return None if is_ours else path
    return None


def _defaults(path: Path, name: str) -> list[str]:
    """Return the configs that a file's defaults list names without a group: no choices of it."""
    from omegaconf import OmegaConf

    content: Any = OmegaConf.load(path)
    entries = content.get("defaults", []) if OmegaConf.is_dict(content) else []
    group = name.rpartition("/")[0]
    return [
        text.lstrip("/") if text.startswith("/") or not group else f"{group}/{text}"
        for entry in entries
        if isinstance(entry, str) and (text := entry.partition("@")[0]) != "_self_"
    ]
