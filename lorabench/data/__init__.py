"""Prompt/completion examples -> tokenised, masked, seeded batches.

Knows no model and no trainer, and imports without torch, transformers and datasets.

files     hashes of files
sources   reading and checking: skills, jsonl files, datasets of the hub
gym       generated tasks of reasoning-gym, and its scores of answers
templates columns -> the text of prompt and completion
hashes    the content hash of each split
splits    which example is in train, validation and test
tokens    prompt and completion as token ids
chat      the same, through the tokenizer's chat template
labels    of a classification: the classes, and prompts as token ids
batches   padding, labels, and the order of the training examples
"""

from lorabench.data.batches import (
    IGNORED,
    batch,
    blocks,
    order,
    order_hash,
    order_of,
    pad_id,
)
from lorabench.data.hashes import content_hash, content_hashes
from lorabench.data.labels import classify, labels_of
from lorabench.data.sources import check
from lorabench.data.splits import Example, Splits, load
from lorabench.data.tokens import Tokens, opens_with_bos, tokenise

__all__ = [
    "IGNORED",
    "Example",
    "Splits",
    "Tokens",
    "batch",
    "blocks",
    "check",
    "classify",
    "content_hash",
    "content_hashes",
    "labels_of",
    "load",
    "opens_with_bos",
    "order",
    "order_hash",
    "order_of",
    "pad_id",
    "tokenise",
]
