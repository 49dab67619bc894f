"""The sources of a mixture and the named test sets, each seen as a data config of its own.

Whatever reads, checks or tokenises data takes a `DataConfig`. A part becomes one in which it is
`train`, so that a source of a mixture and a test set are read like any other.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from lorabench.config.choices import Found
from lorabench.config.schema import (
    DataConfig,
    MixtureConfig,
    NamedSetConfig,
    PartConfig,
    SourceConfig,
)

RETENTION = "retention"
SPLITS = ("train", "validation", "test")
OWN_KEYS = ("format", "messages", "text")  # beside those of a source
# What only these formats read; a part of another format does not inherit it.
OF_CHAT = ("messages", "system", "merge_turns", "loss_on", "tools")
OF_FORMAT = {
    "prompt_completion": ("prompt", "completion"),
    "messages": OF_CHAT,
    "sharegpt": OF_CHAT,
    "text": ("text",),
}
GENERATED = ("skills", "gym")  # values of data.source that read no files
READ_AS = "path"  # data.source of the named sets of generated data


def named_sets(data: DataConfig) -> dict[str, NamedSetConfig]:
    """Return the test sets beside `data.test` by name; retention, if there is one, comes last."""
    found = dict(data.tests or {})
    if data.retention.path is not None:
        found[RETENTION] = data.retention
    return found


def key_of(split: str) -> str:
    """Return the config key of a split below `data`; content hashes have the same name."""
    return split if split in (*SPLITS, RETENTION) else f"tests.{split}"


def source_names(data: DataConfig) -> list[str]:
    """Return what each source of a mixture is called, in order."""
    return [_name(one.name, one.path) for one in data.mixture]


def parts_of(data: DataConfig) -> dict[str, PartConfig]:
    """Return the sources of the mixture and the named sets, by their config keys."""
    found: dict[str, PartConfig] = {f"data.mixture[{i}]": p for i, p in enumerate(data.mixture)}
    return found | {f"data.{key_of(name)}": part for name, part in named_sets(data).items()}


def describe(mixture: list[dict[str, Any]]) -> str:
    """Return a mixture in a few words, such as "maths.jsonl:500,words.jsonl"."""
    told = []
    for one in mixture:
        num, weight = one.get("num"), one.get("weight")
        told.append(
            _name(one.get("name"), one.get("path"))
            + (f":{num}" if num is not None else f"*{weight:g}" if weight is not None else "")
        )
    return ",".join(told)


def _name(name: str | None, path: str | None) -> str:
    return name or re.split(r"[/\\]", (path or "").rstrip("/\\"))[-1]


def by_source(data: DataConfig) -> dict[str, DataConfig]:
    """Return the sources of a mixture by name, each as a data config."""
    views = [as_train(data, one) for one in data.mixture]
    return dict(zip(source_names(data), views, strict=True))


def as_train(data: DataConfig, part: PartConfig) -> DataConfig:
    """Return a data config whose `train` is this part, with nothing beside it.

    Keys of another format than the part's are at their defaults.
    """
    source = {one.name: getattr(part, one.name) for one in dataclasses.fields(SourceConfig)}
    default = DataConfig()
    changes: dict[str, Any] = {
        "mixture": [], "tests": None, "retention": NamedSetConfig(),
        "train": SourceConfig(**source), "validation": SourceConfig(), "test": SourceConfig(),
        "num_train": None, "split_by": None,
    }  # fmt: skip
    if isinstance(part, MixtureConfig):
        if data.validation.path is None or data.test.path is None:
            changes["split_by"] = data.split_by
    elif data.source in GENERATED:
        changes |= {"source": READ_AS, "skills": [], "gym": None}
    form = part.format or data.format
    used = OF_FORMAT.get(form, ())
    for key in {key for keys in OF_FORMAT.values() for key in keys}:
        if key not in used or (form != data.format and key not in OF_CHAT[1:]):
            changes[key] = getattr(default, key)
    changes |= {key: value for key in OWN_KEYS if (value := getattr(part, key)) is not None}
    if form == "text":
        changes |= {"chat_template": False, "too_long": "leave_out"}
    if form == "text" or (form == "prompt_completion" and data.chat_template is False):
        changes["chat_template_kwargs"] = None
    return dataclasses.replace(data, **changes)


def check(found: Found, data: DataConfig, check_format: Any) -> None:
    """Add what is wrong with the mixture and the named sets to `found`.

    Args:
        check_format: adds what is wrong with the format of one data config to a `Found`.
    """
    must = found.must
    if data.mixture:
        given = data.source not in GENERATED
        law = f"left out with data.source={data.source}"
        must(given, "data.mixture", law, source_names(data), "use data=jsonl or data=hub")
        law = "left out beside data.mixture, which takes its place"
        must(data.train.path is None, "data.train.path", law, data.train.path,
             "make it one of data.mixture")  # fmt: skip
        _mixture(found, data)
    for name, part in sorted((data.tests or {}).items()):
        must(
            re.fullmatch(r"[A-Za-z0-9_\-]+", name) is not None and name not in (*SPLITS, RETENTION),
            "data.tests",
            "named by letters, digits, '_' and '-', and not train, validation, test or retention",
            name,
            "give it another name",
        )
        must(part.path is not None, f"data.tests.{name}.path", "given", None,
             f"set data.tests.{name}.path=...")  # fmt: skip
    default = NamedSetConfig()
    if data.retention.path is None and data.retention != default:
        given_keys = [k for k, v in vars(data.retention).items() if v != getattr(default, k)]
        for key in given_keys:
            must(False, f"data.retention.{key}", "left out with data.retention.path=null",
                 getattr(data.retention, key), "give data.retention.path too")  # fmt: skip
    for key, part in parts_of(data).items():
        must(part.num is None or part.num >= 1, f"{key}.num", "at least 1", part.num)
        _format(found, key, data, part, check_format)


def _mixture(found: Any, data: DataConfig) -> None:
    """How much of each source is taken, and what it is called."""
    must, names = found.must, source_names(data)
    for i, (one, name) in enumerate(zip(data.mixture, names, strict=True)):
        key = f"data.mixture[{i}]"
        must(one.path is not None, f"{key}.path", "given", None, "give path=...")
        must(
            names.count(name) == 1 or not name,
            f"{key}.name",
            "another one for each source",
            name,
            "give name=...",
        )
        weight = one.weight
        must(weight is None or (math.isfinite(weight) and weight > 0), f"{key}.weight", "above 0",
             weight)  # fmt: skip
    weighted = [one.weight is not None for one in data.mixture]
    numbered = any(one.num is not None for one in data.mixture)
    if any(weighted):
        law = "given for every source or for none, and not beside num"
        must(all(weighted) and not numbered, "data.mixture", f"such that weight is {law}",
             [[one.weight, one.num] for one in data.mixture])  # fmt: skip


def _format(found: Any, key: str, data: DataConfig, part: PartConfig, check_format: Any) -> None:
    """What is wrong with a part's own keys; what it inherits is checked where it is given."""
    own = [name for name in OWN_KEYS if getattr(part, name) is not None]
    form = part.format or data.format
    for name in ("prompt", "completion"):
        law = f"left out with format={form}"
        must_not = form != "prompt_completion" and getattr(part, name) is not None
        found.must(not must_not, f"{key}.{name}", law, getattr(part, name))
    if own:
        mine = type(found)()
        check_format(mine, as_train(data, part))
        found.errors += [
            f"{key}.{error.removeprefix('data.')}"
            for error in mine.errors
            if error.removeprefix("data.").partition(":")[0] in own
        ]
