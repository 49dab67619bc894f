"""Mixtures and named test sets: what can be wrong with them, and how much each source gives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

from lorabench.config import ConfigErrors, DataConfig, parts
from lorabench.config.schema import MixtureConfig
from lorabench.data import sources

TRAIN = re.compile(r"\bdata\.train\b")


def check(cfg: DataConfig) -> list[str]:
    """Return everything wrong with the data that this machine can see, one line each.

    As `sources.check`, with the sources of a mixture and the named test sets.
    """
    errors = sources.check(cfg)
    views = {f"data.mixture[{i}]": view for i, view in enumerate(parts.by_source(cfg).values())}
    views |= {f"data.{parts.key_of(name)}": view for name, view in named_views(cfg).items()}
    for key, view in views.items():
        errors += [told_as(error, key) for error in sources.check(view)]
    return list(dict.fromkeys(errors))


def named_views(cfg: DataConfig) -> dict[str, DataConfig]:
    """Return the named test sets, each as a data config of which it is `train`."""
    return {name: parts.as_train(cfg, one) for name, one in parts.named_sets(cfg).items()}


def told_as(text: str, key: str) -> str:
    """Return a text about `data.train` that is about the part of another key."""
    return TRAIN.sub(key, text)


@contextmanager
def errors_as(key: str) -> Iterator[None]:
    """Tell errors about `data.train` as errors about the part of another key."""
    try:
        yield
    except ConfigErrors as error:
        raise ConfigErrors([told_as(one, key) for one in error.errors]) from error


def shares(mixture: Sequence[MixtureConfig], there: Sequence[int]) -> list[int]:
    """Return how many examples each source of a mixture gives.

    With weights these are the largest numbers in that proportion that repeat no example, rounded
    down, and at least one each; else `num`, or all of them.

    Args:
        there: how many examples each source has.
    """
    weights = [None if one.weight is None else Fraction(str(one.weight)) for one in mixture]
    known = [weight for weight in weights if weight is not None]
    if not known:
        return [
            count if one.num is None else min(one.num, count)
            for one, count in zip(mixture, there, strict=True)
        ]
    unit = min(count / weight for count, weight in zip(there, known, strict=True))
    return [max(1, int(unit * weight)) for weight in known]
