"""Scores of the untrained base, `<sweep>/base/`: what they are, reading and writing.

One entry per base and evaluation of a sweep folder, shared by all runs that were scored the same
way. Imports without torch. docs/record-format.md describes every field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lorabench import identity, masking
from lorabench.config import flatten
from lorabench.files import replace
from lorabench.hashes import file_hash
from lorabench.record import Evaluation, Record, checksum

FOLDER = "base"  # in the sweep folder
SCHEMA_VERSION = 1
# Config keys that decide the scores of a base beside the evaluation's own settings: how texts
# become tokens, and the precision of the computation.
CONDITIONS = (
    "data.chat_template",
    "data.add_bos",
    "data.add_eos",
    "data.max_length",
    "model.attn_implementation",
    "trainer.dtype",
)
LATER = ("data.format", "data.system", "data.merge_turns", "data.loss_on", "data.tools",
         "data.chat_template_kwargs", "data.too_long")  # fmt: skip


class BaseEvaluation(BaseModel):
    """Scores of a base without an adapter, with what decides them."""

    schema_version: int = SCHEMA_VERSION
    id: str  # first 12 hex digits of sha256 over base, tokenizer, conditions and settings
    model: str  # name of the base in tables
    base: str  # checksum of its tensors, as in the `hashes` of a run
    tokenizer: str  # hash of its files, or the commit of a Hub base
    conditions: dict[str, Any]  # CONDITIONS and their values
    evaluation: Evaluation  # `predictions` is relative to the folder of this file

    def is_of(self, run: Record) -> bool:
        """Whether this is the base of a run, its texts tokenised and computed as the run's.

        Which of the run's evaluations it goes with, `evaluation.id` says.
        """
        return (self.base, self.tokenizer, self.conditions) == (
            run.hashes.get("base"),
            tokenizer_of(run.provenance),
            conditions_of(run.config),
        )

    def write(self, sweep: Path) -> None:
        """Replace the entry's file in a sweep folder in one step."""
        content = masking.mask(self.model_dump(mode="json"))
        content["checksum"] = checksum(content)
        replace(place_of(sweep, self.id), json.dumps(content, indent=2) + "\n")


def conditions_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return CONDITIONS with their values in a nested config; None for a missing key.

    Of keys that came later only those that do not do what was done without them.
    """
    flat = flatten(dict(config))
    later = {key: flat[key] for key in LATER if _is_new(key, flat)}
    return {key: flat.get(key) for key in CONDITIONS} | later


def _is_new(key: str, flat: Mapping[str, Any]) -> bool:
    usual = identity.NEUTRAL[key]
    return bool(flat.get(key, usual) != usual)


def tokenizer_of(contents: Mapping[str, Any]) -> str:
    """Return what names a run's tokenizer.

    Args:
        contents: `contents` of a plan, or `provenance` of a record.
    """
    return str(contents.get("tokenizer") or contents.get("revision") or "")


def id_of(base: str, tokenizer: str, conditions: Mapping[str, Any], settings: Any) -> str:
    """Return the id of an entry.

    Args:
        base: checksum of the base's tensors.
        settings: of the evaluation, as in `Evaluation.settings`.
    """
    return identity.short_hash([base, tokenizer, conditions, settings])


def why_none(config: Mapping[str, Any]) -> str | None:
    """Return why the base of a run is not scored; None if it is.

    Args:
        config: of the run, as in its record.
    """
    if config.get("task") == "seq_cls":
        return "a classifier's base has no head to score: each run draws its own"
    if (config.get("trainer") or {}).get("eval_base") is False:
        return "trainer.eval_base=false"
    return None


def place_of(sweep: Path, id: str) -> Path:
    """Return the file of an entry in a sweep folder."""
    return sweep / FOLDER / f"{id}.json"


def base_evaluations(sweep: Path) -> list[BaseEvaluation]:
    """Return the entries of a sweep folder that are whole, by id.

    An entry whose file or predictions are not what was written is left out; the next command that
    serves the folder scores it again.
    """
    paths = sorted((sweep / FOLDER).glob("*.json"))
    found = (read(sweep, path.stem) for path in paths)
    return [entry for entry in found if entry is not None]


def read(sweep: Path, id: str) -> BaseEvaluation | None:
    """Return an entry of a sweep folder; None if there is none or it is not what was written."""
    path = place_of(sweep, id)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] > SCHEMA_VERSION or content["checksum"] != checksum(content):
            return None
        entry = BaseEvaluation.model_validate(content)
        predictions = path.parent / entry.evaluation.predictions
        if entry.id != id or file_hash(predictions) != entry.evaluation.predictions_sha256:
            return None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # no file, no text, no JSON, or not this schema
    return entry
