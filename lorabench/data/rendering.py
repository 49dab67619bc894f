"""Chat templates rendered in a process of their own, which is ended if it takes too much.

A template is a program that comes with the tokenizer. The sandbox that transformers renders it in
keeps it from Python and from files, but not from running for ever or from filling the memory.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from lorabench import interrupt
from lorabench.config import ConfigErrors, first_line
from lorabench.data import spans

# Of one example, whose conversation takes a real template about a millisecond.
CPU_SECONDS = 5.0
WALL_SECONDS = 60.0  # for a process that waits; one that computes on a busy machine gets there too
MEMORY_BYTES = 512 << 20  # beyond what this process has; a real template takes less than 1 MiB
ADDED_CHARACTERS = 100_000  # around prompt and completion; a real template adds a few thousand


def render_pairs(
    template: str, tokenizer: Any, pairs: Sequence[tuple[str, str]], kwargs: dict[str, Any]
) -> list[tuple[str, str]]:
    """Return of each prompt and completion what `pair` does. Raises as `render_all`.

    Args:
        kwargs: what the template gets beside the turns (`data.chat_template_kwargs`).
    """
    remedy = "set data.chat_template=false and write the turns into data.prompt"
    made = render_all(
        tokenizer, pairs, lambda one: pair(template, tokenizer, one[0], one[1], kwargs), remedy
    )
    return [(opened, whole) for opened, whole in made]


def render_conversations(
    template: str, tokenizer: Any, found: Sequence[str], kwargs: dict[str, Any]
) -> list[tuple[str, list[list[int]]]]:
    """Return of each conversation what `conversation` does. Raises as `render_all`.

    Args:
        found: what `conversations.conversation` returns, as JSON.
        kwargs: what the template gets beside the turns.
    """
    remedy = (
        "give another data.chat_template, or change such turns: data.system=fold (or drop), "
        "data.merge_turns=true"
    )
    made = render_all(
        tokenizer,
        found,
        lambda one: conversation(template, tokenizer, json.loads(one), kwargs),
        remedy,
    )
    return [(whole, places) for whole, places in made]


def render_all(
    tokenizer: Any, items: Sequence[Any], render: Callable[[Any], Sequence[Any]], remedy: str
) -> list[list[Any]]:
    """Render examples, in the child.

    Args:
        items: the text of each example, in one or several parts.
        render: an item -> its text and what belongs to it, in JSON's types.
        remedy: what else can be done where a template cannot be corrected.
    Raises:
        ConfigErrors: the template refuses an example, is no template, or takes too much of
            anything; names the example.
    """
    # The child inherits its imports: a lock that another thread holds now stays locked in there.
    from transformers.utils import chat_template_utils  # noqa: F401

    readable, writable = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads, which the child does not have: it only runs Jinja.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        _serve(writable, items, render)
    os.close(writable)
    found: list[list[Any]] = []
    reason = None
    try:
        with open(readable, encoding="utf-8") as lines:
            for line in lines:
                answer = json.loads(line)
                if isinstance(answer, str):
                    reason = answer
                    break
                found.append(answer)
    finally:
        os.kill(child, signal.SIGKILL)  # changes nothing for a process that has ended
        _, status = os.waitpid(child, 0)
    if len(found) < len(items):
        raise ConfigErrors(
            f"data.chat_template: must render every example; the template of "
            f"'{tokenizer.name_or_path}' fails on example {len(found) + 1} of {len(items)}, "
            f"{_first(items[len(found)])}: {reason or _how_it_ended(status)}; correct the "
            f"template, or {remedy}"
        )
    return found


def _first(item: Any) -> str:
    """The beginning of an example, to find it by."""
    if isinstance(item, str):
        turns = json.loads(item)["messages"]
        item = [
            next((one["content"] for one in turns if one["role"] == "user"), turns[0]["content"])
        ]
    return f"{item[0]!r:.40}"


def pair(
    template: str, tokenizer: Any, prompt: str, completion: str, kwargs: dict[str, Any]
) -> tuple[str, str]:
    """Return the prompt with the opening of the assistant's turn, and the whole conversation."""
    turns = [{"role": "user", "content": prompt}]
    opened = tokenizer.apply_chat_template(
        turns, chat_template=template, add_generation_prompt=True, tokenize=False, **kwargs
    )
    turns.append({"role": "assistant", "content": completion})
    whole = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **kwargs)
    return opened, whole


def conversation(
    template: str, tokenizer: Any, found: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[str, list[spans.Span]]:
    """Return the whole text of a conversation, and where each turn lies that is trained on.

    Args:
        found: as `conversations.conversation` returns it.
    """
    try:
        return _conversation(template, tokenizer, found, kwargs)
    except TypeError:
        # Some templates (DeepSeek's) take the arguments of tool calls as text only.
        if not any("tool_calls" in turn for turn in found["messages"]):
            raise
        return _conversation(template, tokenizer, _with_text_arguments(found), kwargs)


def _conversation(
    template: str, tokenizer: Any, found: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[str, list[spans.Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = tokenizer.special_tokens_map | kwargs  # templates call the first bos_token, ...

    def render(messages: list[dict[str, Any]], open_answer: bool, marks: bool = False) -> Any:
        made: Any = render_jinja_template(
            [messages], tools=found["tools"], chat_template=template,
            return_assistant_tokens_mask=marks, add_generation_prompt=open_answer, **variables,
        )  # fmt: skip
        texts, places = made
        return (texts[0], places[0]) if marks else texts[0]

    messages, wanted = found["messages"], found["train"]
    if not wanted:
        return render(messages, False), []
    if not spans.MARKS.search(template):
        return spans.turns(messages, wanted, render)
    whole, marks = render(messages, False, marks=True)
    return whole, spans.marked(messages, wanted, marks, render)


def _with_text_arguments(found: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(found)
    for turn in found["messages"]:
        for call in turn.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return found


# --- in the child ----------------------------------------------------------------------------


def _serve(writable: int, items: Sequence[Any], render: Callable[[Any], Sequence[Any]]) -> NoReturn:
    """Write one line of JSON per example: what it is rendered to, or why it cannot be."""
    try:
        for number in interrupt.HEARD:  # the parent decides
            signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)  # which ends the process, whatever it is at
        _limit_memory()
        with open(writable, "wb") as file:
            for item in items:
                _answer(file, item, render)
    finally:
        os._exit(0)  # never back into the caller


def _answer(file: IO[bytes], item: Any, render: Callable[[Any], Sequence[Any]]) -> None:
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        made = render(item)
        texts = [part for part in made if isinstance(part, str)]
        given = len(item) if isinstance(item, str) else sum(map(len, item))
        added = max(map(len, texts)) - given
        too_long = f"it adds {added} characters, more than {ADDED_CHARACTERS}"
        answer = made if added <= ADDED_CHARACTERS else too_long
        line = json.dumps(answer, ensure_ascii=False).encode()
    except Exception as error:
        line = json.dumps(_reason(error)).encode()
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    file.write(line + b"\n")
    file.flush()


def _limit_memory() -> None:
    """Bound the address space; where it cannot be known (macOS), it stays as it is."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _reason(error: Exception) -> str:
    from jinja2 import TemplateError, TemplateSyntaxError

    if isinstance(error, MemoryError):
        return f"it takes more than {MEMORY_BYTES >> 20} MiB of memory"
    if isinstance(error, RecursionError):
        return "it calls itself too deeply"
    text = first_line(error, None)
    if isinstance(error, TemplateSyntaxError):
        return f"{text.rstrip('.')} (line {error.lineno} of the template)"
    if isinstance(error, TemplateError):
        return text.rstrip(".")
    return f"{type(error).__name__}: {text.rstrip('.')}"


# --- in the parent ---------------------------------------------------------------------------


def _how_it_ended(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGPROF:
        return f"it takes more than {CPU_SECONDS:g} s"
    if code == -signal.SIGALRM:
        return f"it does not end within {WALL_SECONDS:g} s"
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"its process ended without an answer ({how})"
