"""Prompt/completion examples -> tokenised, masked, seeded batches.

Knows no model and no trainer, and imports without torch, transformers and datasets.

files     hashes of files
readers   files as rows: jsonl, json, csv, tsv, parquet and text
sources   finding, checking and reading: skills, gym, files, datasets of the hub
gym       generated tasks of reasoning-gym, and its scores of answers
templates columns -> the text of prompt and completion
references whether data.answer_pattern finds an answer in them
hashes    the content hash of each split
mixing    sources of a mixture, and test sets beside test
rows      what is read from one source
splits    which example is in train, validation and test
tokens    token ids of examples, and which of them carry a loss
encoding  examples -> tokens, by their format; token_cache keeps those of large sets
chat      the same, through a chat template
turns     the same of conversations, with a loss on chosen turns; conversations reads their rows,
          spans finds the turns in the text
labels    of a classification: the classes, and prompts as token ids
prompts   prompts without completions, for `lorabench generate`
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
from lorabench.data.chat import TEMPLATE_FILE, given_hash, text_hash, text_used
from lorabench.data.chat import check as check_template
from lorabench.data.encoding import opens_with_bos, tokenise, tokenise_once
from lorabench.data.examples import Example
from lorabench.data.hashes import content_hash, content_hashes
from lorabench.data.labels import classify, labels_of
from lorabench.data.mixing import check, named_views
from lorabench.data.prompts import prompt_ids
from lorabench.data.splits import Splits, load
from lorabench.data.templates import CONVERSATIONS
from lorabench.data.tokens import Tokens

__all__ = [
    "CONVERSATIONS",
    "IGNORED",
    "TEMPLATE_FILE",
    "Example",
    "Splits",
    "Tokens",
    "batch",
    "blocks",
    "check",
    "check_template",
    "classify",
    "content_hash",
    "content_hashes",
    "given_hash",
    "labels_of",
    "load",
    "named_views",
    "opens_with_bos",
    "order",
    "order_hash",
    "order_of",
    "pad_id",
    "prompt_ids",
    "text_hash",
    "text_used",
    "tokenise",
    "tokenise_once",
]
