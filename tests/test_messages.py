"""Conversations as tokens and loss masks: the references are TRL's preprocessing and transformers.

Ours reads the plain template, which says nothing of who writes what; theirs the same template with
generation marks. Token ids and masks must be equal, all of them.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from chats import (
    ENDS,
    FAMILIES,
    marked,
    mask,
    plain,
    says,
    tokenised,
    tokenizer,
    trained_texts,
)

from lorabench.data import chat

CONVERSATIONS = [
    says("What is the capital of France?", "Paris."),
    says("Hi", "Hello there", "1 + 1?", "2", "Sure?", "Yes, it is 2."),
    says("  spaces  around  ", "café 你好 😀\n\nnew paragraph", "x", "y"),
    says("same", "same", "same", "same", "same", "same"),
    says("user", "assistant", "model", "user\n"),
    says("1", "2", "3", "4", "5"),  # a user turn last
]
WITH_SYSTEM = [[{"role": "system", "content": "Be brief."}, *one] for one in CONVERSATIONS]


def conversations(family: str) -> list[Any]:
    return CONVERSATIONS + (WITH_SYSTEM if family not in ("gemma", "mistral") else [])


PIECES = [
    "a", "assistant", "user\n", " ", "\n\n", "<|im_end|>", "<|im_start|>", "[/INST]", "</s>", "😀",
    "<end_of_turn>", "model", "<think>", "</think>", "4", "{{ x }}",
]  # fmt: skip


def drawn(family: str) -> list[Any]:
    """Conversations whose turns say things that look like the template's own."""
    draw, found = random.Random(family), []
    for _ in range(40):
        texts = ["x" + "".join(draw.choices(PIECES, k=draw.randrange(8))) for _ in range(8)]
        turns = says(*texts[: draw.choice([2, 3, 4, 7, 8])])
        if family == "chatml":  # neighbours of one role
            turns += [{"role": one["role"], "content": one["content"]} for one in turns[::-1]]
        found.append(turns)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_that_imitate_the_template_change_nothing(family: str) -> None:
    """Fails where a turn's begin or end is looked for in what another turn says."""
    rows = drawn(family)
    assert ours(family, rows, plain(family)) == by_transformers(family, marked(family), rows)


def by_transformers(family: str, template: str, rows: list[Any]) -> list[tuple[list[int], ...]]:
    made = [
        tokenizer(family).apply_chat_template(
            row, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        for row in rows
    ]
    return [(one["input_ids"], one["assistant_masks"]) for one in made]


def ours(family: str, rows: list[Any], template: Any, **keys: Any) -> list[tuple[list[int], ...]]:
    tokens = tokenised(family, rows, template, add_eos=False, **keys)
    assert list(tokens.indices) == list(range(len(rows)))
    return [(list(tokens.input_ids.row(i)), mask(tokens, i)) for i in range(len(rows))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_template_gives_the_ids_and_masks_of_a_marked_one(family: str) -> None:
    rows = conversations(family)
    expected = by_transformers(family, marked(family), rows)
    assert ours(family, rows, plain(family)) == expected
    assert ours(family, rows, marked(family)) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's, of names that transformers gave up
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_labels_are_those_that_trl_trains_on(
    family: str, tmp_path: Path, tiny_folder: Any
) -> None:
    """SFTTrainer's own preprocessing. Slow: TRL takes seconds to import."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM

    rows = conversations(family)
    args = trl.SFTConfig(
        output_dir=str(tmp_path), assistant_only_loss=True, report_to="none", use_cpu=True,
        max_length=None, bf16=False,
    )  # fmt: skip
    made = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_folder("llama")),
        args=args,
        train_dataset=datasets.Dataset.from_dict({"messages": rows}),
        processing_class=tokenizer(family, marked(family)),
    ).train_dataset
    found = ours(family, rows, plain(family))
    assert len(made) == len(found)
    for theirs, (ids, loss) in zip(made, found, strict=True):
        assert theirs["input_ids"] == ids
        assert theirs["labels"] == [i if m else -100 for i, m in zip(ids, loss, strict=True)]


@pytest.mark.parametrize("name", list(chat.BUILT_IN))
def test_a_built_in_template_marks_as_transformers_reads_it(name: str) -> None:
    rows = conversations(name)
    expected = by_transformers(name, chat.given_text(name), rows)
    assert ours(name, rows, True, chat_template=name) == expected
    bare = (
        chat.given_text(name).replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    )
    assert "generation %}" not in bare
    assert ours(name, rows, bare) == expected


@pytest.mark.parametrize("name", [*FAMILIES, "qwen"])
def test_every_trained_turn_ends_with_its_end_of_turn_token(name: str) -> None:
    """Fails where a model would be trained to go on after its answer."""
    rows = conversations(name)
    choice = {"chat_template": "qwen"} if name == "qwen" else {}
    tokens = tokenised(name, rows, True if choice else plain(name), **choice)
    for i, row in enumerate(rows):
        texts = trained_texts(tokens, tokenizer(name), i)
        assert len(texts) == sum(turn["role"] == "assistant" for turn in row)
        for text in texts:
            assert text.endswith(ENDS[name]) and text.count(ENDS[name]) == 1
        assert list(tokens.input_ids.row(i))[-1] == tokenizer(name).convert_tokens_to_ids(
            ENDS[name]
        )
