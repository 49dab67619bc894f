"""A user's mistake behind an exception, told in a line."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lorabench.cli.telling import tell

if TYPE_CHECKING:
    from lorabench.config import ConfigErrors

# What a user can do about an error of the file system.
REMEDIES = {
    errno.ENOSPC: "make room or choose another folder",
    errno.EDQUOT: "make room or choose another folder",
    errno.EROFS: "choose another folder",
    errno.EACCES: "change its mode or owner, or choose another",
    errno.EPERM: "change its mode or owner, or choose another",
    errno.ENOTDIR: "move the file away that is in its place, or choose another",
    errno.EISDIR: "move the folder away that is in its place, or choose another",
    errno.EEXIST: "move away what is in its place, or choose another",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "correct the link, or choose another",
}


def guarded(
    act: Callable[[], int], overrides: list[str] | None = None, as_json: bool = False
) -> int:
    """Run a verb; mistakes become lines on stderr, a traceback only with HYDRA_FULL_ERROR=1.

    Args:
        overrides: what the verb composes configs from, if it does.
        as_json: mistakes become one JSON object on stdout.
    """
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises to us instead of printing and exiting
    try:
        return act()
    except KeyboardInterrupt:
        from lorabench import interrupt

        told = f"interrupted by {interrupt.name()}; the same command continues where it stopped"
        return tell([told], 128 + interrupt.number())
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except SystemExit as left:  # Hydra and argparse have printed what there is to say
        return 2 if left.code else 0
    except Exception as error:
        if wants_traceback:
            raise
        failure = error
    finally:
        if not wants_traceback:
            os.environ.pop("HYDRA_FULL_ERROR", None)
    # Outside the handler, or what fails below would carry this failure along.
    refused = _refusal(failure, overrides or [])
    if as_json:
        print(json.dumps(refused.content(), indent=2))
        return 2
    return tell(refused.lines())


def _refusal(failure: Exception, overrides: list[str]) -> ConfigErrors:
    from lorabench.config import ConfigErrors, first_line

    found = _explain(failure)
    if found is None and _is_inside_hydra(failure):
        found = _not_composed(failure, overrides)
    if found is None:
        return ConfigErrors(
            f"lorabench: must end without an exception; got {type(failure).__name__}: "
            f"{first_line(failure, None)}; this is a defect of lorabench or of a library, "
            f"HYDRA_FULL_ERROR=1 shows where"
        )
    return _with_further(found, overrides) if _is_hydras(failure) else found


def _is_hydras(error: BaseException) -> bool:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return isinstance(error, (HydraException, OmegaConfBaseException))


def _is_inside_hydra(error: BaseException) -> bool:
    """Whether it was raised by Hydra's code, or by what Hydra calls to read configs."""
    raised_in = list(traceback.walk_tb(error.__traceback__))[-1][0].f_globals["__name__"]
    return raised_in.partition(".")[0] in ("hydra", "omegaconf", "yaml", "antlr4")


def _not_composed(error: Exception, overrides: list[str]) -> ConfigErrors:
    """Name the word without which Hydra does not raise what it has no message for."""
    from lorabench.cli.composing import compose
    from lorabench.config import ConfigErrors, first_line

    word = " ".join(overrides)
    for i in range(len(overrides)):
        if overrides[i].startswith("-"):
            continue
        try:
            compose([*overrides[:i], *overrides[i + 1 :]])
        except Exception as other:
            if type(other) is type(error) and str(other) == str(error):
                continue
        word = overrides[i]
        break
    key = word.lstrip("+~").partition("=")[0]
    return ConfigErrors(
        f"{key}: must be something that Hydra can compose; got '{word}' "
        f"({type(error).__name__}: {first_line(error)}); correct it or leave it out"
    )


def _with_further(first: ConfigErrors, overrides: list[str]) -> ConfigErrors:
    """All overrides that Hydra refuses: it tells of the first, and is asked again without it."""
    from lorabench.cli.composing import compose
    from lorabench.config import ConfigErrors

    found = list(first.errors)
    rest = list(overrides)
    while True:
        refused = {line.partition(":")[0] for line in found}
        left = [
            word
            for word in rest
            if word.startswith("-") or word.lstrip("+~").partition("=")[0] not in refused
        ]
        if left == rest:  # not about an override, or all composes
            return ConfigErrors(found)
        rest = left
        try:
            compose(rest)
        except Exception as error:
            further = _explain(error)
            found += [line for line in further.errors if line not in found] if further else []


def _unreadable(error: Any) -> str:
    """Say what is wrong with a word that is not of Hydra's grammar."""
    from lorabench.config import first_line

    word, sign, value = error.override.partition("=")
    key = word.lstrip("+~")
    if not sign:
        return (
            f"{key or 'command line'}: must be KEY=VALUE, or ~KEY to leave one out; got '{word}'; "
            f"`lorabench train --cfg job` prints all keys"
        )
    if not re.fullmatch(r"[\w.@/:$-]+", key, re.ASCII):
        return (
            f"{key.strip() or 'command line'}: no such key; got '{key}'; "
            "`lorabench train --cfg job` prints all keys"
        )
    if value.endswith(","):
        return (
            f"{key}: the values of a sweep must have commas and no spaces between them; "
            f"got '{value}' and a space; write -m {key}={value}..."
        )
    reason = first_line(error.__cause__ or error)
    quoted = value.replace('"', '\\"')
    return (
        f"{key}: the value cannot be read ({reason}); got {value}; a text with braces, colons, "
        f"commas or quotes goes into quotes of its own: '{key}=\"{quoted}\"'"
    )


def _explain(error: BaseException) -> ConfigErrors | None:
    """The user's mistake behind an exception; None where there is none."""
    from lorabench.config import ConfigErrors

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, ConfigErrors):
            return link
    for link in chain:
        if isinstance(link, OSError) and link.errno in REMEDIES:
            return ConfigErrors(_of_files(link))
    line = _of_yaml(chain) or _of_hydra(error, chain)
    if line is None:
        return None
    found = re.search(r"In '([\w\-]+/[\w\-./]+)': \w+ raised while composing", str(error))
    line += _where(found[1]) if found else ""
    return ConfigErrors(line)


def _where(name: str) -> str:
    """Name the file of the working directory that Hydra took for a preset."""
    path = os.path.join("conf", f"{name}.yaml")
    return f" ('{path}' of this folder)" if os.path.isfile(path) else ""


def _of_yaml(chain: list[BaseException]) -> str | None:
    """What is wrong with a file that is no YAML; None if that is not the mistake."""
    for link in chain:
        mark = getattr(link, "problem_mark", None)
        if mark is not None:
            return (
                f"{mark.name}: must be a YAML file; got {getattr(link, 'problem', link)} in line "
                f"{mark.line + 1}; correct it"
            )
    return None


def _of_files(error: OSError) -> str:
    space = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    law = "be writable and have space" if space else "let this user read and write"
    where = f" at '{error.filename}'" if error.filename else ""
    remedy = REMEDIES[error.errno or 0]
    return f"disk: must {law}; got '{error.strerror}'{where}; {remedy}, and repeat the command"


def _of_hydra(error: BaseException, chain: list[BaseException]) -> str | None:
    """What Hydra or OmegaConf refuses; None if it is neither of them."""
    import hydra.errors

    from lorabench.config import did_you_mean, keys

    for link in chain:
        if isinstance(link, hydra.errors.OverrideParseException):
            return _unreadable(link)

    text = "\n".join(str(link) for link in chain)
    found = re.search(r"Ambiguous value for argument '([^=']+)=(.*)'\n", text)
    if found:
        key, value = found[1], found[2]
        return (
            f"{key}: must be one value in a single run; got {value}; a sweep is "
            f"-m {key}={value}, a list '{key}=[{value}]', a text with commas '{key}=\"{value}\"'"
        )
    found = re.search(
        r"Could not find '([\w\-./]+)/([^'/]+)'\s+Available options in '[^']+':((?:\n\t\S+)+)", text
    )
    if found:
        group, name, options = found[1], found[2], found[3].split()
        if group.startswith("model/"):
            return (
                f"model: must be one of {', '.join(options)}, a hub id ORG/NAME or a folder; got "
                f"'{group.removeprefix('model/')}/{name}', which is none; correct it"
            )
        return f"{group}: must be one of {', '.join(options)}; got {did_you_mean(name, options)}"
    found = re.search(r"In 'stages/([^']+)'.*Cannot merge", text, re.DOTALL)
    if found:
        return (
            f"stages: the file stages/{found[1]}.yaml must be a list of {{from_step, train, "
            f"lr_scale}}, or begin with the line '# @package _global_' and hold `stages:` with one"
        )
    found = re.search(
        r"Could not (?:override|append to config\. An item is already at|delete from config\.)"
        r" '([^']+)'",
        text,
    )
    if found and "not in" in text:
        key = found[1]
        whole = re.match(r"(lora\.(?:rank|alpha)_pattern)\.(.+)", key)
        if whole:
            value = re.search(rf"\+{re.escape(key)}=(\S+)", text)
            one = f"{whole[2]}:{value[1] if value else 8}"
            return (
                f"{whole[1]}: must be given as one mapping; got the key '{whole[2]}' alone; "
                f"write '{whole[1]}={{{one}}}'"
            )
        return (
            f"{key}: no such key; got {did_you_mean(key, keys())}; "
            "`lorabench train --cfg job` prints all keys"
        )
    found = re.search(r"In '[^']+': Could not find '([^']+)'", text)
    if found:
        return (
            f"{found[1]}: no such group or file; "
            "`lorabench train --info defaults-tree` shows what there is"
        )
    return _in_hydras_words(error, text) if _is_hydras(error) else None


def _in_hydras_words(error: BaseException, text: str) -> str:
    """What Hydra or OmegaConf says, as a refusal of the key it is about."""
    from lorabench.config import did_you_mean, keys

    shown = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and str(cause).strip() and str(cause).splitlines()[0] not in shown:
        shown.append(str(cause).splitlines()[0].strip())
    places = ("full_key:", "object_type=", "reference_type=")
    shown = [line for line in shown if not line.startswith(places)]
    found = re.search(r"full_key: (\S+)", text)
    if found is None:
        said = " ".join(shown[:3])
        if re.match(r"[\w./]+: .*; got ", said):  # of our own sweeper
            return said
        found = re.search(r"'[+~]*([\w./@:]+)[=']", said) or re.search(
            r"(?:Multiple values for |^)([\w/@]+?)(?:\.| appears more)", said
        )
        key = found[1] if found else "command line"
        return f"{key}: must be something that Hydra can compose; got {said}"
    key, reason = found[1], shown[-1] if shown else type(error).__name__
    if "is not a ListConfig" in reason:
        return f"{key}: must be a list; got one value; write '{key}=[VALUE]'"
    if re.match(r"Key '.*' (is )?not in", reason):
        return (
            f"{key}: no such key; got {did_you_mean(key, keys())}; "
            "`lorabench train --cfg job` prints all keys"
        )
    if wrong := re.match(r"Value '(.*)' of type '.*' could not be converted to (\w+)", reason):
        return f"{key}: must be of type {wrong[2]}; got '{wrong[1]}'"
    if wrong := re.match(r"Cannot convert '(.*)' to string: (.*)", reason):
        return f"{key}: must be of type String; got a {wrong[1]}, {wrong[2]}"
    return f"{key}: must be something that Hydra can compose; got {reason}"
