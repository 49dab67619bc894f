"""Secrets are masked in whatever a command writes: its own files, Hydra's, the tracker's, its logs.

A secret is the value, of eight characters or more, of an environment variable, an override or a
config key whose name ends in KEY, TOKEN, SECRET or PASSWORD; and `user:password` in a URL. Masking
happens where something is written, so that nothing that trains ever sees a masked value.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

MASK = "***"
LEAST_CHARACTERS = 8  # shorter values occur in other texts by accident
NAMES = ("key", "token", "secret", "password")  # the last part of a name split at . and _
IN_URL = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*([^,}\s]+)\s*(?:,\s*([^}]*))?\}")
ENTRY = re.compile(r"([\w.]+)[\"']?\s*:\s*[\"']?([^,}\"']+)")  # of a mapping that Hydra cannot read

_typed: set[str] = set()  # secrets of this process's command line


def is_secret(name: str) -> bool:
    """Whether a variable or key of that name holds a secret."""
    return re.split(r"[._]", name)[-1].lower() in NAMES


def mask(content: Any) -> Any:
    """Return text, or a container of texts, with every secret in it replaced by `***`."""
    # Stripped: a line break at the end of a value is no part of what is shown of it.
    ours = {value.strip() for name, value in os.environ.items() if is_secret(name)}
    found = _pattern(frozenset(filter(_is_value, _typed | ours)))
    return _masked(content, found, under_secret=False)


def why_other(content: Any) -> str:
    """Why a config that is read back may mean something else than it did: values were masked."""
    return f" ('{MASK}' in it stands for a secret)" if MASK in str(content) else ""


def _masked(content: Any, found: re.Pattern[str], under_secret: bool) -> Any:
    if isinstance(content, Mapping):
        return {
            key: _masked(value, found, under_secret or is_secret(str(key)))
            for key, value in content.items()
        }
    if isinstance(content, list | tuple):
        parts = [_masked(value, found, under_secret) for value in content]
        return parts if isinstance(content, list) else tuple(parts)
    if under_secret and _is_value(content):
        return MASK
    return found.sub(MASK, content) if isinstance(content, str) else content


def _is_value(content: Any) -> bool:
    text = str(content)
    is_plain = isinstance(content, str | int) and not text.startswith("${")
    return is_plain and len(text) >= LEAST_CHARACTERS and text.lower() not in NAMES


@functools.lru_cache(maxsize=8)
def _pattern(secrets: frozenset[str]) -> re.Pattern[str]:
    """Match the secrets, also as JSON, Python and URLs write them, the longest first."""
    forms = {
        form
        for secret in secrets
        for form in (
            secret,
            json.dumps(secret)[1:-1],
            repr(secret)[1:-1],
            quote(secret, safe="", errors="replace"),
        )
    }
    longest_first = sorted(forms, key=lambda form: (-len(form), form))
    return re.compile("|".join([*map(re.escape, longest_first), IN_URL.pattern]))


# --- the command line ------------------------------------------------------------------------


def typed(words: Sequence[str]) -> set[str]:
    """Return the secrets that the words of a command line hold."""
    found: set[str] = set()
    for word in words:
        key, equals, value = word.lstrip("+~").partition("=")
        if not equals:
            continue
        for name, default in ENVIRONMENT.findall(value):
            if is_secret(name):
                found.add(default.strip().strip("'\""))
            elif is_secret(key):
                found.add(os.environ.get(name, default))
        if re.search("|".join(NAMES), word, re.IGNORECASE):
            found |= _secrets(_parsed(word, value), is_secret(key))
    return {value for value in found if len(value) >= LEAST_CHARACTERS}


def _parsed(word: str, value: str) -> list[Any]:
    """Return what an override may stand for: its text, and the values that Hydra reads in it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    texts = [value, value.strip("'\"")]
    try:
        override = OverridesParser.create().parse_override(word)
        if not override.is_sweep_override():
            return [*texts, override.value()]
        return [*texts, *override.sweep_iterator()]
    except Exception:  # whatever is wrong with it is told where it is used
        return [*texts, *value.split(","), dict(ENTRY.findall(value))]


def _secrets(content: Any, under_secret: bool) -> set[str]:
    if isinstance(content, Mapping):
        parts = [_secrets(value, under_secret or is_secret(str(k))) for k, value in content.items()]
        return set().union(*parts)
    if isinstance(content, list | tuple):
        return set().union(*(_secrets(value, under_secret) for value in content))
    return {str(content)} if under_secret and _is_value(content) else set()


# --- while a command runs --------------------------------------------------------------------


@contextlib.contextmanager
def applied(words: Sequence[str]) -> Iterator[None]:
    """Mask what this process prints and logs, with the secrets of these words besides."""
    before, make = set(_typed), logging.getLogRecordFactory()
    _typed.update(typed(words))
    logging.setLogRecordFactory(functools.partial(_masked_record, make))
    streams: Any = (Masked(sys.stdout), Masked(sys.stderr))
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            yield
    finally:
        logging.setLogRecordFactory(make)
        _typed.clear()
        _typed.update(before)


class Masked:
    """A text stream that masks what is written to it; in all else the stream that it writes to."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(mask(text))
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _masked_record(make: Any, *args: Any, **kwargs: Any) -> logging.LogRecord:
    """Make a log record without secrets: every handler, whosever, gets its text from there."""
    record: logging.LogRecord = make(*args, **kwargs)
    with contextlib.suppress(Exception):  # arguments that do not fit: the handler reports them
        record.msg, record.args = mask(record.getMessage()), None
    if record.exc_info and record.exc_info[0] is not None:
        record.exc_text = mask(logging.Formatter().formatException(record.exc_info))
    return record


@contextlib.contextmanager
def hydras_files() -> Iterator[None]:
    """Mask the files that Hydra, its launchers and its sweepers write in this process.

    They write them before any callback or task sees the run, and all through this one function.
    """
    from omegaconf import OmegaConf

    write = OmegaConf.to_yaml

    def to_yaml(cfg: Any, *, resolve: bool = False, sort_keys: bool = False) -> str:
        cfg = cfg if OmegaConf.is_config(cfg) else OmegaConf.structured(cfg)
        content = OmegaConf.to_container(cfg, resolve=resolve, enum_to_str=True)
        masked = mask(content)
        cfg = cfg if masked == content else OmegaConf.create(masked)
        return write(cfg, resolve=resolve and masked == content, sort_keys=sort_keys)

    OmegaConf.to_yaml = staticmethod(to_yaml)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        OmegaConf.to_yaml = staticmethod(write)  # type: ignore[method-assign, assignment]
