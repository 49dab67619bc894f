"""The texts of scored examples, where the data that they come from are at hand."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from lorabench.record import Record
from lorabench.report.changes import shortened


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
    # Nothing is downloaded for a page.
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    from omegaconf import OmegaConf

    from lorabench import config, data

    wanted, why = set(ids), "they are no longer in the data"
    found: dict[str, tuple[str, str]] = {}
    for content in {repr(one.config.get("data")): one.config for one in records}.values():
        if len(found) == len(wanted):
            break
        try:
            examples = data.load(config.typed(OmegaConf.create(content)).data).test
        except Exception as error:  # whatever became of the data, the page is made
            why = config.first_line(error)
            continue
        found |= {
            one.id: (shortened(one.prompt), shortened(one.completion))
            for one in examples
            if one.id in wanted
        }
    missing = len(wanted) - len(found)
    if not missing:
        return found, None
    return found, f"the texts of {missing} of {len(wanted)} examples cannot be read again ({why})"
