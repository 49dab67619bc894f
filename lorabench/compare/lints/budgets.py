"""Lints of budgets: steps, batches, tokens and parameters of the settings compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorabench.compare.lints.design import Design, Lint, listed, span
from lorabench.compare.questions import Factor
from lorabench.record import Record

BUDGET = ("trainer.steps", "trainer.batch_size")
ABOUT = (*BUDGET, "trainer.patience")  # what asks about the amount of training itself
NAMES = {"tokens": "training tokens", "steps_done": "steps done"}
# Tokens of two data sets or tokenizers always differ a little, parameters of two target lists too.
MORE_TOKENS = 1.05
MORE_PARAMETERS = 1.1


def unequal_training(design: Design) -> list[Lint]:
    """Find compared settings that were trained for other steps, batches or tokens.

    A factor of steps or batch size alone asks about them and is none.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for factor, first, second in design.pairs:
        if set(factor.keys) <= set(ABOUT):
            continue
        pair = first, second
        keys = [key for key in BUDGET if len({repr(design.settings[i].get(key)) for i in pair}) > 1]
        ranges = {key: [design.settings[i][key] for i in pair] for key in keys}
        if steps := _unequal_steps(design, *pair):
            ranges["steps_done"] = list(steps)
        if tokens := _unequal_tokens(design, *pair):
            ranges["tokens"] = list(tokens)
        if ranges:
            entry = found.setdefault(tuple(ranges), {"names": {}, "settings": {}, "ranges": {}})
            entry["names"][factor.name] = None
            entry["settings"] |= dict.fromkeys(pair)
            for key, values in ranges.items():
                entry["ranges"].setdefault(key, []).extend(values)
    lints = []
    for unequal, entry in found.items():
        what = ", ".join(
            f"{NAMES.get(key, key)} {span(values)}" for key, values in entry["ranges"].items()
        )
        budget = [key for key in unequal if key in BUDGET]
        lints.append(
            Lint(
                "unequal-training",
                f"settings that differ in {listed(entry['names'])} were not trained alike "
                f"({what}): a difference may be the amount of training",
                f"give all of them the same {listed(budget)}"
                if budget
                else "trainer.patience stopped runs early: with trainer.patience=null and "
                "trainer.keep=best all of them train alike"
                if "steps_done" in unequal
                else "choose trainer.steps for each so that they train on as many tokens; "
                "`lorabench plan` shows them",
                design.ids(sorted(entry["settings"])),
            )
        )
    return lints


def _unequal_tokens(design: Design, first: int, second: int) -> tuple[float, float] | None:
    """Tokens of two settings whose runs with the same order of examples differ in them."""
    means = _means(design, first, second, _tokens)
    return means if means and max(means) > MORE_TOKENS * min(means) else None


def _unequal_steps(design: Design, first: int, second: int) -> tuple[float, float] | None:
    """Steps of two settings of which a run stopped early."""
    runs = [record for i in (first, second) for record in design.of_setting(i)]
    if not any(record.stopped_early for record in runs):
        return None
    means = _means(design, first, second, lambda record: record.steps_done)
    return means if means and means[0] != means[1] else None


def _means(
    design: Design, first: int, second: int, count: Callable[[Record], int]
) -> tuple[float, float] | None:
    """Mean counts of two settings, over the orders of examples that both have runs of."""
    one, other = (
        {record.seeds.get("data"): count(record) for record in design.of_setting(i)}
        for i in (first, second)
    )
    shared = [seed for seed in one if other.get(seed) and one[seed]]
    if not shared:
        return None
    means = tuple(sum(of[seed] for seed in shared) / len(shared) for of in (one, other))
    return means[0], means[1]


def _tokens(record: Record) -> int:
    """Training tokens of all steps; a record older than lengths knows those it counted."""
    if record.stopped_early:
        return record.cost.train_tokens
    return int((record.plan.get("lengths") or {}).get("tokens") or record.cost.train_tokens)


def unequal_parameters(design: Design) -> list[Lint]:
    """Find settings of other sizes compared where the question is not about the size itself."""
    names: dict[str, None] = {}
    settings: dict[int, None] = {}
    most = 1.0
    for factor, first, second in design.pairs:
        if _asks_about_size(factor):
            continue
        sizes = [_size(design, i) for i in (first, second)]
        ratio = max(sizes) / max(1, min(sizes))
        if ratio > MORE_PARAMETERS:
            names[factor.name] = settings[first] = settings[second] = None
            most = max(most, ratio)
    if not names:
        return []
    sizes = [_size(design, i) for i in settings]
    return [
        Lint(
            "unequal-parameters",
            f"settings that differ in {listed(names)} train up to {most:.2g} times as many "
            f"parameters ({span(sizes)}): a difference may be the number of parameters",
            "also compare settings of about equal size: sweep lora.r; the table shows trainable "
            "parameters",
            design.ids(sorted(settings)),
        )
    ]


def _size(design: Design, setting: int) -> int:
    """Trainable parameters of a setting."""
    return int(design.of_setting(setting)[0].plan["trainable_parameters"])


def _asks_about_size(factor: Factor) -> bool:
    """Whether a factor is the rank or the base: its levels are of other sizes by intent."""
    return any(
        key in ("lora.r", "lora.rank_pattern", "task") or key.startswith("model.")
        for key in factor.keys
    )
