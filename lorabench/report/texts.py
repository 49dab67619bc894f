"""The texts of scored examples, where the data that they come from are at hand."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

from lorabench.record import Record
from lorabench.report.changes import shortened

# By data: `watch` makes page after page of the same examples.
_read: dict[str, tuple[dict[str, tuple[str, str]], str]] = {}


def texts_of(
    records: Sequence[Record], ids: Collection[str]
) -> tuple[dict[str, tuple[str, str]], str | None]:
    """Read prompts and completions of test examples again, from files and caches alone.

    An id is a hash of both, so that a text is never shown beside an example that it is not of.

    Returns:
        Prompt and completion by id; and why some are missing, if they are.
    """
    if not records or not ids:
        return {}, None
    wanted, why = set(ids), "they are no longer in the data"
    found: dict[str, tuple[str, str]] = {}
    for name, content in {repr(one.config.get("data")): one.config for one in records}.items():
        if len(found) == len(wanted):
            break
        if name not in _read:
            _read[name] = _texts_in(content)
        texts, failed = _read[name]
        why = failed or why
        found |= {id: texts[id] for id in wanted & texts.keys()}
    missing = len(wanted) - len(found)
    if not missing:
        return found, None
    return found, f"the texts of {missing} of {len(wanted)} examples cannot be read again ({why})"


def _texts_in(content: dict[str, Any]) -> tuple[dict[str, tuple[str, str]], str]:
    """Prompt and completion of every test example of a run's config; and why they are missing."""
    from omegaconf import OmegaConf

    from lorabench import config, data

    # Nothing is downloaded for a page.
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    try:
        examples = data.load(config.typed(OmegaConf.create(content)).data).test
    except Exception as error:  # whatever became of the data, the page is made
        return {}, config.first_line(error)
    return {one.id: (shortened(one.prompt), shortened(one.completion)) for one in examples}, ""
