"""Whether the reference completions have an answer that a generation can be compared with."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lorabench.config import ConfigErrors, DataConfig, and_more


def check_references(cfg: DataConfig, split: str, completions: Iterable[str]) -> list[str]:
    """Return a note if data.answer_pattern matches only some references of a split.

    Raises:
        ConfigErrors: It matches none, so that every model would score 0.
    """
    if cfg.answer_pattern is None or not {"answer", "answer_flexible"}.intersection(cfg.metric):
        return []
    total = 0
    unmatched: list[str] = []
    for completion in completions:
        total += 1
        if re.search(cfg.answer_pattern, completion) is None:
            unmatched.append(completion)
    if total and len(unmatched) == total:
        raise ConfigErrors(
            f"data.answer_pattern: must match the references of data.{split}; "
            f"got {cfg.answer_pattern!r}, which matches none of {total}, "
            f"such as {unmatched[0][-60:]!r}; correct it, or leave these metrics out"
        )
    if unmatched:
        return [
            f"data.{split}: data.answer_pattern matches no answer in {len(unmatched)} of {total} "
            f"references ({and_more([repr(unmatched[0][-60:])])}), which count as wrong"
        ]
    return []
