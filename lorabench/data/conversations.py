"""A row of chat data -> a conversation in one form, whatever form it came in.

Forms met in public: OpenAI's messages (content as text, as a list of text parts, or null beside
tool_calls; tool arguments as JSON text or as objects), ShareGPT's conversations (human, gpt,
function_call, observation), and either as JSON text in a cell.
"""

from __future__ import annotations

import json
from typing import Any

from lorabench.config import DataConfig
from lorabench.data.templates import CONVERSATIONS, as_text

ROLES = ("system", "user", "assistant", "tool")
# What public data sets call these roles.
SYNONYMS = {"developer": "system", "model": "assistant", "function": "tool", "ipython": "tool"}
SHAREGPT = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "model": "assistant", "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
TEXT_PARTS = ("text", "input_text", "output_text")
SEPARATOR = "\n\n"  # between turns that are joined, and after a system text that is folded in


def column_of(cfg: DataConfig) -> str:
    """The column that holds a conversation."""
    return cfg.messages or CONVERSATIONS[cfg.format]


def conversation(row: dict[str, Any], cfg: DataConfig) -> dict[str, Any]:
    """Return a row's turns in OpenAI's form, its tools, and which turns are trained on.

    Returns:
        messages: dicts with role, content (text) and, where they came, tool_calls (arguments as
            objects), reasoning_content, name, tool_call_id; train: places of the turns that carry
            a loss; tools: JSON schemas, or None.
    Raises:
        ValueError: the row holds no conversation; the reason.
    """
    column = column_of(cfg)
    if column not in row:
        raise ValueError(f"no column '{column}'; there are {', '.join(row)}")
    turns = _parsed(row[column], f"column '{column}'")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"column '{column}' must hold a list of turns, not {turns!r:.40}")
    read = _sharegpt if cfg.format == "sharegpt" else _message
    messages = [read(turn, f"turn {number} ", cfg) for number, turn in enumerate(turns, 1)]
    if cfg.format == "sharegpt" and row.get("system") and messages[0]["role"] != "system":
        messages.insert(
            0, {"role": "system", "content": _content(row["system"], "column 'system'")}
        )
    messages = _with_system(messages, cfg.system)
    if cfg.merge_turns:
        messages = _merged(messages)
    train = [place for place, one in enumerate(messages) if _is_trained(one)]
    for one in messages:
        one.pop("train", None)
    tools = _tools(row.get(cfg.tools)) if cfg.tools else None
    return {"messages": messages, "train": train[-1:] if cfg.loss_on == "last" else train,
            "tools": tools}  # fmt: skip


def as_example(found: dict[str, Any]) -> tuple[str, str, str]:
    """Return prompt, completion and the whole of a conversation, as texts.

    The completion is the last turn that is trained on, the prompt what comes before it, as JSON.
    """
    last = found["train"][-1] if found["train"] else len(found["messages"])
    prompt = {"messages": found["messages"][:last], "tools": found["tools"]}
    turn: dict[str, Any] = found["messages"][last] if found["train"] else {"content": ""}
    answer = turn["content"] or "".join(
        _json(call["function"]) for call in turn.get("tool_calls", [])
    )
    return _json(prompt), answer or turn.get("reasoning_content", ""), _json(found)


def _message(turn: Any, where: str, cfg: DataConfig) -> dict[str, Any]:
    """One turn in OpenAI's form."""
    if not isinstance(turn, dict):
        raise ValueError(f"{where}must be an object with a role and content, not {turn!r:.40}")
    # Readers of tables fill each turn with the keys of all others.
    turn = {key: value for key, value in turn.items() if value is not None}
    role = turn.get("role")
    role = SYNONYMS.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        hint = "; that is ShareGPT's form: set data.format=sharegpt" if "from" in turn else ""
        raise ValueError(f"{where}has the role {role!r:.40}, not {', '.join(ROLES)}{hint}")
    made: dict[str, Any] = {"role": role}
    calls = turn.get("tool_calls") or []
    if turn.get("function_call"):  # OpenAI's older name of a single one
        calls = [turn["function_call"]]
    if "content" not in turn and not calls:
        raise ValueError(f"{where}has neither content nor tool_calls; its keys: {', '.join(turn)}")
    made["content"] = _content(turn.get("content", ""), where)
    if calls:
        if role != "assistant":
            raise ValueError(
                f"{where}has tool_calls, which only an assistant makes; its role: {role}"
            )
        made["tool_calls"] = [_call(one, where) for one in _parsed(calls, where)]
    for key in ("reasoning_content", "name", "tool_call_id"):
        if key in turn:
            made[key] = _content(turn[key], f"{where}{key} ")
    if "reasoning_content" not in made and turn.get("thinking"):
        made["reasoning_content"] = _content(turn["thinking"], f"{where}thinking ")
    train = turn.get("train", turn.get("weight", True))  # weight: OpenAI's name, 0 or 1
    if train not in (True, False):  # 0 and 1 are equal to them
        raise ValueError(f"{where}has train={train!r:.20}, not true or false")
    made["train"] = bool(train)
    return made


def _sharegpt(turn: Any, where: str, cfg: DataConfig) -> dict[str, Any]:
    """One turn in ShareGPT's form, in OpenAI's."""
    if not isinstance(turn, dict) or turn.get("from") is None:
        hint = ""
        if isinstance(turn, dict) and "role" in turn:
            hint = "; that is OpenAI's form: set data.format=messages"
        raise ValueError(
            f"{where}must be an object with 'from' and 'value', not {turn!r:.40}{hint}"
        )
    sender = turn["from"]
    if sender not in SHAREGPT:
        raise ValueError(f"{where}is from {sender!r:.40}, not one of {', '.join(SHAREGPT)}")
    made = {"role": SHAREGPT[sender], "content": turn.get("value")}
    if sender == "function_call":
        calls = _parsed(turn.get("value"), where)
        made |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    kept = {key: turn[key] for key in ("train", "weight") if key in turn}
    return _message(made | kept, where, cfg)


def _content(value: Any, where: str) -> str:
    """Text, a number, or a list of text parts, as text."""
    if isinstance(value, list):
        parts = []
        for part in value:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(part, dict) and part.get("type", "text") not in TEXT_PARTS:
                raise ValueError(f"{where}holds a part of type '{part['type']}', not text")
            parts.append(_content(text, where))
        return "".join(parts)
    text = as_text(value)
    if text is None:
        raise ValueError(f"{where}must hold text, not {value!r:.40}")
    return text


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call, with its arguments as an object."""
    outer = call if isinstance(call, dict) else {}
    inner = outer["function"] if isinstance(outer.get("function"), dict) else outer
    name, arguments = inner.get("name"), inner.get("arguments", inner.get("parameters"))
    if not isinstance(name, str):
        raise ValueError(f"{where}has a tool call without a name: {call!r:.60}")
    if isinstance(arguments, str) and arguments:
        arguments = _parsed(arguments, f"{where}arguments of {name}")
    else:
        arguments = _without_nulls(arguments or {})
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}arguments of {name} must be a JSON object, not {arguments!r:.40}")
    made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made | ({"id": outer["id"]} if isinstance(outer.get("id"), str) else {})


def _tools(value: Any) -> list[Any] | None:
    if value in (None, "", []):
        return None
    tools = _parsed(value, "the tools") if isinstance(value, str) else _without_nulls(value)
    if isinstance(tools, list):
        tools = [_parsed(one, "a tool") for one in tools]
    if not isinstance(tools, list) or not all(isinstance(one, dict) for one in tools):
        raise ValueError(f"the tools must be a list of JSON schemas, not {tools!r:.40}")
    return tools or None


def _without_nulls(value: Any) -> Any:
    """Leave out keys without a value: tables give each object the keys of all others.

    JSON in a text is left as it is.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _parsed(value: Any, where: str) -> Any:
    """A value that came as JSON text, or as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(
            f"{where.strip()} is text that is not JSON ({error}): {value!r:.40}"
        ) from error


def _with_system(messages: list[dict[str, Any]], how: str) -> list[dict[str, Any]]:
    """Hand the system turns to the template, put them into the first user turn, or drop them."""
    if how == "template":
        return messages
    texts = [one["content"] for one in messages if one["role"] == "system"]
    rest = [one for one in messages if one["role"] != "system"]
    if how == "drop" or not texts:
        return rest
    first = next((one for one in rest if one["role"] == "user"), None)
    if first is None:
        raise ValueError("a system turn can only be folded into a user turn, and there is none")
    first["content"] = SEPARATOR.join([*texts, first["content"]])
    return rest


def _merged(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join neighbouring turns of one role; of tools each answer stays, and what follows a call."""
    joined: list[dict[str, Any]] = []
    for one in messages:
        last = joined[-1] if joined else None
        if (
            last is None
            or last["role"] != one["role"]
            or one["role"] == "tool"
            or "tool_calls" in last
        ):
            joined.append(one)
            continue
        for key in ("reasoning_content", "content"):
            if texts := [text for turn in (last, one) if (text := turn.get(key))]:
                last[key] = SEPARATOR.join(texts)
        if "tool_calls" in one:
            last["tool_calls"] = one["tool_calls"]
        last["train"] = last.get("train", True) and one.get("train", True)
    return joined


def _is_trained(message: dict[str, Any]) -> bool:
    says = message["content"].strip() or message.get("tool_calls")
    return bool(message["role"] == "assistant" and message.get("train", True) and says)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
