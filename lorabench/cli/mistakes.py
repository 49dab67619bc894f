"""A user's mistake behind an exception, told in a line."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def fail(lines: list[str], code: int = 2) -> int:
    for line in lines:
        print(line, file=sys.stderr)
    return code


def guarded(act: Callable[[], int], overrides: list[str] | None = None) -> int:
    """Run a verb; mistakes become lines on stderr, a traceback only with HYDRA_FULL_ERROR=1.

    Args:
        overrides: what the verb composes configs from, if it does.
    """
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises to us instead of printing and exiting
    try:
        return act()
    except KeyboardInterrupt:
        from lorabench import interrupt

        told = f"interrupted by {interrupt.name()}; the same command continues where it stopped"
        return fail([told], 128 + interrupt.number())
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except Exception as error:
        if wants_traceback:
            raise
        failure = error
    finally:
        if not wants_traceback:
            os.environ.pop("HYDRA_FULL_ERROR", None)
    # Outside the handler, or what fails below would carry this failure along.
    return fail(_told(failure, overrides or []))


def _told(failure: Exception, overrides: list[str]) -> list[str]:
    from lorabench.config import first_line

    lines = _explain(failure)
    if lines is None:
        return [
            f"lorabench: {type(failure).__name__}: {first_line(failure, None)}",
            "This is a defect of lorabench or of a library; HYDRA_FULL_ERROR=1 shows where.",
        ]
    return _with_further(lines, overrides) if _is_hydras(failure) else lines


def _is_hydras(error: BaseException) -> bool:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return isinstance(error, (HydraException, OmegaConfBaseException))


def _with_further(lines: list[str], overrides: list[str]) -> list[str]:
    """All overrides that Hydra refuses: it tells of the first, and is asked again without it."""
    from lorabench.cli.composing import compose

    found = list(lines)
    rest = list(overrides)
    while True:
        refused = {line.partition(":")[0] for line in found}
        left = [
            word
            for word in rest
            if word.startswith("-") or word.lstrip("+~").partition("=")[0] not in refused
        ]
        if left == rest:  # not about an override, or all composes
            return found
        rest = left
        try:
            compose(rest)
        except Exception as error:
            found += [line for line in _explain(error) or [] if line not in found]


def _unreadable(override: str, reason: str) -> str:
    key, _, value = override.partition("=")
    if value.endswith(","):
        return (
            f"{key}: the values of a sweep must have commas and no spaces between them; "
            f"got '{value}' and a space; write -m {key}={value}..."
        )
    quoted = value.replace('"', '\\"')
    return (
        f"{key}: the value cannot be read ({reason}); got {value}; a text with braces, colons, "
        f"commas or quotes goes into quotes of its own: '{key}=\"{quoted}\"'"
    )


def _explain(error: BaseException) -> list[str] | None:
    """The user's mistake behind an exception, one line each; None where there is none."""
    import re

    from lorabench.config import ConfigErrors, did_you_mean, first_line, keys

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, ConfigErrors):
            return link.errors
    for link in chain:
        if isinstance(link, OSError) and link.errno in UNWRITABLE:
            where = f" at '{link.filename}'" if link.filename else ""
            return [
                f"disk: must be writable and have space; got '{link.strerror}'{where}; make room "
                "or choose another folder, and repeat the command"
            ]
    import hydra.errors

    for link in chain:
        if isinstance(link, hydra.errors.OverrideParseException) and "=" in link.override:
            return [_unreadable(link.override, first_line(link))]

    text = "\n".join(str(link) for link in chain)
    found = re.search(r"Ambiguous value for argument '([^=']+)=(.*)'\n", text)
    if found:
        key, value = found[1], found[2]
        return [
            f"{key}: must be one value in a single run; got {value}; a sweep is "
            f"-m {key}={value}, a list '{key}=[{value}]', a text with commas '{key}=\"{value}\"'"
        ]
    found = re.search(
        r"Could not find '([\w\-./]+)/([^'/]+)'\s+Available options in '[^']+':((?:\n\t\S+)+)", text
    )
    if found:
        group, name, options = found[1], found[2], found[3].split()
        return [f"{group}: must be one of {', '.join(options)}; got {did_you_mean(name, options)}"]
    found = re.search(r"In 'stages/([^']+)'.*Cannot merge", text, re.DOTALL)
    if found:
        return [
            f"stages: the file stages/{found[1]}.yaml must be a list of {{from_step, train, "
            f"lr_scale}}, or begin with the line '# @package _global_' and hold `stages:` with one"
        ]
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
            return [
                f"{whole[1]}: must be given as one mapping; got the key '{whole[2]}' alone; "
                f"write '{whole[1]}={{{one}}}'"
            ]
        return [
            f"{key}: no such key; got {did_you_mean(key, keys())}; "
            "`lorabench train --cfg job` prints all keys"
        ]
    found = re.search(r"In '[^']+': Could not find '([^']+)'", text)
    if found:
        return [
            f"{found[1]}: no such group or file; "
            "`lorabench train --info defaults-tree` shows what there is"
        ]
    if _is_hydras(error):
        shown = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = error.__cause__
        if cause is not None and str(cause).strip() and str(cause).splitlines()[0] not in shown:
            shown.append(str(cause).splitlines()[0].strip())
        key = re.search(r"full_key: (\S+)", text)
        if key:
            shown = [line for line in shown if "full_key" not in line and "object_type" not in line]
            reason = shown[-1] if len(shown) > 1 else shown[0]
            if "is not a ListConfig" in reason:
                return [f"{key[1]}: must be a list; got one value; write '{key[1]}=[VALUE]'"]
            return [f"{key[1]}: {reason}"]
        return [" ".join(shown[:3])]
    return None
