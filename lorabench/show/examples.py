"""Examples as the model sees them: special tokens visible, what carries a loss marked."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from lorabench.show.text import console

if TYPE_CHECKING:
    from lorabench.data import Tokens

QUANTILES = (0.01, 0.5, 0.9, 0.99)


def content(tokens: Tokens, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Return the first examples of a split.

    Returns:
        id; tokens and loss_tokens (numbers); parts: [text, whether it carries a loss], in order;
        of a classification also its label.
    """
    found = []
    for index in range(min(count, len(tokens))):
        ids, spans = tokens.input_ids[index], tokens.spans[index]
        edges = [0, *spans, len(ids)]
        parts = [
            [tokenizer.decode(ids[begin:end]), number % 2 == 1]
            for number, (begin, end) in enumerate(itertools.pairwise(edges))
            if end > begin
        ]
        one: dict[str, Any] = {"id": tokens.ids[index], "tokens": len(ids), "parts": parts}
        one["loss_tokens"] = sum(
            end - begin for begin, end in zip(spans[::2], spans[1::2], strict=True)
        )
        if tokens.labels:
            one["label"] = tokens.labels[tokens.label_ids[index]]
        found.append(one)
    return found


def quantiles(tokens: Tokens) -> dict[str, int]:
    """Return how many tokens the examples of a split have, those left out as too long included."""
    lengths = tokens.all_lengths
    found = {f"{part:.0%}": int(np.quantile(lengths, part, method="higher")) for part in QUANTILES}
    return found | {"longest": tokens.longest}


def examples(shown: list[dict[str, Any]], lengths: dict[str, dict[str, int]]) -> None:
    """Print examples of train, and the lengths of every split.

    What carries a loss stands between ⟦ and ⟧, and in green where there are colours.
    """
    out = console()
    for number, one in enumerate(shown, 1):
        head = f"example {number} of data.train, {one['id']}: {one['tokens']} tokens"
        if "label" in one:
            head += f", label {one['label']!r}"
        else:
            head += f", {one['loss_tokens']} of them with a loss"
        out.print(head, style="bold")
        line = Text()
        for text, has_loss in one["parts"]:
            line.append(f"⟦{text}⟧" if has_loss else text, style="green" if has_loss else "")
        out.print(line, soft_wrap=True)
        out.print()
    for split, found in lengths.items():
        listed = ", ".join(f"{name} {tokens}" for name, tokens in found.items())
        out.print(f"lengths   data.{split}: {listed} tokens")
