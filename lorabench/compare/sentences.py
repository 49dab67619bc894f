"""verdicts -> sentences that need no statistics to read."""

from __future__ import annotations

import math

from lorabench.compare.judging import Verdict
from lorabench.compare.questions import told


def sentence(one: Verdict) -> str:
    """Found, not settled, or no worse than X; with its interval, and what would settle it.

    Where retention was scored, what is said of test is never said without it.
    """
    if one.retention is None:
        return _alone(one, one.metric)
    return _beside(one, one.retention) + _at_looks(one, one.retention)


def _alone(one: Verdict, unit: str) -> str:
    """The sentence of one verdict.

    Args:
        unit: what the difference is of, such as nll.
    """
    question = one.question
    better, where = told(question.factor, one.better), question.where
    if one.outcome == "no verdict" and not one.seeds:
        return f"{question.name}: no verdict, because {one.why}"
    if one.outcome == "no verdict":
        low, high, gain = numbers(one.plain_low, one.plain_high, one.gain)
        return (
            f"{better} has the better {unit} by {gain} [{low}, {high}, over examples "
            f"alone]{where}: no verdict, because one seed does not tell how much seeds matter"
        )
    return _of_several_seeds(one, unit) + ("" if one.retention else _at_look(one))


def _beside(one: Verdict, kept: Verdict) -> str:
    """What was found on test and on retention, side by side."""
    factor = one.question.factor
    better, worse = told(factor, one.better), told(factor, one.worse)
    test, unit = f"test {one.metric}", f"{kept.split} {kept.metric}"
    both = one.outcome in ("found", "trade-off") and kept.outcome == "found"
    if not both:
        return f"{_alone(one, test)}; {_of_retention(kept, unit)}"
    low, high, gain = numbers(one.low, one.high, one.gain)
    kept_low, kept_high, kept_gain = numbers(kept.low, kept.high, kept.gain)
    if one.outcome == "trade-off":
        return (
            f"{better} gains {gain} {test} [{low}, {high}] over {worse} and forgets more, "
            f"{kept_gain} {unit} [{kept_low}, {kept_high}]{one.question.where}: a trade-off"
        )
    return (
        f"{better} beats {worse} by {gain} {test} [{low}, {high}] and forgets less, by "
        f"{kept_gain} {unit} [{kept_low}, {kept_high}]{one.question.where}"
    )


def _of_retention(kept: Verdict, unit: str) -> str:
    """The second half of a sentence: what is known of forgetting."""
    factor = kept.question.factor
    better, worse = told(factor, kept.better), told(factor, kept.worse)
    if kept.outcome == "no verdict" and not kept.seeds:
        return f"on retention there is no verdict, because {kept.why}"
    if kept.outcome == "no verdict":
        low, high, gain = numbers(kept.plain_low, kept.plain_high, kept.gain)
        return f"{better} has the better {unit} by {gain} [{low}, {high}, over examples alone]"
    if kept.is_identical and kept.outcome == "not settled":
        return f"{unit} is identical on all {kept.examples:,} examples"
    low, high, gain = numbers(kept.low, kept.high, kept.gain, apart=(kept.margin,))
    if kept.outcome == "found":
        return f"{better} forgets less than {worse}, by {gain} {unit} [{low}, {high}]"
    if kept.outcome == "no worse":
        margin = f"{kept.margin:g} {unit}"
        if len(kept.no_worse) == 2:
            text = f"what they forget differs by less than {margin}"
        else:
            forgets = told(factor, kept.no_worse[0])
            text = f"{forgets} does not forget more by {margin}"
        return f"{text}: the difference is {gain} [{low}, {high}]"
    return (
        f"which of them forgets more is not settled, {better} less by {gain} {unit} "
        f"[{low}, {high}]{_settling(kept)}"
    )


def _of_several_seeds(one: Verdict, unit: str) -> str:
    question = one.question
    better, worse = (told(question.factor, level) for level in (one.better, one.worse))
    where = question.where
    if one.is_identical and one.outcome == "not settled":
        return (
            f"{better} and {worse}{where}: {unit} is identical on all {one.examples:,} examples "
            f"of {len(one.seeds)} seeds"
        )
    low, high, gain = numbers(one.low, one.high, one.gain, apart=(one.margin,))
    if one.outcome == "found":
        return f"{better} beats {worse} by {gain} {unit} [{low}, {high}]{where}{_within(one)}"
    if one.outcome == "no worse":
        margin = f"{one.margin:g} {unit}"
        if len(one.no_worse) == 2:
            text = f"{better} and {worse} differ by less than {margin}"
        else:
            text = f"{told(question.factor, one.no_worse[0])} is no worse than "
            other = worse if one.no_worse[0] == one.better else better
            text += f"{other} by more than {margin}"
        return f"{text}{where}: the difference is {gain} [{low}, {high}]"
    return (
        f"{better} against {worse}{where}: the difference, {gain} {unit} [{low}, {high}], is not "
        f"settled{_settling(one)}"
    )


def _at_look(one: Verdict) -> str:
    """Such as " (look 1 of 2, at 4 seeds)"; nothing for a sweep that is looked at once."""
    if one.look is None:
        return ""
    return f" (look {one.look} of {one.looks}, at {len(one.seeds)} seeds)"


def _at_looks(one: Verdict, kept: Verdict) -> str:
    """The same of both splits; each is answered at the look that settles it."""
    if _at_look(one) == _at_look(kept) or kept.outcome == "no verdict":
        return _at_look(one)
    test, retention = (_at_look(each).strip(" ()") for each in (one, kept))
    return f" (test: {test}; retention: {retention})"


def _within(one: Verdict) -> str:
    """What a found difference says of a margin."""
    if one.margin is None or one.worse not in one.no_worse:
        return ""
    return f", which is less than {one.margin:g}"


def _settling(one: Verdict) -> str:
    if one.more_seeds is None or one.settles is None:
        return f": {hopeless(one)}"
    seeds = f"{one.more_seeds} more seed{'s' if one.more_seeds > 1 else ''}"
    (size,) = numbers(one.settles)
    return f": {seeds} would settle {size}"


def hopeless(one: Verdict) -> str:
    """What would settle a question that more seeds do not."""
    if one.more_examples is None:
        return "neither more seeds nor more test examples would settle what was seen"
    return (
        f"more seeds would not settle it, {one.more_examples:,} test examples in place of "
        f"{one.examples:,} might"
    )


def numbers(*values: float, apart: tuple[float | None, ...] = ()) -> tuple[str, ...]:
    """Numbers with one more decimal than the first that tells the largest from the smallest.

    Further decimals are shown until no number is rounded onto zero or one of `apart`, unless it is
    equal to it.
    """
    finite = [abs(value) for value in values if math.isfinite(value)]
    if len(values) > 1 and len(finite) == len(values):
        scale = max(values) - min(values)
    else:
        scale = max(finite, default=0.0)
    if scale <= 0:
        scale = max(finite, default=0.0)
    decimals = 2 if scale <= 0 else min(9, max(0, 1 - math.floor(math.log10(scale))))
    marks = [0.0, *(sign * mark for mark in apart if mark for sign in (1, -1))]
    while decimals < 9 and any(
        value != mark and round(value, decimals) == round(mark, decimals)
        for value in values
        for mark in marks
        if math.isfinite(value)
    ):
        decimals += 1
    return tuple(_plain(f"{value:.{decimals}f}") for value in values)


def _plain(text: str) -> str:
    """No minus before zero."""
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text
