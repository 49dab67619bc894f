"""Generations and answers: against argmax by hand, and lm-evaluation-harness' published rules."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import composed
from transformers import GenerationConfig

from lorabench import data, plan
from lorabench import model as base_model
from lorabench.config import Config, DataConfig, range_errors
from lorabench.evaluate import answers, eos_token_ids, extract, generation_settings, score
from lorabench.pack import ModulePack, StackedPack


def greedy(model: Any, prompt: list[int], steps: int, ends: set[int]) -> list[int]:
    """The likeliest next token, again and again: no generate() and none of its settings."""
    written: list[int] = []
    while len(written) < steps and not ends.intersection(written):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + written]), use_cache=False).logits
        written.append(int(logits[0, -1].argmax()))
    return written


ASKED = [
    "tracker=none",
    "data.num_train=64",
    "data.num_validation=8",
    "data.num_test=40",
    "trainer.eval_batch_size=16",
    "data.skills=[sort,double]",  # known to the base, with some mistakes
    "data.metric=[answer,answer_flexible]",
    "data.answer_pattern='[a-z]+'",
    "data.answer_examples=20",
    "data.answer_max_new_tokens=12",
]
# What a generation_config.json may hold. generate() takes most of it unless it is hidden from it.
HOSTILE = {
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "min_length": 30,
    "min_new_tokens": 12,
    "suppress_tokens": [*range(40, 90)],
    "begin_suppress_tokens": [*range(60, 90)],
    "forced_eos_token_id": 5,
    "bad_words_ids": [[n] for n in range(60, 90)],
    "do_sample": True,
    "temperature": 9.0,
    "num_beams": 3,
    "max_length": 9,
    "max_time": 0.0001,
}


@pytest.fixture(scope="module")
def planner() -> plan.Planner:
    """Plans the one config of the test below once."""
    return plan.Planner()


@pytest.fixture(scope="module")
def asked() -> tuple[Config, Any, data.Tokens, list[str]]:
    """Config, tokenizer and four questions, with what the base itself answers, greedily."""
    config = composed(*ASKED, "data.answer_examples=4")
    tokenizer = base_model.tokenizer(config.model)
    tokens = data.tokenise(data.load(config.data).test, tokenizer, config.data).first(4)
    plain, texts = base_model.load(config.model, "cpu"), []
    for ids, start in zip(tokens.input_ids, tokens.completion_start, strict=True):
        written = greedy(plain, ids[:start], 12, {tokenizer.eos_token_id})
        texts.append(tokenizer.decode(written, skip_special_tokens=True))
    return config, tokenizer, tokens, texts


@pytest.mark.parametrize(
    ("setting", "stacked"),
    [
        pytest.param(one, stacked, marks=[] if n % 5 == 0 else [pytest.mark.slow])
        for n, (one, stacked) in enumerate(itertools.product(HOSTILE, (False, True)))
    ],
)
def test_generation_is_greedy_whatever_the_base_says(
    setting: str,
    stacked: bool,
    planner: plan.Planner,
    asked: tuple[Config, Any, data.Tokens, list[str]],
) -> None:
    """A published repetition_penalty of 1.1 moves the answers of a base by percents."""
    config, tokenizer, tokens, texts = asked
    base = base_model.load(config.model, "cpu")
    base.generation_config.update(**{setting: HOSTILE[setting]})
    modules = planner.make(config).lora_modules
    pack: Any = ModulePack(base, config, modules, "cpu")
    if stacked:
        skeleton = planner.skeleton(config.model)
        pack = StackedPack(base, skeleton, [config, config], [modules, modules], "cpu")
    ends = eos_token_ids(base.generation_config, tokenizer)
    tables = answers(pack, tokens, tokenizer, data.pad_id(tokenizer), config.data, ends)
    assert len(texts) == 4
    for table in tables:
        assert table["generated"].to_pylist() == texts
    assert getattr(pack.tree.generation_config, setting) == HOSTILE[setting]  # as it was


def test_generation_ends_at_the_bases_own_ends_too() -> None:
    """Chat models end a turn with another token than the tokenizer's EOS."""
    config = composed(*ASKED, "data.answer_examples=4")
    tokenizer = base_model.tokenizer(config.model)
    tokens = data.tokenise(data.load(config.data).test, tokenizer, config.data).first(4)
    base = base_model.load(config.model, "cpu")
    pack = ModulePack(base, config, plan.make(config).lora_modules, "cpu")
    starts = [
        ids[:start] for ids, start in zip(tokens.input_ids, tokens.completion_start, strict=True)
    ]
    end = greedy(base, starts[0], 3, set())[2]  # met in the third place of the first answer
    ends = eos_token_ids(GenerationConfig(eos_token_id=[end, 5]), tokenizer)
    assert ends == sorted({end, 5, tokenizer.eos_token_id})
    (table,) = answers(pack, tokens, tokenizer, data.pad_id(tokenizer), config.data, ends)
    expected = [
        tokenizer.decode(greedy(base, start, 12, set(ends)), skip_special_tokens=True)
        for start in starts
    ]
    assert table["generated"].to_pylist() == expected and len(expected[0]) <= 3


@pytest.mark.parametrize(
    ("theirs", "own", "expected"),
    [(None, 1, [1]), (7, 1, [1, 7]), ([9, 1, 7], 1, [1, 7, 9]), (None, None, []), (3, None, [3])],
)
def test_ends(theirs: Any, own: int | None, expected: list[int]) -> None:
    tokenizer = SimpleNamespace(eos_token_id=own)
    assert eos_token_ids(GenerationConfig(eos_token_id=theirs), tokenizer) == expected
    assert eos_token_ids(None, tokenizer) == ([] if own is None else [own])


def test_what_is_recorded_of_a_generation() -> None:
    settings = composed(*ASKED).data
    assert generation_settings(settings, [1, 5]) == {
        "do_sample": False, "num_beams": 1, "max_new_tokens": 12, "eos_token_id": [1, 5],
    }  # fmt: skip


def test_answers_match_generation_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed(*ASKED)
    tokenizer = base_model.tokenizer(config.model)
    base = base_model.load(config.model, "cpu")
    pack = ModulePack(base, config, plan.make(config).lora_modules, "cpu")
    tokens = data.tokenise(data.load(config.data).test, tokenizer, config.data)
    pad_id, ends = data.pad_id(tokenizer), [tokenizer.eos_token_id]
    (table,) = answers(pack, tokens, tokenizer, pad_id, config.data, ends)
    assert len(table) == len(tokens) == 40
    assert table.column_names == ["generated", "answer", "answer_flexible"]
    assert table["answer"].null_count == table["generated"].null_count == 20
    asked = table.slice(0, 20).to_pandas()
    for i, row in asked.iterrows():
        start = tokens.completion_start[i]
        written = greedy(pack.tree, tokens.input_ids[i][:start], 12, set(ends))
        text = tokenizer.decode(written, skip_special_tokens=True)
        assert row.generated == text  # padding on the left and the mask change nothing
        wanted = tokenizer.decode(tokens.input_ids[i][start:], skip_special_tokens=True)
        assert row.answer == int(text == wanted)
    assert 0 < asked.answer.mean() <= 1
    sizes: list[int] = []
    generate = pack.generate

    def counted(ids: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        sizes.append(len(ids))
        return generate(ids, *rest, **more)

    monkeypatch.setattr(pack, "generate", counted)
    (small,) = answers(pack, tokens, tokenizer, pad_id, config.data, ends, batch_size=6)
    assert sizes == [6, 6, 6, 2] and small.equals(table)


# What an answer is

GSM8K = "She has 16 - 7 = <<16-7=9>>9 eggs, so 9 * 2 = $18.\n#### 18"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234.", "1234"),
        ("The answer is: 42", "42"),
        ("no answer", None),
        # The first: a model that runs on writes a next question with an answer of its own.
        ("#### 1\n\nQuestion: and then?\nAnswer: #### $2,000", "1"),
        ("so 70.\n#### 72\nThe answer is: 72", "72"),
    ],
)
def test_answers_are_extracted_and_cleaned(text: str, answer: str | None) -> None:
    pattern = composed("data=metamathqa").data.answer_pattern
    assert pattern is not None
    assert extract(pattern, text) == answer


def harness_flexible(text: str) -> str:
    """lm-evaluation-harness 0.4's flexible-extract of gsm8k and its exact_match, as published.

    RegexFilter(regex_pattern, group_select=-1, fallback="[invalid]"), take_first, and then
    regexes_to_ignore: [",", "\\$", "(?s).*#### ", "\\.$"] with ignore_case.
    """
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    chosen = next(group for group in found[-1] if group).strip() if found else "[invalid]"
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        chosen = re.sub(ignored, "", chosen)
    return chosen


@pytest.mark.parametrize(
    "text",
    [
        "so the total is 18.",
        "16 eggs, 9 left: 9 * 2 = $18",
        "it costs $1,234.50",
        "she loses, so -7",
        "the answer is 5 dollars.",
        GSM8K,
        "no number at all",
        "3.",
        "18, or 20?",
        "about 1,000,000",
    ],
)
@pytest.mark.parametrize("reference", ["18", "1234.50", "-7", "5", "3", "20", "1000000"])
def test_flexible_is_the_harness(text: str, reference: str) -> None:
    settings = DataConfig(answer_pattern=r"#### (\S+)")
    target = f"because.\n#### {reference}"
    expected = int(harness_flexible(text) == re.sub(r"(?s).*#### ", "", target))
    assert score("answer_flexible", text, target, settings) == expected


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("18.00", "18"),
        ("1,000", "1000"),
        ("$5", "5"),
        ("007", "7"),
        ("-0.50", "-.5"),
        ("18.", "18"),
    ],
)
@pytest.mark.parametrize("metric", ["answer", "answer_flexible"])
def test_numbers_compare_as_numbers(metric: str, text: str, reference: str) -> None:
    """Our one deviation from the harness, to which 18.00 is not 18."""
    settings = DataConfig(answer_pattern=r"#### (\S+)")
    assert score(metric, f"#### {text}", f"#### {reference}", settings) == 1
    assert score(metric, f"#### {text}1", f"#### {reference}", settings) == 0


@pytest.mark.parametrize(
    ("metric", "text", "expected"),
    [
        ("answer", "#### 18\n\nQuestion: next?\nAnswer: #### 3", 1),
        ("answer", "Question: next?\n#### 18", 0),  # nothing is left
        ("answer_flexible", "it is 18\n\nQuestion: how many of 3?", 1),
        ("answer_flexible", "it is 3</s> 18", 0),
    ],
)
def test_a_generation_ends_at_the_first_stop(metric: str, text: str, expected: int) -> None:
    stops = ["</s>", "Question:"]
    settings = DataConfig(answer_pattern=r"#### (\S+)", answer_stop=stops)
    assert score(metric, text, GSM8K, settings) == expected


def test_flexible_needs_no_pattern() -> None:
    assert score("answer_flexible", "so 18.", GSM8K, DataConfig()) == 1
    assert score("answer_flexible", "so 18.", "no number", DataConfig()) == 0
    assert score("answer_flexible", "nothing", "no number", DataConfig()) == 0
    errors = range_errors(composed("data.metric=[answer_flexible]"))
    assert errors == []
