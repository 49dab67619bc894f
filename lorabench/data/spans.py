"""Where in a rendered conversation each assistant turn lies.

A template is asked, never imitated. One that marks what the model writes ({% generation %}) says it
itself. Of any other, the whole conversation is rendered; then parts of it and changes to it show
where a turn begins and ends:

own text  what the turn itself says: fences around each text of each turn, in one rendering.
begin     where the conversation up to the turn, with the opening of an answer
          (add_generation_prompt), ends. That text must be the beginning of the whole; if the
          template writes earlier turns otherwise once they are earlier ones, the opening must stand
          between the two turns' own texts.
end       where the conversation up to and with the turn ends, likewise.

What stands between the own texts of two turns is mostly the same all through a conversation, and
so are begin and end in it: each such text is asked about once, so that a conversation of hundreds
of turns is not rendered hundreds of times.

Places are in characters of the whole text.
"""

from __future__ import annotations

import contextlib
import copy
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
PRIVATE = [chr(code) for code in range(0xE0F1, 0xE1F1)]  # characters that no template looks for

Messages = list[dict[str, Any]]
Render = Callable[[Messages, bool], str]
Place = tuple[int, int]
Span = tuple[int, int, int]  # begin, end, number of the turn; a turn may have several


def turns(messages: Messages, wanted: list[int], render: Render) -> tuple[str, list[Span]]:
    """Return the whole text, and where each wanted turn lies in it.

    Args:
        wanted: places of assistant turns.
        render: (messages, add_generation_prompt) -> text.
    Raises:
        ValueError: a turn cannot be told from its neighbours; the reason.
    """
    found = _Turns(messages, render)
    return found.whole, [(*found.place(number), number) for number in wanted]


def marked(messages: Messages, wanted: list[int], marks: list[Place], render: Render) -> list[Span]:
    """Return the marks that belong to the wanted turns, of a template that marks them all.

    Raises:
        ValueError: it marks nothing of a wanted turn.
    """
    answers = [i for i, one in enumerate(messages) if one["role"] == "assistant"]
    pieces: list[Place] = []
    for begin, end in marks:
        if pieces and pieces[-1][1] == begin:
            begin = pieces.pop()[0]
        if end > begin:
            pieces.append((begin, end))
    if len(pieces) == len(answers):
        owners = answers
    else:  # some turns in several pieces, or in none
        found = _Turns(messages, render)
        told = [number for number in answers if number in wanted or number in found.own]
        begins = [found.own_text(number)[0] for number in told]
        owners = [told[max(bisect_left(begins, end) - 1, 0)] for _, end in pieces]
    if lacking := set(wanted) - set(owners):
        raise ValueError(
            f"it marks {len(pieces)} stretches as the model's own, none of them in turn "
            f"{min(lacking) + 1}; there are {len(answers)} assistant turns"
        )
    return [(*one, owner) for one, owner in zip(pieces, owners, strict=True) if owner in wanted]


class _Turns:
    """A conversation as one text, and where its turns lie in it."""

    def __init__(self, messages: Messages, render: Render) -> None:
        self.messages, self.render = messages, render
        self.whole = render(messages, False)
        self.own = _own_texts(messages, self.whole, render)
        self._known: dict[tuple[str, ...], int] = {}  # by the text between two turns

    def place(self, number: int) -> Place:
        """Begin and end of an assistant turn."""
        own = self.own_text(number)
        begin, end = self._begin(number, own[0]), self.end(number)
        if not begin <= own[0] <= own[1] <= end:
            raise ValueError(_lost(number, "its text lies outside of it"))
        return begin, end

    def own_text(self, number: int) -> Place:
        """Begin and end of what a turn itself says."""
        if number not in self.own:
            self.own[number] = _own_text(self.messages, number, self.whole, self.render)
        return self.own[number]

    def end(self, number: int) -> int:
        """Where a turn ends."""
        if number + 1 == len(self.messages):
            return len(self.whole)
        own = self.own_text(number)[1]
        key = self._between("end", number)
        if key not in self._known:
            end = self._asked_end(number, own)
            if not key:
                return end
            self._known[key] = end - own
        return own + self._known[key]

    def _between(self, what: str, number: int) -> tuple[str, ...]:
        """What decides a begin or an end between a turn and the next; nothing if it is not known.

        The roles of both, and the text between what they say.
        """
        if number < 0 or number not in self.own or number + 1 not in self.own:
            return ()
        here, there = self.messages[number], self.messages[number + 1]
        text = self.whole[self.own[number][1] : self.own[number + 1][0]]
        return what, here["role"], there["role"], text

    def _begin(self, number: int, own: int) -> int:
        key = self._between("begin", number - 1)
        if key not in self._known:
            begin = self._asked_begin(number, own)
            if not key:
                return begin
            self._known[key] = own - begin
        return own - self._known[key]

    def _asked_begin(self, number: int, own: int) -> int:
        before = self.messages[:number]
        if before:
            opened = self.render(before, True)
            if self.whole.startswith(opened) and len(opened) <= own:
                return len(opened)
        else:  # many templates do not take a conversation of no turn
            before = [{"role": "user", "content": "?"}]
            opened = self.render(before, True)
        closed = self.render(before, False)
        opening = opened.removeprefix(closed) if opened.startswith(closed) else ""
        after = self._after(number)
        between = self.whole[after:own]
        if opening and (at := between.rfind(opening)) >= 0:
            return after + at + len(opening)
        # Of an opening that goes on (with the begin of a thought, say), the turn may have the first
        # part only. If that ends in the middle of a token, the tokens tell.
        common = _common_prefix(opening, between)
        if between[:common].strip():
            return after + common
        raise ValueError(_lost(number, "the opening of an answer does not stand before it"))

    def _after(self, number: int) -> int:
        """Where the last turn ends that comes before one and has a text."""
        for earlier in range(number - 1, -1, -1):
            with contextlib.suppress(ValueError):
                return self.end(earlier)
        return 0

    def _asked_end(self, number: int, own: int) -> int:
        with_it = self.messages[: number + 1]
        closed = self.render(with_it, False)
        if self.whole.startswith(closed) and len(closed) >= own:
            return len(closed)
        # As the last turn it is written otherwise. What closes it there is compared with what comes
        # after its text here; the beginning of the next turn may look alike for a few characters,
        # which the tokens settle: a token that reaches beyond the end is not the turn's.
        _, last = _own_text(with_it, number, closed, self.render)
        return own + _common_prefix(closed[last:], self.whole[own:])


def _own_texts(messages: Messages, whole: str, render: Render) -> dict[int, Place]:
    """Begin and end of what each turn says, as far as one rendering with all fences shows them."""
    changed, edge = copy.deepcopy(messages), _fence(whole)
    for number, one in enumerate(changed):
        for change in _texts(one):
            change(f"{edge}{number}{edge}", True)
            change(f"{edge}{number}{edge}", False)
    text, fences = render(changed, False), re.compile(rf"{edge}(\d+){edge}")
    if fences.sub("", text) != whole:
        return {}
    found: dict[int, Place] = {}
    taken = 0
    for fence in fences.finditer(text):
        number, at = int(fence[1]), fence.start() - taken
        found[number] = (found.get(number, (at, at))[0], at)
        taken += len(fence[0])
    places = list(found.values())
    if any(one[1] > two[0] for one, two in pairwise(places)):
        return {}  # turns in another order, or a text in two places
    return found


def _own_text(messages: Messages, number: int, whole: str, render: Render) -> Place:
    """Begin and end of what one turn says: all that changes if its text does."""
    begin, end, fence = len(whole), 0, _fence(whole)
    for index in range(len(list(_texts(messages[number])))):
        for is_before in (True, False):
            changed = copy.copy(messages)
            changed[number] = copy.deepcopy(messages[number])
            list(_texts(changed[number]))[index](fence, is_before)
            text = render(changed, False)
            if text.count(fence) != 1:
                continue
            at = text.index(fence)
            if text[:at] + text[at + 1 :] != whole:
                # What the fence changed besides lies between what is the same before and after it.
                at = min(_common_prefix(whole, text), len(whole) - (len(text) - at - 1))
            begin, end = min(begin, at), max(end, at)
    if begin > end:
        what = "tool calls" if messages[number].get("tool_calls") else "text"
        raise ValueError(
            _lost(number, f"the template does not write its {what}, or writes them more than once")
        )
    return begin, end


def _fence(whole: str) -> str:
    """Return a character that a conversation does not hold."""
    return next(one for one in PRIVATE if one not in whole)


def _texts(message: dict[str, Any]) -> Iterator[Callable[[str, bool], None]]:
    """Yield what puts a fence before (True) or behind each text of a turn.

    Fences stand inside of the spaces around a text, which many templates trim.
    """

    def fencing(where: dict[str, Any], key: str) -> Callable[[str, bool], None]:
        def change(fence: str, is_before: bool) -> None:
            text = where[key]
            bare = text.strip()
            at = text.index(bare) + (0 if is_before else len(bare))
            where[key] = text[:at] + fence + text[at:]

        return change

    for key in ("reasoning_content", "content"):
        if message.get(key, "").strip():
            yield fencing(message, key)
    calls = [call["function"] for call in message.get("tool_calls", [])]
    for call in calls[:1] + calls[1:][-1:]:
        yield fencing(call, "name")
    if calls:
        arguments = calls[-1]["arguments"]  # text for some templates
        last = [*arguments][-1:] if isinstance(arguments, dict) else []
        if last and isinstance(arguments[last[0]], str) and arguments[last[0]].strip():
            yield fencing(arguments, last[0])


def _common_prefix(a: str, b: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))


def _lost(number: int, why: str) -> str:
    return f"where turn {number + 1} begins and ends cannot be told: {why}"
