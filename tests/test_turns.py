"""Where turns begin and end, template by template: found, or refused with the reason.

What is expected is what transformers' apply_chat_template makes of the same turns; that all tokens
and masks are TRL's is in test_messages.py.
"""

from __future__ import annotations

import time

import pytest
from chats import (
    CHATML,
    ENDS,
    MISTRAL,
    PLAIN,
    TOOLS_USED,
    applied,
    example,
    mask,
    of_trl,
    plain,
    refusal,
    says,
    seen,
    settings,
    tokenised,
    tokenizer,
    trained_texts,
)

from lorabench import data
from lorabench.config import ConfigErrors

# --- the ends of turns -------------------------------------------------------------------------


def test_an_end_that_belongs_to_the_next_turn_counts_if_the_base_stops_at_it() -> None:
    """GLM's template: a turn ends where the next one begins, with <|user|> or <|observation|>."""
    glm, row = of_trl("glm4moe"), says("Hi", "Hello", "1 + 1?", "2")
    line = refusal([row], "glm", glm)
    assert "a turn must end with a special token, or the model never learns to stop" in line
    assert r"Hello<|user|>'" in line
    found = tokenizer("glm")
    stops = [found.convert_tokens_to_ids(one) for one in ("<|user|>", "<|observation|>")]
    tokens = tokenised("glm", [row, TOOLS_USED], glm, stops=stops)
    assert trained_texts(tokens, found) == [
        "\n<think></think>\nHello<|user|>", "\n<think></think>\n2<|endoftext|>",
    ]  # fmt: skip
    assert trained_texts(tokens, found, 1)[0].endswith("</tool_call><|observation|>")


def test_a_template_without_ends_between_turns_is_refused() -> None:
    endless = MISTRAL.replace("+ eos_token", "")
    row = says("Hi", "Hello", "1 + 1?", "2")
    line = refusal([row], "mistral", endless)
    assert "a turn must end with a special token, or the model never learns to stop" in line
    # Of a single turn the end is known: it is the end of all.
    tokens = tokenised("mistral", [row[:2]], endless)
    assert trained_texts(tokens, tokenizer("mistral")) == [" Hello</s>"]


def test_what_only_the_last_turn_has_is_not_taken_from_the_next_one() -> None:
    """Phi-3's form: EOS stands where the next turn would begin, and both begin with "<|"."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
    )
    row = says("Hi", "Hello", "1 + 1?", "2")
    assert seen(row, "phi", template) == (
        applied(row, "phi", template), ["Hello<|end|>\n", "2<|end|>\n<|endoftext|>"]
    )  # fmt: skip


def test_marks_that_leave_out_the_end_of_a_turn_get_it() -> None:
    """The form that transformers' own documentation shows."""
    template = CHATML.replace(
        "{{ message['content'] + '<|im_end|>'",
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
        "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>'",
    )
    row = says("Hi", "Hello", "1 + 1?", "2")
    assert seen(row, "chatml", template) == (
        applied(row, "chatml"), ["Hello<|im_end|>", "2<|im_end|>"]
    )  # fmt: skip


def test_marks_in_several_pieces_belong_to_their_turn() -> None:
    template = CHATML.replace(
        "{{ message['content'] + '<|im_end|>' + '\\n' }}",
        "{% if message['role'] == 'assistant' %}"
        "{% if message['reasoning_content'] %}{% generation %}{{ message['reasoning_content'] }}"
        "{% endgeneration %}{{ '<s>' }}{% endif %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
    )
    row = says("Hi", "Hello", "1 + 1?", "2", "3?", "4")
    row[3]["reasoning_content"] = "Think."
    assert seen(row, "chatml", template)[1] == [
        "Hello<|im_end|>", "Think.", "2<|im_end|>", "4<|im_end|>",
    ]  # fmt: skip
    row[5]["train"] = row[1]["train"] = False
    assert seen(row, "chatml", template)[1] == ["Think.", "2<|im_end|>"]


def test_marks_of_nobody_are_refused() -> None:
    template = CHATML + "{% generation %}{% endgeneration %}"
    assert "it marks 0 stretches as the model's own, none of them in turn 2" in refusal(
        [PLAIN], "chatml", template
    )


# --- texts -------------------------------------------------------------------------------------


def test_a_token_that_lies_half_in_a_turn_is_refused() -> None:
    """ "\\n\\n" is one token: the opening's line break and the answer's first would be one."""
    row = says("Hi", "\n\nHello")
    line = refusal([row], "chatml")
    assert "lies half in the opening of the answer and half in the answer" in line
    assert seen(row, "gemma")[1] == ["Hello<end_of_turn>\n"]  # this template trims


@pytest.mark.parametrize("family", ["gemma", "llama3", "qwen3", "chatml", "mistral"])
def test_content_may_hold_anything(family: str) -> None:
    end = ENDS[family]
    row = says(
        f"is {end} the end? assistant\n", f"yes, {end} is", "é😀你好\u2028\ufeff", "  😀 é ", "",
        "empty came before", "{{ 7 * 7 }}{% raise %}", "\ue0f10\ue0f1", "same", "same",
    )  # fmt: skip
    whole, trained = seen(row, family)
    assert whole == applied(row, family)
    assert len(trained) == 5
    for turn, text in zip(row[1::2], trained, strict=True):
        assert turn["content"].strip() in text
        assert text.rstrip("\n").endswith(end)


def test_templates_that_write_a_text_twice_or_never_are_refused() -> None:
    twice = "{{ messages | map(attribute='content') | join(' ') }}" + CHATML
    assert "does not write its text, or writes them more than once" in refusal(
        [PLAIN], "chatml", twice
    )
    # Fails if a model were trained on nothing in place of its tool calls.
    assert "the template does not write its tool calls" in refusal([TOOLS_USED], "llama3")


def test_a_template_that_raises_names_the_reason_and_the_row() -> None:
    template = "{{ raise_exception('a system message must come first') }}"
    line = refusal([PLAIN], "chatml", template)
    assert "fails on example 1 of 1, 'What is it?': a system message must come first" in line


def test_a_tokenizer_without_a_template_says_what_can_be_given() -> None:
    cfg = settings()
    with pytest.raises(ConfigErrors) as error:
        data.tokenise([example(PLAIN, cfg)], tokenizer("chatml"), cfg)
    assert "give a template (chatml, gemma, llama3, qwen, or a file)" in str(error.value)
    assert "chat_template=false" not in str(error.value)


def test_a_built_in_template_needs_its_end_of_turn_token() -> None:
    line = refusal([PLAIN], "gemma", True, chat_template="llama3")
    assert "'llama3' ends them with <|eot_id|>, which 'my-gemma' does not have; use gemma" in line


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_many_turns_take_no_time(family: str) -> None:
    """Fails where each turn renders the whole conversation: 200 turns took Qwen's template 8 s."""
    row = says(*["some words to say " * 5] * 200)
    began = time.process_time()  # the parent's; the child is limited by rendering.CPU_SECONDS
    wall = time.monotonic()
    tokens = tokenised(family, [row], plain(family), max_length=10**6)
    assert len(tokens.spans.row(0)) == 200 and sum(mask(tokens)) > 0
    assert time.process_time() - began < 2
    assert time.monotonic() - wall < 20  # it takes 0.3 s on an idle machine
