"""Whether the reference completions have an answer that a generation can be compared with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lorabench.config import ConfigErrors, DataConfig


def check_references(cfg: DataConfig, references: Mapping[str, Sequence[str]]) -> list[str]:
    """Return notes on the splits where data.answer_pattern matches only some references.

    Args:
        references: The completions of each split that is scored.
    Raises:
        ConfigErrors: It matches none at all, so that every model would score 0.
    """
    if cfg.answer_pattern is None or not {"answer", "answer_flexible"}.intersection(cfg.metric):
        return []
    pattern = re.compile(cfg.answer_pattern)
    unmatched = {
        split: [text for text in texts if not pattern.search(text)]
        for split, texts in references.items()
    }
    if all(len(unmatched[split]) == len(texts) for split, texts in references.items()):
        example = next(text for texts in references.values() for text in texts)
        raise ConfigErrors(
            f"data.answer_pattern: must match references of {' or '.join(references)}; "
            f"got {cfg.answer_pattern!r}, which matches none of "
            f"{sum(map(len, references.values()))}, such as {example[-60:]!r}; correct it, or "
            "leave `answer` and `answer_flexible` out of data.metric"
        )
    return [
        f"data.{split}: data.answer_pattern finds no answer in {len(texts)} of "
        f"{len(references[split])} references, such as {texts[0][-60:]!r}; whatever is generated "
        "for them counts as wrong"
        for split, texts in unmatched.items()
        if texts
    ]
