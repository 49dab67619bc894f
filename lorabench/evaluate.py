"""Scores of a pack on one split: per example, every run at once.

Definitions (the number after the slash goes up when one changes):
    nll/1          mean negative log-likelihood of an example's completion tokens (with EOS where
                   the completion ends with it), nats a token; the split's value is the mean over
                   examples
    exact_match/1  1 where the argmax equals every completion token given the ones before it,
                   which is when greedy decoding writes exactly the completion
    answer/1       1 where the last match of data.answer_pattern in a greedy generation equals the
                   last match in the reference completion, spaces, commas, '$' and a final '.' aside
    accuracy/1     1 where the likeliest class is the example's; `nll` is then that of its class
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lorabench import data
from lorabench.config import DataConfig
from lorabench.pack import Batch, ModulePack, StackedPack

DEFINITIONS = {
    "nll": "nll/1",
    "exact_match": "exact_match/1",
    "answer": "answer/1",
    "accuracy": "accuracy/1",
}


def evaluate(
    pack: ModulePack | StackedPack,
    tokens: data.Tokens,
    tokenizer: Any,
    pad_id: int,
    metrics: list[str],
    batch_size: int | None = None,
) -> list[pa.Table]:
    """One table a run: example (its content id), the metrics asked for, and what was predicted.

    Args:
        tokens: the tokenised split, already cut to the examples to score.
        metrics: out of DEFINITIONS.
    """
    is_classes = bool(tokens.labels)
    right = "accuracy" if is_classes else "exact_match"
    settings = pack.configs[0]
    size = batch_size or settings.trainer.eval_batch_size
    count = len(tokens)
    nll = np.full((pack.size, count), np.nan)
    exact = np.zeros((pack.size, count), dtype=np.int8)
    texts = [[""] * count for _ in range(pack.size)]
    # Examples of similar length together: a batch is as wide as its longest.
    by_length = np.argsort([len(ids) for ids in tokens.input_ids], kind="stable")
    for start in range(0, count, size):
        indices = by_length[start : start + size]
        length = max(len(tokens.input_ids[i]) for i in indices)
        width = data.longest_completion(tokens, indices)
        input_ids, labels = data.batch(tokens, indices, length, pad_id)
        batch = Batch.make([input_ids], [labels], width, pack.device)
        nll_RN, argmax_RN = (part.cpu().numpy() for part in pack.score(batch))
        targets_BW = batch.targets_SN[0].cpu().numpy().reshape(len(indices), -1)
        there_BW = targets_BW != data.IGNORED
        for run in range(pack.size):
            nll_BW = np.where(there_BW, nll_RN[run].reshape(there_BW.shape).astype(np.float64), 0)
            argmax_BW = argmax_RN[run].reshape(there_BW.shape)
            nll[run, indices] = nll_BW.sum(1) / there_BW.sum(1)
            exact[run, indices] = ((argmax_BW == targets_BW) | ~there_BW).all(1)
            rows = [ids[there] for ids, there in zip(argmax_BW, there_BW, strict=True)]
            if is_classes:
                written = [tokens.labels[int(ids[0])] for ids in rows]
            else:
                written = tokenizer.batch_decode(rows, skip_special_tokens=True)
            for i, text in zip(indices, written, strict=True):
                texts[run][i] = text
    tables = []
    for run in range(pack.size):
        columns: dict[str, Any] = {"example": tokens.ids}
        if "nll" in metrics:
            columns["nll"] = nll[run]
        if right in metrics:
            columns[right] = exact[run]
        columns["predicted" if is_classes else "teacher_forced"] = texts[run]
        tables.append(pa.table(columns))
    return tables


def summarise(table: pa.Table, metrics: list[str]) -> dict[str, tuple[float, int]]:
    """The split's value of each metric and the number of examples behind it."""
    found = {}
    for name in (name for name in metrics if name in table.column_names):
        values = table[name].drop_null().to_numpy()  # `answer` is asked of some examples only
        found[name] = float(values.mean()), int((~np.isnan(values)).sum())
    return found


def extract(pattern: str, text: str) -> str | None:
    """The answer in a text: the last match's last group (or the match), normalised."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    found = matches[-1]
    answer = found.group(found.re.groups) if found.re.groups else found.group()
    return re.sub(r"[\s,$]", "", answer or "").rstrip(".")


def answers(
    pack: ModulePack | StackedPack,
    tokens: data.Tokens,
    tokenizer: Any,
    pad_id: int,
    settings: DataConfig,
) -> list[pa.Table]:
    """Greedy generations on the first `answer_examples` examples and whether they are right.

    Returns:
        One table a run: generated, answer (0 or 1); null from the `answer_examples`th on.
    """
    count = min(settings.answer_examples, len(tokens))
    size = pack.configs[0].trainer.eval_batch_size
    assert settings.answer_pattern is not None
    rows: list[list[dict[str, Any]]] = [[] for _ in range(pack.size)]
    for start in range(0, count, size):
        chosen = range(start, min(start + size, count))
        prompts = [tokens.input_ids[i][: tokens.completion_start[i]] for i in chosen]
        width = max(map(len, prompts))
        # Generation continues at the right edge, so prompts are padded on the left.
        input_ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        written_RBL = pack.generate(
            input_ids.to(pack.device),
            mask.to(pack.device),
            max_new_tokens=settings.answer_max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad_id,
            eos_token_id=tokenizer.eos_token_id,
        ).cpu()
        for run in range(pack.size):
            texts = tokenizer.batch_decode(written_RBL[run, :, width:], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                completion = tokens.input_ids[i][tokens.completion_start[i] :]
                wanted = extract(
                    settings.answer_pattern, tokenizer.decode(completion, skip_special_tokens=True)
                )
                right = wanted is not None and extract(settings.answer_pattern, text) == wanted
                rows[run].append({"generated": text, "answer": int(right)})
    nothing = [{"generated": None, "answer": None}] * (len(tokens) - count)
    return [pa.Table.from_pylist([*one, *nothing]) for one in rows]


def eos_token_ids(generation: Any, tokenizer: Any) -> list[int]:
    return [tokenizer.eos_token_id]


def generation_settings(settings: DataConfig, eos: list[int]) -> dict[str, Any]:
    return {"eos_token_ids": eos}
