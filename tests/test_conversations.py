"""The shapes in which chat data lies about in public, each as the model sees it or as refused.

What is expected is what transformers' apply_chat_template makes of the same turns in plain form;
that all tokens and masks are TRL's is in test_messages.py.
"""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest
from chats import (
    CHATML,
    ENDS,
    MISTRAL,
    example,
    mask,
    of_trl,
    plain,
    says,
    settings,
    tokenised,
    tokenizer,
    trained_texts,
)

from lorabench import data
from lorabench.config import ConfigErrors
from lorabench.data import conversations

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Look the weather up",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Orléans"}}}
TOOLS_USED = [
    {"role": "user", "content": "Weather in Orléans?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "18 degrees", "name": "weather"},
    {"role": "assistant", "content": "18 degrees."},
]


def seen(
    row: Any, family: str = "qwen3", template: str | None = None, **keys: Any
) -> tuple[str, list[str]]:
    """The whole text as the model sees it, and the trained stretches of it."""
    tokens = tokenised(family, [row], template or plain(family), **({"add_eos": False} | keys))
    return (
        tokenizer(family).decode(list(tokens.input_ids.row(0))),
        trained_texts(tokens, tokenizer(family)),
    )


def applied(
    turns: list[Any], family: str = "qwen3", template: str | None = None, **more: Any
) -> str:
    """The same by transformers."""
    return tokenizer(family).apply_chat_template(
        turns, chat_template=template or plain(family), tokenize=False, **more
    )


def refusal(rows: list[Any], family: str = "qwen3", template: Any = None, **keys: Any) -> str:
    with pytest.raises(ConfigErrors) as error:
        tokenised(family, rows, plain(family) if template is None else template, **keys)
    (line,) = error.value.errors
    assert "\n" not in line
    return line


# --- rows --------------------------------------------------------------------------------------

PLAIN = says("What is it?", "It is 4.")
SAME_AS_PLAIN = {
    "text parts": [
        {"role": "user", "content": [{"type": "text", "text": "What "}, {"text": "is it?"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "It is 4."}]},
    ],
    "keys of other turns, as tables fill them": [
        {"role": "user", "content": "What is it?", "tool_calls": None, "name": None},
        {"role": "assistant", "content": "It is 4.", "tool_calls": [], "train": None},
    ],
    "JSON text in a cell": json.dumps(PLAIN),
    "other names of the roles": [
        {"role": "user", "content": "What is it?"},
        {"role": "model", "content": "It is 4."},
    ],
}


@pytest.mark.parametrize("name", SAME_AS_PLAIN)
def test_a_row_is_read_as_its_plain_form(name: str) -> None:
    assert seen({"messages": SAME_AS_PLAIN[name]}) == seen(PLAIN)
    assert seen(PLAIN)[0] == applied(PLAIN)


def call(arguments: Any, **turn: Any) -> list[Any]:
    function = {"name": "weather", "arguments": arguments}
    changed = {**TOOLS_USED[1], "tool_calls": [{"type": "function", "function": function}], **turn}
    return [TOOLS_USED[0], changed, *TOOLS_USED[2:]]


CALLS = {
    "content null": call({"city": "Orléans"}, content=None),
    "arguments as JSON text": call('{"city": "Orléans"}', content=None),
    "calls as JSON text": [
        TOOLS_USED[0], {"role": "assistant", "tool_calls": json.dumps([CALL])}, *TOOLS_USED[2:],
    ],
    "keys of other calls, as tables fill them": call({"city": "Orléans", "country": None}),
    "OpenAI's older form": [
        TOOLS_USED[0], {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "name": "weather", "content": "18 degrees"}, TOOLS_USED[3],
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_tool_calls_are_read_as_their_plain_form(name: str) -> None:
    whole, trained = seen({"messages": CALLS[name], "tools": [WEATHER]})
    assert whole == applied(TOOLS_USED, tools=[WEATHER])
    answer = '<tool_call>\n{"name": "weather", "arguments": {"city": "Orléans"}}\n</tool_call>'
    # The template writes the thought of what comes after the last user turn, empty as it is.
    assert trained == [
        f"{answer}<|im_end|>\n", "<think>\n\n</think>\n\n18 degrees.<|im_end|>\n",
    ]  # fmt: skip


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER]), [json.dumps(WEATHER)]])
def test_tools_come_as_a_list_or_as_json(tools: Any) -> None:
    whole, _ = seen({"messages": TOOLS_USED, "functions": tools}, tools="functions")
    assert whole == applied(TOOLS_USED, tools=[WEATHER])
    assert seen({"messages": TOOLS_USED, "functions": tools}, tools=None)[0] == applied(TOOLS_USED)


def test_sharegpt() -> None:
    row = {
        "system": "Be brief.",
        "tools": json.dumps([WEATHER]),
        "conversations": [
            {"from": "human", "value": "Weather in Orléans?"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "18 degrees"},
            {"from": "gpt", "value": "18 degrees.", "weight": None},
        ],
    }
    system = {"role": "system", "content": "Be brief."}
    whole, trained = seen(row, format="sharegpt")
    assert whole == applied([system, *TOOLS_USED], tools=[WEATHER])
    assert len(trained) == 2 and trained[0].startswith('<tool_call>\n{"name": "weather"')
    row["conversations"] = [
        {"from": "system", "value": "Be brief."}, *row["conversations"][:2],
        {"from": "tool", "value": "18 degrees"}, row["conversations"][3],
    ]  # fmt: skip
    assert seen(row, format="sharegpt")[0] == whole  # the turn stands before the column


def test_a_template_that_wants_arguments_as_text_gets_text() -> None:
    """DeepSeek's: it joins the arguments to a text, which fails with an object."""
    template = of_trl("deepseekv3")
    text = json.dumps(CALL["function"]["arguments"])
    row = copy.deepcopy(TOOLS_USED)
    row[1]["tool_calls"][0]["function"]["arguments"] = text
    whole, trained = seen(call(text), "deepseek", template)
    assert whole == applied(row, "deepseek", template)
    assert f"```json\n{text}\n```" in trained[0] and trained[0].endswith(ENDS["deepseek"])


BAD_ROWS = {
    "a list of turns, not 'hi'": {"messages": json.dumps("hi")},
    "a list of turns, not []": {"messages": []},
    "column 'messages' is text that is not JSON": {"messages": "hi"},
    "no column 'messages'; there are text": {"text": "hi"},
    "turn 1 has the role 'narrator', not system, user, assistant, tool": [
        {"role": "narrator", "content": "x"}
    ],
    "set data.format=sharegpt": [{"from": "human", "value": "x"}],
    "turn 2 has neither content nor tool_calls; its keys: role": [
        *says("x"), {"role": "assistant"}
    ],
    "turn 1 holds a part of type 'image', not text": [
        {"role": "user", "content": [{"type": "image", "image": "x.png"}]}
    ],
    "turn 1 must hold text, not": [{"role": "user", "content": "\ud800"}],
    "turn 1 has tool_calls, which only an assistant makes; its role: user": [
        {"role": "user", "tool_calls": [CALL]}
    ],
    "turn 2 arguments of weather is text that is not JSON": call('{"city": '),
    "turn 2 arguments of weather must be a JSON object, not [1]": call("[1]"),
    "turn 2 has a tool call without a name": [
        *says("x"), {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}
    ],
    "turn 2 has train='no', not true or false": [
        *says("x"), {"role": "assistant", "content": "y", "train": "no"}
    ],
    "turn 2 has train=0.5, not true or false": [
        *says("x"), {"role": "assistant", "content": "y", "weight": 0.5}
    ],
    "the tools must be a list of JSON schemas, not 5": {"messages": PLAIN, "tools": "5"},
    "a tool is text that is not JSON": {"messages": PLAIN, "tools": ["weather"]},
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_row_that_is_no_conversation_says_why(reason: str) -> None:
    row = BAD_ROWS[reason]
    row = {"messages": row} if isinstance(row, list) else row
    with pytest.raises(ValueError) as error:
        conversations.conversation(row, settings())
    assert reason in str(error.value)


def test_the_other_format_is_named() -> None:
    row = {"conversations": PLAIN}
    with pytest.raises(ValueError, match=r"OpenAI's form: set data\.format=messages$"):
        conversations.conversation(row, settings(format="sharegpt"))
    row = {"conversations": [{"from": "narrator", "value": "x"}]}
    with pytest.raises(ValueError, match="turn 1 is from 'narrator', not one of system, human"):
        conversations.conversation(row, settings(format="sharegpt"))


# --- which turns carry a loss ------------------------------------------------------------------


@pytest.mark.parametrize("key", [{"train": False}, {"weight": 0}])
def test_a_turn_can_be_left_out_of_the_loss(key: dict[str, Any]) -> None:
    row = says("1", "one", "2", "two")
    row[1] |= key
    whole, trained = seen(row, "chatml")
    assert whole == applied(row, "chatml") and trained == ["two<|im_end|>\n"]


def test_loss_on_the_last_turn() -> None:
    row = says("1", "one", "2", "two", "3")
    assert seen(row, "chatml")[1] == ["one<|im_end|>\n", "two<|im_end|>\n"]
    assert seen(row, "chatml", loss_on="last")[1] == ["two<|im_end|>\n"]
    row[3]["train"] = False
    assert seen(row, "chatml", loss_on="last")[1] == ["one<|im_end|>\n"]


def test_an_assistant_turn_first_and_a_user_turn_last() -> None:
    row = says("Welcome", "Hi", "Hello", "Bye", first="assistant")
    assert seen(row, "chatml")[1] == ["Welcome<|im_end|>\n", "Hello<|im_end|>\n"]
    tokens = tokenised("chatml", [row], CHATML)
    text = tokenizer("chatml").decode(list(tokens.input_ids.row(0)))
    assert text.endswith("Hello<|im_end|>")  # what nobody is trained on is not computed either


def test_an_example_without_a_trained_turn_is_left_out_and_counted() -> None:
    rows = [says("only a question"), PLAIN, says("x", "")]
    tokens = tokenised("chatml", rows, CHATML)
    assert list(tokens.indices) == [1] and tokens.num_empty == 2


def test_reasoning_that_a_template_drops_is_not_trained_on_and_is_said() -> None:
    """The mask comes from the whole conversation: joined turns would keep each one's reasoning."""
    row = says("1 + 1?", "2", "And 2 + 2?", "4")
    row[1]["reasoning_content"] = "One more than 1."
    row[3]["content"] = "<think>\nTwice 2.\n</think>\n\n4"
    whole, trained = seen(row)
    assert whole == applied(row) and "One more" not in whole
    assert trained == ["2<|im_end|>\n", "<think>\nTwice 2.\n</think>\n\n4<|im_end|>\n"]
    (note,) = tokenised("qwen3", [row], plain("qwen3")).notes("train", settings())
    assert "removes text from 1 of 1 conversations" in note
    assert r"'One more than 1.\n\n2', becomes '2<|im_end|>'" in note
    assert note.endswith("give another data.chat_template")


def test_kwargs_reach_the_template() -> None:
    """An answer's opening holds an empty thought, which only the last turn has in the whole."""
    row = says("1 + 1?", "2", "And 2 + 2?", "4")
    whole, trained = seen(row, chat_template_kwargs={"enable_thinking": False})
    assert whole == applied(row, enable_thinking=False)
    assert trained == ["2<|im_end|>\n", "4<|im_end|>\n"]
    assert seen(row)[1][1] == "<think>\n\n</think>\n\n4<|im_end|>\n"


# --- neighbours, system turns ------------------------------------------------------------------


def test_neighbours_of_one_role() -> None:
    row = [*says("one"), *says("two", "three"), *says("four", first="assistant")]
    assert seen(row, "chatml")[0] == applied(row, "chatml")
    assert seen(row, "chatml")[1] == ["three<|im_end|>\n", "four<|im_end|>\n"]
    joined = says("one\n\ntwo", "three\n\nfour")
    for family in ("chatml", "gemma"):
        assert seen(row, family, merge_turns=True)[0] == applied(joined, family)
    line = refusal([PLAIN, row], "gemma")
    assert "fails on example 2 of 2, 'one': Conversation roles must alternate" in line
    assert "data.merge_turns=true" in line


def test_turns_that_are_merged_keep_what_belongs_to_them() -> None:
    row = says("x", "a")
    row += [{"role": "assistant", "content": "b", "tool_calls": [CALL], "reasoning_content": "r"}]
    row += [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    row += [{"role": "assistant", "content": "c", "train": False}, *says("d", first="assistant")]
    found = conversations.conversation({"messages": row}, settings(merge_turns=True))
    assert found["messages"] == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "a\n\nb", "tool_calls": [CALL], "reasoning_content": "r"},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "c\n\nd"},
    ]
    assert found["train"] == [1]  # a part of the last turn is not to be trained on


def test_a_system_turn_is_for_the_template_or_folded_in_or_dropped() -> None:
    row = [{"role": "system", "content": "Be brief."}, *PLAIN]
    assert "System role not supported" in (line := refusal([row], "gemma"))
    assert "data.system=fold" in line
    folded = says("Be brief.\n\nWhat is it?", "It is 4.")
    assert seen(row, "gemma", system="fold")[0] == applied(folded, "gemma")
    assert seen(row, "gemma", system="drop")[0] == applied(PLAIN, "gemma")
    assert seen(row, "qwen3", system="template")[0] == applied(row, "qwen3")
    only = [row[0], *says("Hello", first="assistant")]
    with pytest.raises(ValueError, match="folded into a user turn, and there is none"):
        conversations.conversation({"messages": only}, settings(system="fold"))


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
