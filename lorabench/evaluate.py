"""Scores of a pack on one split: per example, every run at once.

Definitions (the number after the slash goes up when one changes):
    nll/1          mean negative log-likelihood of an example's completion tokens (with EOS where
                   the completion ends with it), nats a token; the split's value is the mean over
                   examples
    exact_match/1  1 where the argmax equals every completion token given the ones before it,
                   which is when greedy decoding writes exactly the completion
    answer/1       1 where the last match of data.answer_pattern in a greedy generation equals the
                   last match in the reference completion, spaces, commas, '$' and a final '.' aside
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import torch

from lorabench import data
from lorabench.config import DataConfig
from lorabench.pack import ModulePack, autocast

DEFINITIONS = {"nll": "nll/1", "exact_match": "exact_match/1", "answer": "answer/1"}


def evaluate(
    pack: ModulePack, tokens: data.Tokens, tokenizer: Any, pad_id: int, metrics: list[str]
) -> list[pd.DataFrame]:
    """One table a run: example (its content id), the metrics asked for, and what was predicted.

    Args:
        tokens: the tokenised split, already cut to the examples to score.
        metrics: out of DEFINITIONS.
    """
    size = pack.config.trainer.eval_batch_size
    length = data.padded_length(tokens, pack.config.data.max_length)
    nll: list[list[np.ndarray]] = [[] for _ in range(pack.size)]
    exact: list[list[np.ndarray]] = [[] for _ in range(pack.size)]
    texts: list[list[str]] = [[] for _ in range(pack.size)]
    for start in range(0, len(tokens.input_ids), size):
        indices = np.arange(start, min(start + size, len(tokens.input_ids)))
        input_ids, labels = data.batch(tokens, indices, length, pad_id)
        nll_RN, argmax_RN, example_N = (
            part.cpu().numpy()
            for part in pack.score(
                torch.from_numpy(input_ids).to(pack.device),
                torch.from_numpy(labels).to(pack.device),
            )
        )
        target_N = labels[:, 1:][labels[:, 1:] != -100]
        count_B = np.bincount(example_N, minlength=len(indices))
        first_B = np.concatenate([[0], np.cumsum(count_B)[:-1]])
        for run in range(pack.size):
            total = np.add.reduceat(nll_RN[run].astype(np.float64), first_B)
            nll[run].append(total / count_B)
            right = np.add.reduceat((argmax_RN[run] == target_N).astype(np.int64), first_B)
            exact[run].append(right == count_B)
            rows = np.split(argmax_RN[run], first_B[1:])
            texts[run] += tokenizer.batch_decode(list(rows), skip_special_tokens=True)
    tables = []
    for run in range(pack.size):
        table = pd.DataFrame({"example": tokens.ids})
        if "nll" in metrics:
            table["nll"] = np.concatenate(nll[run])
        if "exact_match" in metrics:
            table["exact_match"] = np.concatenate(exact[run]).astype(np.int8)
        table["teacher_forced"] = texts[run]
        tables.append(table)
    return tables


def summarise(table: pd.DataFrame, metrics: list[str]) -> dict[str, tuple[float, int]]:
    """The split's value of each metric and the number of examples behind it."""
    return {
        # only `answer` is asked of some examples; any other gap is a value that is not finite
        name: (float(table[name].mean(skipna=name == "answer")), int(table[name].notna().sum()))
        for name in metrics
        if name in table
    }


def extract(pattern: str, text: str) -> str | None:
    """The answer in a text: the last match's last group (or the match), normalised."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    found = matches[-1]
    answer = found.group(found.re.groups) if found.re.groups else found.group()
    return re.sub(r"[\s,$]", "", answer or "").rstrip(".")


@torch.no_grad()
def answers(
    pack: ModulePack, tokens: data.Tokens, tokenizer: Any, pad_id: int, settings: DataConfig
) -> pd.DataFrame:
    """Greedy generations on the first `answer_examples` examples and whether they are right.

    Returns:
        example, generated, answer (0 or 1).
    """
    count = min(settings.answer_examples, len(tokens.input_ids))
    size = pack.config.trainer.eval_batch_size
    assert settings.answer_pattern is not None
    rows = []
    pack.tree.eval()
    try:
        for start in range(0, count, size):
            chosen = range(start, min(start + size, count))
            prompts = [tokens.input_ids[i][: tokens.completion_start[i]] for i in chosen]
            width = max(map(len, prompts))
            # Generation continues at the right edge, so prompts are padded on the left.
            input_ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
            with autocast(pack.config, pack.device):
                written = pack.tree.generate(
                    input_ids=input_ids.to(pack.device),
                    attention_mask=mask.to(pack.device),
                    max_new_tokens=settings.answer_max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    use_cache=True,
                    pad_token_id=pad_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
            texts = tokenizer.batch_decode(written[:, width:].cpu(), skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                reference = tokenizer.decode(
                    tokens.input_ids[i][tokens.completion_start[i] :], skip_special_tokens=True
                )
                wanted = extract(settings.answer_pattern, reference)
                right = wanted is not None and extract(settings.answer_pattern, text) == wanted
                rows.append({"example": tokens.ids[i], "generated": text, "answer": int(right)})
    finally:
        pack.tree.train()
    return pd.DataFrame(rows)
