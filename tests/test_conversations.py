"""The shapes in which chat data lies about in public, each as the model sees it or as refused.

What is expected is what transformers' apply_chat_template makes of the same turns in plain form;
that all tokens and masks are TRL's is in test_messages.py.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from chats import (
    CALL,
    CHATML,
    ENDS,
    PLAIN,
    TOOLS_USED,
    WEATHER,
    applied,
    of_trl,
    plain,
    refusal,
    says,
    seen,
    settings,
    tokenised,
    tokenizer,
)

from lorabench.data import conversations

# --- rows --------------------------------------------------------------------------------------

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
