"""Examples -> tokens, by the rules of their format."""

from __future__ import annotations

import dataclasses
import heapq
import os
import signal
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from operator import itemgetter
from typing import Any

from lorabench import interrupt
from lorabench.config import ConfigErrors, DataConfig, parts
from lorabench.data import token_cache, turns
from lorabench.data.chat import chat
from lorabench.data.examples import Example, some
from lorabench.data.labels import classify
from lorabench.data.tokens import Encoded, Kept, Tokens

PARALLEL = 40_000  # examples from which several processes take less time, their start included
PART = 5_000  # examples that one of them is given at once


def tokenise(
    examples: Sequence[Example], tokenizer: Any, cfg: DataConfig, stops: Collection[int] = ()
) -> Tokens:
    """Return the token ids of every example that fits `max_length`.

    A prompt and its completion:
    - They are tokenised apart and joined. Tokenised together, a token may span
      both ("=" and "5" as "=5"): then the boundary is in the middle of a token, and the prompt's
      ids are not those the model gets when it must answer.
    - `add_bos`: one BOS opens the prompt, where the tokenizer itself opens a text with it and the
      prompt does not begin with it already.
    - `add_eos`: one EOS closes the completion.
    - `chat_template`: the prompt is a user turn with the opening of the assistant's; the
      completion is what the full conversation adds to it. BOS is the template's business. With
      `add_eos` the completion ends at the template's EOS, or, where it writes none, gets one.
      Today's date, where the template writes one, is always 26 July 2024.

    A conversation (messages, sharegpt): see `turns.encode`.

    A text is cut into pieces of `max_length`, each of which begins with the last token of the one
    before: every token but a text's first carries the loss once.

    What is longer is left out and counted, or, with `too_long=cut_prompt`, loses the left of what
    comes before its first span, but for a BOS.

    Args:
        stops: ids at which the base ends a generation; see `turns.encode`.
    Raises:
        ConfigErrors: no EOS, no chat template, a template whose full conversation does not begin
            with the prompt or whose turns cannot be told apart, a prompt of no tokens, no example
            that fits.
    """
    if cfg.add_eos and tokenizer.eos_token_id is None:
        raise ConfigErrors(
            "data.add_eos: must be false with a tokenizer that has no EOS token; "
            f"got true and '{tokenizer.name_or_path}'; set data.add_eos=false"
        )
    if len(examples) > PARALLEL:
        kept = _in_parallel(examples, tokenizer, cfg, stops)
    else:
        kept = _some(range(len(examples)), examples, tokenizer, cfg, stops)
    return kept.tokens(len(examples))


def tokenise_once(
    examples: Sequence[Example],
    tokenizer: Any,
    cfg: DataConfig,
    content: str,
    tokenizer_hash: str,
    stops: Collection[int] = (),
    labels: list[str] | None = None,
) -> Tokens:
    """Return the tokens of a split; those of a large one are kept on disk for the next time.

    Args:
        content: the content hash of the split.
        tokenizer_hash: what names the tokenizer: the hash of its files, or a Hub base's commit.
        labels: of a classification.
    Raises:
        ConfigErrors: as `tokenise` and `classify`.
    """

    def make() -> Tokens:
        if labels:
            return classify(examples, tokenizer, cfg, labels)
        return tokenise(examples, tokenizer, cfg, stops)

    if len(examples) < token_cache.SMALLEST:
        return make()
    assert tokenizer_hash, "tokens of different tokenizers would have one key"
    key = token_cache.key_of(cfg, content, tokenizer_hash, stops, labels or [])
    found = token_cache.load(key)
    if found is None:
        found = make()
        token_cache.save(key, found)
    return found


def _some(
    places: range,
    examples: Sequence[Example],
    tokenizer: Any,
    cfg: DataConfig,
    stops: Collection[int],
) -> Kept:
    """Return the tokens of some examples.

    Args:
        places: of these examples among all.
    """
    kept = Kept(cfg, tokenizer.bos_token_id)
    for index, encoded in _encoded(examples, tokenizer, cfg, stops):
        kept.add(places[index], examples[index], encoded)
    return kept


def _in_parallel(
    examples: Sequence[Example], tokenizer: Any, cfg: DataConfig, stops: Collection[int]
) -> Kept:
    """Return the tokens of many examples, from several processes that are started anew.

    A fork of this process would inherit torch's threads, and locks that they hold.
    """
    workers = max(
        1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
    )
    kept = Kept(cfg, tokenizer.bos_token_id)
    parts = [
        range(start, min(start + PART, len(examples))) for start in range(0, len(examples), PART)
    ]
    waiting: deque[Future[Kept]] = deque()
    with ProcessPoolExecutor(
        workers, get_context("spawn"), _start, (tokenizer, cfg, tuple(stops))
    ) as pool:
        try:
            for part in parts:
                # What waits is held in memory: as many parts as there are processes, and one more.
                if len(waiting) > workers:
                    kept.take(waiting.popleft().result())
                waiting.append(pool.submit(_work, part, list(examples[part.start : part.stop])))
            while waiting:
                kept.take(waiting.popleft().result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return kept


# --- in a process of its own ------------------------------------------------------------------

_GIVEN: list[Any] = []  # tokenizer, config and stops of this process


def _start(*given: Any) -> None:
    for number in interrupt.HEARD:  # the parent decides
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other processes are the other cores
    _GIVEN[:] = given


def _work(places: range, examples: list[Example]) -> Kept:
    kept = _some(places, examples, *_GIVEN)
    kept.pack()
    return kept


# --- by format -------------------------------------------------------------------------------


def _encoded(
    examples: Sequence[Example], tokenizer: Any, cfg: DataConfig, stops: Collection[int]
) -> Iterator[tuple[int, Encoded]]:
    """Yield each example's place and its tokens; a text's pieces one after the other."""
    if cfg.mixture:
        yield from _of_sources(examples, tokenizer, cfg, stops)
    elif cfg.format == "text":
        yield from _pieces(examples, tokenizer, cfg)
    elif cfg.format != "prompt_completion":
        yield from turns.encode(examples, tokenizer, cfg, stops)
    else:
        pairs = (
            chat(examples, tokenizer, cfg, encode_plain)
            if cfg.chat_template
            else _plain(examples, tokenizer, cfg)
        )
        for index, (prompt, completion, left) in enumerate(pairs):
            if not prompt:
                raise ConfigErrors(
                    "data.prompt: must give at least one token, to predict the completion from; "
                    f"got none for {examples[index].prompt!r}; give a prompt, or data.add_bos=true "
                    "with a tokenizer that adds BOS"
                )
            ids = [*prompt, *completion]
            yield index, Encoded(ids, [len(prompt), len(ids)] if completion else [], left)


def _of_sources(
    examples: Sequence[Example], tokenizer: Any, cfg: DataConfig, stops: Collection[int]
) -> Iterator[tuple[int, Encoded]]:
    """Yield the tokens of examples of a mixture, each by the rules of its source.

    A set with a path of its own is in no source: it follows `data`.
    """
    places: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        places.setdefault(example.source, []).append(index)
    views = parts.by_source(cfg) | {"": dataclasses.replace(cfg, mixture=[])}
    streams = [
        _placed(mine, _encoded(some(examples, mine), tokenizer, views[name], stops))
        for name, mine in places.items()
    ]
    yield from heapq.merge(*streams, key=itemgetter(0))


def _placed(
    places: Sequence[int], encoded: Iterator[tuple[int, Encoded]]
) -> Iterator[tuple[int, Encoded]]:
    """Yield tokens with the places that their examples have among all."""
    for index, one in encoded:
        yield places[index], one


def _pieces(
    examples: Sequence[Example], tokenizer: Any, cfg: DataConfig
) -> Iterator[tuple[int, Encoded]]:
    """Yield the pieces of each text; of one without a second token, an empty one."""
    opening = [tokenizer.bos_token_id] if cfg.add_bos and opens_with_bos(tokenizer) else []
    closing = [tokenizer.eos_token_id] if cfg.add_eos else []
    texts = encode_plain(tokenizer, [example.completion for example in examples])
    for index, text in enumerate(texts):
        ids = [*([] if text[:1] == opening else opening), *text, *closing]
        if not text or len(ids) < 2:
            yield index, Encoded([], [])
            continue
        step = cfg.max_length - 1
        for number, start in enumerate(range(0, len(ids) - 1, step)):
            piece = ids[start : start + cfg.max_length]
            yield index, Encoded(piece, [1, len(piece)], piece=f".{number}" if number else "")


def _plain(
    examples: Sequence[Example], tokenizer: Any, cfg: DataConfig
) -> list[tuple[list[int], list[int], str | None]]:
    """Return ids of prompt and completion; nothing of a completion's text can be lost here."""
    prompts = encode_plain(tokenizer, [example.prompt for example in examples])
    completions = encode_plain(tokenizer, [example.completion for example in examples])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if cfg.add_bos and opens_with_bos(tokenizer):
        prompts = [ids if ids[:1] == [bos] else [bos, *ids] for ids in prompts]
    if cfg.add_eos:
        completions = [[*ids, eos] if ids else ids for ids in completions]
    return [(*pair, None) for pair in zip(prompts, completions, strict=True)]


def opens_with_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer itself opens a text with BOS.

    Having a bos_token is no sign of it: GPT-2's, Pythia's and SmolLM's have one and add none, so
    their models have not seen a text that begins with it.
    """
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def encode_plain(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids without special tokens; without the tokenizer's warning of long texts, we count them."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]
