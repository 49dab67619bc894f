"""Prompt/completion examples -> tokenised, masked, seeded batches.

Knows no model and no trainer, and imports without torch, transformers and datasets.

sources   reading and checking: skills, jsonl files, datasets of the hub
templates columns -> the text of prompt and completion
splits    which example is in train, validation and test; the hash of them all
tokens    prompt and completion as token ids
labels    of a classification: the classes, and prompts as token ids
batches   padding, labels, and the order of the training examples
"""

from lorabench.data.batches import (
    IGNORED,
    batch,
    longest_completion,
    order,
    order_hash,
    pad_id,
    padded_length,
)
from lorabench.data.labels import classify, labels_of
from lorabench.data.sources import check
from lorabench.data.splits import Example, Splits, content_hash, load
from lorabench.data.tokens import Tokens, tokenise

__all__ = [
    "IGNORED",
    "Example",
    "Splits",
    "Tokens",
    "batch",
    "check",
    "classify",
    "content_hash",
    "labels_of",
    "load",
    "longest_completion",
    "order",
    "order_hash",
    "pad_id",
    "padded_length",
    "tokenise",
]
