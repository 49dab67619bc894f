"""Token ids of examples, and exactly which of them carry a loss."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from lorabench import cache
from lorabench.config import ConfigErrors, DataConfig
from lorabench.data.examples import Example
from lorabench.data.ragged import Ragged
from lorabench.data.templates import CONVERSATIONS

AT_ONCE = 1000  # examples that are hashed together
FLUSH = 1 << 20  # token ids that are written together


class Encoded(NamedTuple):
    """The token ids of one example, or of one piece of a text."""

    ids: list[int]
    spans: list[int]  # where each stretch that carries a loss begins and ends, in turn
    left: str | None = None  # what a template leaves of a completion that it takes text from
    lost_from: str | None = None  # of a conversation: the turn that it takes text from
    piece: str = ""  # of a text: which piece this is, for its id


@dataclass
class Tokens:
    """The examples that were kept. A stretch (span) of tokens that carries a loss is trained on.

    Of a prompt and its completion the span is the completion; of a conversation there is one for
    each turn that is trained on; of a text all tokens but the first.
    """

    input_ids: Ragged
    spans: Ragged  # begin and end of each span of an example, one after the other
    ids: Sequence[str]  # Example.id
    indices: Sequence[int]  # places in the list of examples
    # Of a classification, whose completions are no tokens but labels; else empty:
    labels: list[str] = field(default_factory=list)  # the classes
    label_ids: list[int] = field(default_factory=list)  # place in `labels`, one per example
    # For the notes:
    all_lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # before any was
    # left out or cut: tokens of each example (or piece of a text) that has any with a loss
    num_too_long: int = 0  # left out: longer than data.max_length tokens
    num_cut: int = 0  # kept, with the left of their prompt cut
    num_empty: int = 0  # left out: nothing carries a loss
    num_examples: int = 0  # before any was left out
    num_losing_text: int = 0  # kept, but the chat template removes text of the completion
    first_loss: tuple[str, str] | None = None  # such a completion, and what is left of it

    @classmethod
    def of(
        cls, input_ids: Iterable[Sequence[int]], completion_start: Sequence[int], **others: Any
    ) -> Tokens:
        """Return tokens of which each example's completion, from its start on, carries the loss."""
        kept = Ragged.of(input_ids)
        starts = np.asarray(completion_start, dtype=np.int32)
        both = np.stack([starts, kept.lengths.astype(np.int32)], axis=1).reshape(-1)
        spans = Ragged(both, np.arange(1, len(kept) + 1, dtype=np.int64) * 2)
        names = {"ids": [str(i) for i in range(len(kept))], "indices": range(len(kept))}
        return cls(kept, spans, **(names | others))

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest example, those left out included."""
        return int(self.all_lengths.max(initial=0))

    @property
    def completion_start(self) -> list[int]:
        """Where the last span of each example begins: what comes before it is a prompt."""
        return self.spans.values[self.spans.ends - 2].tolist()

    def num_targets(self) -> np.ndarray:
        """(E,) tokens of each example that carry a loss."""
        begins_ends = self.spans.values.reshape(-1, 2).astype(np.int64)
        owner = np.repeat(np.arange(len(self)), self.spans.lengths // 2)
        widths = begins_ends[:, 1] - begins_ends[:, 0]
        return np.bincount(owner, weights=widths, minlength=len(self)).astype(np.int64)

    def error(self, split: str, cfg: DataConfig) -> str:
        """Return why too much of a split would be left out as too long; empty if it is not."""
        total = self.num_examples - self.num_empty
        if self.num_too_long <= cfg.allow_left_out * total:
            return ""
        enough = int(np.quantile(self.all_lengths, 0.99, method="higher"))
        return (
            f"data.max_length: must let at least {1 - cfg.allow_left_out:.0%} of data.{split} "
            f"through; got {cfg.max_length}, and {self.num_too_long} of {total} examples are "
            f"longer; data.max_length={enough} keeps 99%; set it, or data.allow_left_out="
            f"{_share(self.num_too_long / total)} to leave them out"
        )

    def notes(self, split: str, cfg: DataConfig) -> list[str]:
        """Return what a user should know about the examples left out or changed, in sentences."""
        found, total = [], self.num_examples
        if self.num_too_long:
            left = total - self.num_too_long - self.num_empty
            found.append(
                f"data.{split}: {left} of {total} examples are left; {self.num_too_long} were left "
                f"out because they are longer than data.max_length={cfg.max_length} tokens; "
                f"data.max_length={self.longest} would keep them all"
            )
        if self.num_cut:
            found.append(
                f"data.{split}: the left of the prompt is cut from {self.num_cut} of {total} "
                f"examples, which are longer than data.max_length={cfg.max_length} tokens; "
                f"data.max_length={self.longest} would cut none"
            )
        if self.num_empty:
            found.append(
                f"data.{split}: {self.num_empty} of {total} examples were left out because their "
                "completion gives no token; fill it in, or remove them"
            )
        if self.first_loss:
            before, after = (_shortened(text) for text in self.first_loss)
            what = "completions"
            remedy = "set data.chat_template=false and write the turns into data.prompt"
            if cfg.format in CONVERSATIONS:
                what, remedy = "conversations", "give another data.chat_template"
            found.append(
                f"data.{split}: the chat template removes text from {self.num_losing_text} of "
                f"{total} {what}, which is not trained on; the first, {before}, becomes "
                f"{after}; to keep all text, {remedy}"
            )
        return found

    def hash(self) -> str:
        """Return the sha256 of exactly what is trained on.

        Hashed are little-endian int64: the number of examples; of each, the number of its ids and
        the ids; where each one's last span begins; the number of label ids and the label ids.
        Where a span does not end its example, or there are several: also their numbers of numbers,
        and all begins and ends.
        """
        digest = hashlib.sha256()

        def add(numbers: Any) -> None:
            digest.update(np.asarray(numbers, dtype="<i8").tobytes())

        def add_lists(lists: Ragged) -> None:
            for start in range(0, len(lists), AT_ONCE):
                add(
                    np.concatenate(
                        [
                            part
                            for i in range(start, min(start + AT_ONCE, len(lists)))
                            for part in ([len(lists.row(i))], lists.row(i))
                        ]
                    )
                )

        add([len(self)])
        add_lists(self.input_ids)
        add(self.completion_start)
        add([len(self.label_ids), *self.label_ids])
        last = self.spans.values[self.spans.ends - 1]
        if (self.spans.lengths != 2).any() or (last != self.input_ids.lengths).any():
            add_lists(self.spans)
        return digest.hexdigest()

    def first(self, count: int) -> Tokens:
        """The first examples only."""
        return replace(
            self,
            input_ids=self.input_ids.first(count),
            spans=self.spans.first(count),
            ids=self.ids[:count],
            indices=self.indices[:count],
            label_ids=self.label_ids[:count],
        )


def _share(part: float) -> str:
    """A part of one, rounded up to two digits."""
    return f"{math.ceil(part * 100) / 100:g}"


def _shortened(text: str, width: int = 60) -> str:
    return repr(text if len(text) <= width else f"{text[: width - 3]}...")


class Kept:
    """Collects what fits, in compact arrays; the ids in a `cache.Spool`."""

    def __init__(self, cfg: DataConfig, bos: int | None) -> None:
        self.cfg, self.bos = cfg, bos
        self.values, self.ends = array("i"), array("q")
        self._spool, self._count = cache.Spool(), 0
        self.spans, self.span_ends = array("i"), array("q")
        self.ids: list[str] = []
        self.indices, self.lengths = array("q"), array("q")
        self.num_too_long = self.num_cut = self.num_empty = self.num_losing_text = 0
        self.first_loss: tuple[str, str] | None = None

    def add(self, index: int, example: Example, encoded: Encoded) -> bool:
        """Add an example if it fits; return whether it does."""
        ids, spans, limit = encoded.ids, encoded.spans, self.cfg.max_length
        if not spans:
            self.num_empty += 1
            return False
        self.lengths.append(len(ids))
        if (over := len(ids) - limit) > 0:
            # One token stays before the first span, to predict it from: BOS, where there is one.
            if self.cfg.too_long != "cut_prompt" or over > spans[0] - 1:
                self.num_too_long += 1
                return False
            keep = int(ids[0] == self.bos)
            ids = [*ids[:keep], *ids[keep + over :]]
            spans = [place - over for place in spans]
            self.num_cut += 1
        self.values.extend(ids)
        self._count += len(ids)
        self.ends.append(self._count)
        if len(self.values) > FLUSH:
            self._flush()
        self.spans.extend(spans)
        self.span_ends.append(len(self.spans))
        self.ids.append(f"{example.id}{encoded.piece}")
        self.indices.append(index)
        if encoded.left is not None:
            self.num_losing_text += 1
            self.first_loss = self.first_loss or (
                encoded.lost_from or example.completion,
                encoded.left,
            )
        return True

    def pack(self) -> None:
        """Make it something that can be sent to another process."""
        self._flush()
        self.values = array("i", bytes(self._spool.content()))
        del self._spool

    def _flush(self) -> None:
        self._spool.write(self.values)
        self.values = array("i")

    def take(self, other: Kept) -> None:
        """Add what another has collected of the examples that follow."""
        self._flush()
        values = other.values.tobytes()
        self._spool.write(values)
        shift = len(self.spans)
        self.ends.extend(end + self._count for end in other.ends)
        self._count += len(values) // other.values.itemsize
        self.spans.extend(other.spans)
        self.span_ends.extend(end + shift for end in other.span_ends)
        self.ids += other.ids
        self.indices.extend(other.indices)
        self.lengths.extend(other.lengths)
        for name in ("num_too_long", "num_cut", "num_empty", "num_losing_text"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first_loss = self.first_loss or other.first_loss

    def tokens(self, num_examples: int) -> Tokens:
        """Return what was kept.

        Raises:
            ConfigErrors: nothing was.
        """
        lengths = np.array(self.lengths, dtype=np.int64)
        if not self.ends:
            keys = {"prompt_completion": "completion", "text": "text"}
            key = keys.get(self.cfg.format, "messages")
            message = f"data.{key}: must give tokens; got none from {num_examples} examples"
            if len(lengths):
                message = (
                    f"data.max_length: must let at least one of {num_examples} examples through; "
                    f"got {self.cfg.max_length}, the shortest has {lengths.min()} tokens; raise "
                    "data.max_length"
                )
            raise ConfigErrors(message)
        self._flush()
        values = np.frombuffer(self._spool.content(), np.int32)
        return Tokens(
            Ragged(values, np.array(self.ends, np.int64)),
            Ragged(np.array(self.spans, np.int32), np.array(self.span_ends, np.int64)),
            self.ids,
            list(self.indices),
            all_lengths=lengths,
            num_too_long=self.num_too_long,
            num_cut=self.num_cut,
            num_empty=self.num_empty,
            num_examples=num_examples,
            num_losing_text=self.num_losing_text,
            first_loss=self.first_loss,
        )
