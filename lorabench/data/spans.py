"""Where in a rendered conversation each assistant turn lies.

A template is asked, never imitated. One that marks what the model writes ({% generation %}) says it
itself. Of any other, the whole conversation is rendered, and then once more with changes whose
effect shows where a turn begins and ends:

begin  where the conversation up to the turn, with the opening of an answer (add_generation_prompt),
       ends. That text must be the beginning of the whole; if the template writes earlier turns
       otherwise once they are earlier ones, the opening must stand before the turn's own text.
end    where the conversation up to and with the turn ends, likewise.

Places are in characters of the whole text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
FENCE = "\ue0f1"  # a private character: no template looks for it, and no tokenizer is asked


def common_prefix(a: str, b: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def turns(
    messages: list[dict[str, Any]], wanted: list[int], render: Callable[..., str]
) -> tuple[str, list[tuple[int, int]]]:
    """Return the whole text, and begin and end of each wanted turn.

    Args:
        wanted: places of assistant turns.
        render: (messages, add_generation_prompt) -> text.
    Raises:
        ValueError: a turn cannot be told from its neighbours; the reason.
    """
    whole = render(messages, False)
    found = []
    for place in wanted:
        own = _own_text(messages, place, whole, render)
        begin = _begin(messages, place, whole, own, render)
        end = len(whole)
        if place + 1 < len(messages):
            end = _end(messages, place, whole, own, render)
        if not begin <= own[0] <= own[1] <= end:
            raise ValueError(_lost(place, "its text lies outside of it"))
        found.append((begin, end))
    return whole, found


def marked(
    messages: list[dict[str, Any]],
    wanted: list[int],
    whole: str,
    marks: list[tuple[int, int]],
    render: Callable[..., str],
) -> list[tuple[int, int]]:
    """Return the marks that belong to the wanted turns, of a template that marks them all.

    Raises:
        ValueError: it marks other turns than the assistant's, or none.
    """
    answers = [i for i, one in enumerate(messages) if one["role"] == "assistant"]
    marks = [(begin, end) for begin, end in marks if end > begin]
    if len(marks) == len(answers):
        return [marks[answers.index(place)] for place in wanted]
    if wanted == answers and marks:  # a turn in several pieces
        return marks
    chosen = []
    for place in wanted:
        own = _own_text(messages, place, whole, render)
        chosen += [(b, e) for b, e in marks if b < own[1] and e > own[0]]
    if len(chosen) < len(wanted):
        raise ValueError(
            f"it marks {len(marks)} stretches as the model's own, of {len(answers)} assistant turns"
        )
    return chosen


def _own_text(
    messages: list[dict[str, Any]], place: int, whole: str, render: Callable[..., str]
) -> tuple[int, int]:
    """Begin and end of what the turn itself says: all that changes if its text does.

    Fences go around its content, or around the name of its first and last tool call.
    """
    begin, end = len(whole), 0
    for where in _texts(messages[place]):
        for fenced in (lambda text: FENCE + text, lambda text: text + FENCE):
            changed = copy.deepcopy(messages)
            where(changed[place], fenced)
            text = render(changed, False)
            if text.count(FENCE) != 1:
                continue
            at = text.index(FENCE)
            if text[:at] + text[at + 1 :] != whole:
                # Spaces that are trimmed at the edge of a text are kept inside of a fence.
                after = len(text) - at - 1
                at = min(common_prefix(whole, text), len(whole) - after)
            begin, end = min(begin, at), max(end, at)
    if begin > end:
        raise ValueError(_lost(place, "the template does not write its text, or writes it twice"))
    return begin, end


def _texts(message: dict[str, Any]) -> list[Callable[[dict[str, Any], Any], None]]:
    """What can be fenced in: the content, and the names of the tool calls."""

    def content(turn: dict[str, Any], fenced: Any) -> None:
        turn["content"] = fenced(turn["content"])

    def name(index: int) -> Callable[[dict[str, Any], Any], None]:
        def change(turn: dict[str, Any], fenced: Any) -> None:
            call = turn["tool_calls"][index]["function"]
            call["name"] = fenced(call["name"])

        return change

    calls = len(message.get("tool_calls", []))
    found = [content] if message["content"].strip() else []
    return found + [name(index) for index in sorted({0, calls - 1})] * bool(calls)


def _begin(
    messages: list[dict[str, Any]],
    place: int,
    whole: str,
    own: tuple[int, int],
    render: Callable[..., str],
) -> int:
    before = messages[:place]
    if before:
        opened = render(before, True)
        if whole.startswith(opened) and len(opened) <= own[0]:
            return len(opened)
    else:  # many templates do not take a conversation of no turn
        before = [{"role": "user", "content": "?"}]
        opened = render(before, True)
    closed = render(before, False)
    opening = opened.removeprefix(closed) if opened.startswith(closed) else ""
    head = whole[: own[0]]
    if opening and (at := head.rfind(opening)) >= 0:
        return at + len(opening)
    # Of an opening that goes on (with an empty thought, say), the turn may have the beginning only.
    for length in range(len(opening) - 1, 0, -1):
        if head.endswith(opening[:length]):
            return own[0]
    raise ValueError(_lost(place, "the opening of an answer does not stand before it"))


def _end(
    messages: list[dict[str, Any]],
    place: int,
    whole: str,
    own: tuple[int, int],
    render: Callable[..., str],
) -> int:
    """Where the turn ends that is not the last one."""
    with_it = messages[: place + 1]
    closed = render(with_it, False)
    if whole.startswith(closed):
        return len(closed)
    # As the last turn it is written otherwise. What closes it there is compared with what comes
    # after its text here; the beginning of the next turn may look alike for a few characters, which
    # the tokens settle: a token that reaches beyond the end is not the turn's.
    _, last = _own_text(with_it, place, closed, render)
    return own[1] + common_prefix(closed[last:], whole[own[1] :])


def _lost(place: int, why: str) -> str:
    return f"where turn {place + 1} begins and ends cannot be told: {why}"
