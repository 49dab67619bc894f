"""A base and a data set on which lengths matter: instruction-like, a few long among many short.

The base has random weights: only time is measured, and whether contenders agree.
"""

from __future__ import annotations

import json
import math
import random
import string
from pathlib import Path

MEAN, SIGMA, CAP = 107, 0.8, 512  # tokens of an example, log-normal
COUNTS = {"train": 2000, "validation": 50, "test": 100}  # examples


def lengths(count: int, seed: int = 0, cap: int = CAP) -> list[int]:
    """Return the tokens of each example: log-normal, as instruction sets are, up to the cap.

    Longer ones are drawn again, as if data.max_length had left them out: at the cap of 512 tokens
    the mean is about 102 instead of 107.
    """
    draw = random.Random(seed)
    mu = math.log(MEAN) - SIGMA**2 / 2
    found: list[int] = []
    while len(found) < count:
        length = round(draw.lognormvariate(mu, SIGMA))
        if 8 <= length <= cap:
            found.append(length)
    return found


def write(folder: Path) -> list[str]:
    """Write the base and the data, and return the overrides that train on them.

    The base is of the Llama shape: 4 layers of width 192, one token a character.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from lorabench import model as base_model

    tokenizer = AutoTokenizer.from_pretrained(base_model.ZOO / "tiny-gemma")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=CAP,
        tie_word_embeddings=True, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    draw = random.Random(1)
    sources = []
    for seed, (split, count) in enumerate(COUNTS.items()):
        rows = []
        for i, length in enumerate(lengths(count, seed)):
            name = f"{'abc'[seed]}{i}"  # no prompt twice, in one split or in two
            letters = draw.choices(string.ascii_lowercase, k=length - 2 - len(name))  # BOS, EOS
            text = name + "".join(letters)
            place = max(len(name), round(len(text) * draw.uniform(0.2, 0.6)))
            rows.append({"prompt": text[:place], "completion": text[place:]})
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(f"data.{split}.path={path}")
    where = f"model.path={folder / 'base'}"
    return ["model=local", "recipe=embedded", where, "data=jsonl", *sources]
