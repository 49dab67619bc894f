"""Whether the reference completions have an answer that a generation can be compared with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lorabench.config import ConfigErrors, DataConfig


def check_references(cfg: DataConfig, references: Mapping[str, Iterable[str]]) -> list[str]:
    """Return notes on the splits where data.answer_pattern matches only some references.

    Args:
        references: The completions of each split that is scored.
    Raises:
        ConfigErrors: It matches none at all, so that every model would score 0.
    """
    if cfg.answer_pattern is None or not {"answer", "answer_flexible"}.intersection(cfg.metric):
        return []
    pattern = re.compile(cfg.answer_pattern)
    notes, example = [], ""
    num_all = num_unmatched = 0
    for split, texts in references.items():
        total, unmatched, first = 0, 0, ""
        for text in texts:
            total += 1
            if not pattern.search(text):
                unmatched += 1
                first = first or repr(text[-60:])
        num_all += total
        num_unmatched += unmatched
        example = example or first
        if unmatched:
            notes.append(
                f"data.{split}: data.answer_pattern finds no answer in {unmatched} of {total} "
                f"references, such as {first}; whatever is generated for them counts as wrong"
            )
    if num_all and num_unmatched == num_all:
        raise ConfigErrors(
            f"data.answer_pattern: must match references of {' or '.join(references)}; "
            f"got {cfg.answer_pattern!r}, which matches none of {num_all}, such as {example}; "
            "correct it, or leave `answer` and `answer_flexible` out of data.metric"
        )
    return notes
