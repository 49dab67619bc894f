"""The texts of scored examples, where the data that they come from are at hand."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from lorabench.record import Record
from lorabench.report.changes import shortened

# By data and id: `watch` makes page after page of the same examples.
_known: dict[tuple[str, str], tuple[str, str]] = {}


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
    configs = {repr(one.config.get("data")): one.config for one in records}

    def known() -> dict[str, tuple[str, str]]:
        return {id: _known[name, id] for name in configs for id in wanted if (name, id) in _known}

    found = known()
    for name, content in configs.items():
        if len(found) == len(wanted):
            break
        try:
            examples = data.load(config.typed(OmegaConf.create(content)).data).test
        except Exception as error:  # whatever became of the data, the page is made
            why = config.first_line(error)
            continue
        _known.update(
            ((name, one.id), (shortened(one.prompt), shortened(one.completion)))
            for one in examples
            if one.id in wanted
        )
        found = known()
    missing = len(wanted) - len(found)
    if not missing:
        return found, None
    return found, f"the texts of {missing} of {len(wanted)} examples cannot be read again ({why})"
