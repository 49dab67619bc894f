"""Scores of a pack on one split: per example, every run at once.

Definitions (the number after the slash goes up when one changes):
    nll/1              mean negative log-likelihood of an example's completion tokens (with EOS
                       where the completion ends with it), in nats per token; the split's value is
                       the mean over examples
    nll_per_token/1    the same summed over all completion tokens of the split, divided by their
                       number: a long completion weighs more. What stock transformers gives for the
                       whole split in one batch, and what train/loss is for a training batch
    exact_match/1      1 where the argmax equals every completion token given the ones before it,
                       which is when greedy decoding writes exactly the completion
    answer/2           1 where the first match of data.answer_pattern in a greedy generation equals
                       the first match in the reference completion
    answer_flexible/1  1 where the last number in a greedy generation equals the answer of the
                       reference: its first match of data.answer_pattern, or, without a pattern,
                       its own last number. lm-evaluation-harness' flexible-extract of gsm8k
    gym/1              what reasoning-gym's own scorer of the task gives a greedy generation, in
                       [0, 1]; with data.answer_pattern, its first match in the generation, or no
                       answer where it matches nothing. Without spaces at its ends; 0 where the
                       scorer fails on it
    accuracy/1         1 where the likeliest class is the example's; `nll` is then that of its class

A generation ends before the first of data.answer_stop, so that a model that runs on into a next
question is not scored on it. In `answer` and `answer_flexible`, spaces, commas, '$' and a final '.'
do not count, and numbers compare as numbers: 18.00 is 18. The harness compares them as text;
nothing else differs from it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import GenerationConfig

from lorabench import arrays, data
from lorabench.config import DataConfig
from lorabench.pack import Batch, ModulePack, StackedPack

DEFINITIONS = {
    "nll": "nll/1",
    "nll_per_token": "nll_per_token/1",
    "exact_match": "exact_match/1",
    "answer": "answer/2",
    "answer_flexible": "answer_flexible/1",
    "gym": "gym/1",
    "accuracy": "accuracy/1",
}
GENERATED = ("answer", "answer_flexible", "gym")  # metrics that ask for generations
# lm-evaluation-harness, tasks/gsm8k/gsm8k.yaml, filter flexible-extract (its group_select is -1).
LAST_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def evaluate(
    pack: ModulePack | StackedPack,
    tokens: data.Tokens,
    tokenizer: Any,
    pad_id: int,
    metrics: list[str],
    batch_size: int | None = None,
) -> list[pa.Table]:
    """Return one table per run: example (its content id), num_tokens, scores and predictions.

    Args:
        tokens: The tokenised split, already cut to the examples to score.
        metrics: Out of DEFINITIONS; those of GENERATED are the business of `answers`.
        batch_size: Examples per forward; None: trainer.eval_batch_size.
    """
    is_classes = bool(tokens.labels)
    right = "accuracy" if is_classes else "exact_match"
    size = batch_size or pack.configs[0].trainer.eval_batch_size
    count = len(tokens)
    nll = np.full((pack.size, count), np.nan)
    num_tokens = np.zeros(count, dtype=np.int64)
    exact = np.zeros((pack.size, count), dtype=np.int8)
    texts = [[""] * count for _ in range(pack.size)]
    # Examples of similar length together: a model that pads computes less.
    by_length = np.argsort(tokens.input_ids.lengths, kind="stable")
    for start in range(0, count, size):
        indices = by_length[start : start + size]
        input_ids, labels_BT = data.batch(tokens, indices, None, pad_id)
        batch = Batch.make([input_ids], [labels_BT], [pack.size], is_classes)
        nll_RN, argmax_RN = (part.cpu().numpy() for part in pack.score(batch))
        there_BT = labels_BT != data.IGNORED
        num_tokens[indices] = there_BT.sum(1)
        first = np.cumsum(num_tokens[indices])[:-1]  # row of each example but the first
        targets = np.split(labels_BT[there_BT], first)
        for run in range(pack.size):
            nll_B = [one.sum() for one in np.split(nll_RN[run].astype(np.float64), first)]
            nll[run, indices] = nll_B / num_tokens[indices]
            rows = np.split(argmax_RN[run], first)
            pairs = zip(rows, targets, strict=True)
            exact[run, indices] = [np.array_equal(row, target) for row, target in pairs]
            if is_classes:
                written = [tokens.labels[int(ids[0])] for ids in rows]
            else:
                written = tokenizer.batch_decode(rows, skip_special_tokens=True)
            for i, text in zip(indices, written, strict=True):
                texts[run][i] = text
    tables = []
    for run in range(pack.size):
        columns = {"example": arrays.strings(tokens.ids), "num_tokens": arrays.numbers(num_tokens)}
        if "nll" in metrics or "nll_per_token" in metrics:
            columns["nll"] = arrays.numbers(nll[run])
        if right in metrics:
            columns[right] = arrays.numbers(exact[run])
        columns["predicted" if is_classes else "teacher_forced"] = arrays.strings(texts[run])
        tables.append(pa.table(columns))
    return tables


def summarise(table: pa.Table, metrics: list[str]) -> dict[str, tuple[float, int]]:
    """Return the split's value of each metric and the number of examples behind it."""
    found = {}
    for name in metrics:
        column = "nll" if name == "nll_per_token" else name
        if column not in table.column_names:
            continue
        # Answers are asked of some examples only.
        scored = table.filter(table[column].is_valid())
        if not len(scored):  # a source of a mixture that no answer was asked of
            continue
        values = arrays.values_of(scored[column])
        weights = arrays.values_of(scored["num_tokens"]) if name == "nll_per_token" else None
        found[name] = float(np.average(values, weights=weights)), int((~np.isnan(values)).sum())
    return found


def extract(pattern: str, text: str) -> str | None:
    """Return the answer in a text: the first match's last group (or the match), cleaned."""
    match = re.search(pattern, text)
    return _clean(match.group(match.re.groups) or "") if match else None


def last_number(text: str) -> str | None:
    """Return the last number in a text, as lm-evaluation-harness' flexible-extract, cleaned."""
    matches = list(LAST_NUMBER.finditer(text))
    return _clean(matches[-1].group()) if matches else None


def _clean(answer: str) -> str:
    return re.sub(r"[\s,$]", "", answer).rstrip(".")


def is_same(answer: str | None, reference: str | None) -> bool:
    """Return whether two cleaned answers are the same, as numbers where both are numbers."""
    if answer is None or reference is None:
        return False
    both = (answer, reference)
    if all(re.fullmatch(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)", one) for one in both):
        return Decimal(answer) == Decimal(reference)
    return answer == reference


def cut(text: str, stops: list[str]) -> str:
    """Return the text before the first of the stops."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=None)]


def eos_token_ids(base_generation_config: GenerationConfig | None, tokenizer: Any) -> list[int]:
    """Return the ids that end a generation: the base's and the tokenizer's.

    An instruction-tuned base ends its turn with another token than its tokenizer's EOS. Nothing
    else of the base's generation config is used.
    """
    found = {tokenizer.eos_token_id}
    theirs = getattr(base_generation_config, "eos_token_id", None)
    found.update(theirs if isinstance(theirs, list | tuple) else [theirs])
    return sorted(found - {None})


def generation_settings(settings: DataConfig, eos_token_ids: list[int]) -> dict[str, Any]:
    """Return what decides a generation, in transformers' names: greedy, and where it ends."""
    return {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": settings.answer_max_new_tokens,
        "eos_token_id": eos_token_ids,
    }


def scored(
    pack: ModulePack | StackedPack,
    tokens: data.Tokens,
    tokenizer: Any,
    pad_id: int,
    settings: DataConfig,
    batch_size: int,
) -> list[pa.Table]:
    """Return the tables of `evaluate` with every column that settings.metric asks for.

    Those of generated answers come from `answers`.
    """
    tables = evaluate(pack, tokens, tokenizer, pad_id, settings.metric, batch_size)
    if set(GENERATED) & set(settings.metric):
        eos = eos_token_ids(pack.tree.generation_config, tokenizer)
        texts = answers(pack, tokens, tokenizer, pad_id, settings, eos, batch_size)
        for name in texts[0].column_names:
            tables = [
                table.append_column(name, text[name])
                for table, text in zip(tables, texts, strict=True)
            ]
    return tables


def greedy(settings: DataConfig, eos_token_ids: list[int], pad_id: int) -> GenerationConfig:
    """Return the settings of a generation for generate(), with nothing of the base's own in them.

    Args:
        pad_id: What follows the end of a continuation.
    """
    decided = generation_settings(settings, eos_token_ids) | {"eos_token_id": eos_token_ids or None}
    return GenerationConfig(**decided, pad_token_id=pad_id, use_cache=True)


def continuations(
    pack: ModulePack | StackedPack, prompts: Sequence[Sequence[int]], config: GenerationConfig
) -> torch.Tensor:
    """Return what every run writes after each prompt: token ids on the CPU, shape (R, B, L).

    Args:
        prompts: B lists of token ids.
        config: From `greedy`.
    """
    pad_id, width = config.pad_token_id, max(map(len, prompts))
    # Generation continues at the right edge, so prompts are padded on the left.
    input_ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    written_RBL = pack.generate(
        input_ids.to(pack.device), mask.to(pack.device), generation_config=config
    )
    return written_RBL[:, :, width:].cpu()


def answers(
    pack: ModulePack | StackedPack,
    tokens: data.Tokens,
    tokenizer: Any,
    pad_id: int,
    settings: DataConfig,
    eos_token_ids: list[int],
    batch_size: int | None = None,
) -> list[pa.Table]:
    """Generate greedily on the first `answer_examples` examples and score what is written.

    Args:
        tokens: The tokenised split, whichever it is.
        eos_token_ids: What ends a generation; see `eos_token_ids`.
        batch_size: Prompts per generation; None: trainer.eval_batch_size.
    Returns:
        One table per run: generated, and each of GENERATED that settings.metric asks for, in
        [0, 1]; null from the `answer_examples`th example on.
    """
    count = min(settings.answer_examples, len(tokens))
    size = batch_size or pack.configs[0].trainer.eval_batch_size
    wanted = [name for name in GENERATED if name in settings.metric]
    config = greedy(settings, eos_token_ids, pad_id)
    gym_score = data.gym.scorer(settings) if "gym" in wanted else None
    rows: list[list[Any]] = [[None] * count for _ in range(pack.size)]
    # Prompts of similar length together: there is less padding before them.
    starts = tokens.completion_start[:count]
    by_length = np.argsort(starts, kind="stable")
    for start in range(0, count, size):
        chosen = by_length[start : start + size]
        prompts = [tokens.input_ids[i][: starts[i]] for i in chosen]
        completions = [tokens.input_ids[i][starts[i] : tokens.spans[i][-1]] for i in chosen]
        references = tokenizer.batch_decode(completions, skip_special_tokens=True)
        written_RBL = continuations(pack, prompts, config)
        for run in range(pack.size):
            texts = tokenizer.batch_decode(written_RBL[run], skip_special_tokens=True)
            for i, text, reference in zip(chosen, texts, references, strict=True):
                scores: dict[str, float] = {
                    name: score(name, text, reference, settings) for name in wanted if name != "gym"
                }
                if gym_score is not None:
                    scores["gym"] = gym_score(tokens.ids[i], asked_of_gym(text, settings))
                rows[run][i] = {"generated": text, **scores}
    nothing = dict.fromkeys(["generated", *wanted])
    rest = [nothing] * (len(tokens) - count)
    return [pa.Table.from_pylist([*one, *rest]) for one in rows]


def asked_of_gym(text: str, settings: DataConfig) -> str | None:
    """Return what of a generation reasoning-gym scores; None for no answer."""
    text = cut(text, settings.answer_stop)
    if settings.answer_pattern is None:
        return text.strip()
    match = re.search(settings.answer_pattern, text)
    return (match.group(match.re.groups) or "").strip() if match else None


def score(metric: str, text: str, reference: str, settings: DataConfig) -> int:
    """Return 1 if a generation has the reference's answer, else 0.

    Args:
        metric: One of GENERATED, not gym.
        reference: The text of the reference completion.
    """
    pattern, text = settings.answer_pattern, cut(text, settings.answer_stop)
    asked = last_number(reference) if pattern is None else extract(pattern, reference)
    if metric == "answer_flexible":
        return int(is_same(last_number(text), asked))
    assert pattern is not None, "range_errors refuses `answer` without a pattern"
    return int(is_same(extract(pattern, text), asked))
