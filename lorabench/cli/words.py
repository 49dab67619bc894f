"""The words of a command line that Hydra is given, and those that it must not see.

Hydra answers some mistakes with an exception that names no key, others by writing files elsewhere:
these are refused before.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorabench.cli.telling import Parser

NAME_MAX = 255  # bytes in the name of a file, on every file system in use
# Flags of Hydra that do nothing here, or read a pickle.
NOT_OURS = ("--shell-completion", "-sc", "--experimental-rerun")
TEXT_KEYS = re.compile(r"\+{0,2}data\.((train|validation|test)\.)?(prompt|completion|answer_stop)=")
# At most one of these says what Hydra is to do.
MODES = {
    "--run": {"--run", "-r"},
    "--multirun": {"--multirun", "-m"},
    "--cfg": {"--cfg", "-c"},
    "--info": {"--info", "-i"},
}


def conf_folder() -> str:
    """conf/ of a checkout, or the copy inside an installed package."""
    package = Path(__file__).parent.parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


def with_line_breaks(words: Sequence[str]) -> list[str]:
    """Return the words with \\n as a line break where a template or a stop text is given.

    In quotes, neither the shell nor Hydra makes a line break of \\n, and a template that holds
    these two characters looks right wherever it is printed. \\\\n is what remains to write them.
    """
    return [
        re.sub(r"\\(\\n|n)", lambda found: "\n" if found[1] == "n" else "\\n", word)
        if TEXT_KEYS.match(word)
        else word
        for word in words
    ]


def in_hydras_order(arguments: Sequence[str]) -> list[str]:
    """Put the flags first, each once: argparse refuses overrides on both sides of one."""
    from hydra._internal.utils import get_args_parser

    actions = get_args_parser()._option_string_actions
    flags: list[str] = []
    overrides: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        action = actions.get(word)
        if action is None:
            (flags if word.startswith("-") else overrides).append(word)  # --config-dir=DIR
            continue
        value: list[str] = []
        takes_one = action.nargs is None or (action.nargs == "?" and "=" not in "".join(words[:1]))
        if takes_one and words and not words[0].startswith("-"):
            value = [words.pop(0)]
        if word not in flags:
            flags += [word, *value]
    return [*flags, *map(_with_places, overrides)]


def _with_places(word: str) -> str:
    """Expand `~` in the values of an override, which Hydra cannot read, and relative models.

    `model=./gpt2` is a folder; Hydra would look for conf/model/./gpt2.yaml.
    """
    relative = r"|\.\.?(?:/[^,'\"]*)?(?=,|$)" if word.startswith("model=") else ""
    return re.sub(
        # Quoted texts stay: Hydra can read those.
        rf"""'[^']*'|"[^"]*"|(?<=[=,\[])(?:~(?=[/,\]]|$){relative})""",
        lambda found: _place(found[0]),
        word,
    )


def _place(text: str) -> str:
    if text == "~":
        return os.path.expanduser(text)
    return os.path.abspath(text) if text.startswith(".") else text


def parse(arguments: Sequence[str], verb: str = "train") -> argparse.Namespace:
    """Return flags and overrides, as Hydra's own parser reads them.

    Raises:
        ConfigErrors: a flag lacks its value, or has one that it does not take.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    refusing = Parser(f"lorabench {verb}", usage=f"lorabench {verb} [FLAGS] KEY=VALUE ...")
    parser.error = refusing.error  # type: ignore[method-assign]
    return parser.parse_args(in_hydras_order(arguments))


def refuse_values(arguments: Sequence[str]) -> None:
    """Refuse what a group of config files cannot be given: Hydra breaks on what is no name."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from lorabench.config import ConfigErrors

    parser, errors = OverridesParser.create(), []
    for word in arguments:
        key, sign, value = word.lstrip("+~").partition("=")
        group = key.partition("@")[0]
        folder = Path(conf_folder()) / group
        if sign and not group.strip():
            errors.append(f"command line: must have a key before the =; got '{word}'; correct it")
            continue
        if sign and group == "hydra":  # its own node, which it reads before anybody can check it
            errors.append(f"hydra: must be set key by key; got '{word}'; write hydra.KEY=VALUE")
            continue
        # Hydra looks for a file of that name.
        names = [group] if not sign else [group, value] if _is_group(group) else []
        parts = [part for name in names for part in re.split("[/,]", name)]
        longest = max((len(os.fsencode(part)) for part in parts), default=0)
        if longest > NAME_MAX:
            errors.append(
                f"{group[:40]}: must be the name of a file; got one of {longest} bytes; correct it"
            )
            continue
        if not sign or not _is_group(group):
            continue
        if re.match(r"\s*\[?\s*\{", value):
            shown = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
            errors.append(
                f"{group}: must name a file of its group ({shown}) on the command line; got "
                f"'{value}'; write it into DIR/{group}/NAME.yaml and give "
                f"hydra.searchpath=[file://DIR] {group}=NAME"
            )
            continue
        try:
            override = parser.parse_override(word)
        except HydraException:
            continue  # told by whoever composes
        if not _are_names(override.value()):
            known = sorted(path.stem for path in folder.glob("*.yaml"))
            law = f"one of {', '.join(known)}" if known else "the name of a config"
            errors.append(
                f"{group}: must be {law}; got {value}; leave it out, or put a name that reads as a "
                f"number, a boolean or null into quotes: \"{group}='NAME'\""
            )
    if errors:
        raise ConfigErrors(errors)


def _is_group(name: str) -> bool:
    return name.startswith("hydra/") or (name != "" and (Path(conf_folder()) / name).is_dir())


def _are_names(value: Any) -> bool:
    """Whether Hydra can look for files by a value: names, a list of names, or a sweep over some."""
    from hydra.core.override_parser.types import ChoiceSweep, Glob

    if isinstance(value, ChoiceSweep):
        return all(map(_are_names, value.list))
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    return isinstance(value, (str, Glob))


def refuse_flags(verb: str, arguments: Sequence[str], own: Sequence[str] = ()) -> None:
    """Refuse a flag that is neither Hydra's nor the verb's own: argparse would exit with a usage.

    Args:
        own: flags of the verb, named first.
    """
    from hydra._internal.utils import get_args_parser

    from lorabench.config import ConfigErrors, did_you_mean

    hydras = [name for name in get_args_parser()._option_string_actions if name not in NOT_OURS]
    shown = ["-m", "--multirun", *own, "--config-dir", "--cfg", "--info", "-h", "--help"]
    flags = [word.partition("=")[0] for word in arguments if word.startswith("-")]
    if unknown := [flag for flag in flags if flag not in (*hydras, *own)]:
        raise ConfigErrors(
            f"{verb}: a flag must be one of {', '.join(shown)}; "
            f"got {did_you_mean(unknown[0], [*shown, *hydras])}"
        )
    asked = {name for name, spellings in MODES.items() if not spellings.isdisjoint(flags)}
    if len(asked) > 1:
        raise ConfigErrors(
            f"{verb}: must be given at most one of {', '.join(MODES)}; "
            f"got {' and '.join(sorted(asked))}; leave one out"
        )
    parse([word for word in arguments if word not in own], verb)


def refuse_places(hydra: Any) -> None:
    """Refuse settings of Hydra by which its files, or a run's, would land elsewhere.

    Args:
        hydra: Hydra's own node of a composed config.
    Raises:
        ConfigErrors: a setting is not what conf/train.yaml says.
    """
    from omegaconf import OmegaConf

    from lorabench.config import ConfigErrors

    own = _own_hydra()
    parts = ("run", "sweep", "job", "sweeper", "launcher")
    errors = [
        f"hydra.{part}: must be a mapping; got {hydra[part]}; leave it out, or set the keys in it"
        for part in parts
        if not OmegaConf.is_dict(hydra[part])
    ]
    if errors:
        raise ConfigErrors(errors)
    for group, key in (("run", "dir"), ("sweep", "dir"), ("sweep", "subdir"), ("job", "chdir")):
        given: Any = OmegaConf.to_container(hydra[group], resolve=False)
        if given.get(key) != own[group][key]:
            errors.append(_misplaced(f"hydra.{group}.{key}", own[group][key], given.get(key)))
    if hydra.output_subdir not in (".hydra", None):
        errors.append(_misplaced("hydra.output_subdir", ".hydra or null", hydra.output_subdir))
    errors += [
        f"hydra.sweeper.params: must sweep over keys of a run; got {key}; leave it out"
        for key in hydra.sweeper.get("params") or ()
        if str(key).lstrip("+~").startswith("hydra.")
    ]
    if errors:
        raise ConfigErrors(errors)


@functools.cache
def _own_hydra() -> Any:
    """Hydra's settings in conf/train.yaml."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(Path(conf_folder()) / "train.yaml").hydra)


def _misplaced(key: str, law: Any, got: Any) -> str:
    law = str(law).lower() if isinstance(law, bool) else law
    return (
        f"{key}: must be {law}; got {got!r}; leave it out: output_dir and sweep say where runs "
        f"are written"
    )
