"""Whether contenders did the same work, and how their times compare."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

SAME_STEPS = 10  # steps over which the losses of (a) and (d) must agree
# Of the loss. Rounding alone separates equal runs: where a step overshoots and the gradient turns
# fast, the float32 losses of (a) are up to 6e-3 off its own float64 ones (`rounding_of_a` in the
# result). A wrong scale, seed, batch or rate shows as 1e-2 in the first steps.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}


def agreement(
    expected: dict[str, list[float]], found: dict[str, list[float]], dtype: str
) -> dict[str, Any]:
    """Whether every run has the reference's losses, step by step, within rounding.

    Differences are relative to the reference's loss.
    """
    gaps = [
        abs(x - y) / x
        for run, losses in expected.items()
        for x, y in itertools.zip_longest(losses, found.get(run, []), fillvalue=float("inf"))
    ]
    worst = max(gaps, default=float("inf"))
    agree = bool(gaps) and all(gap <= TOLERANCE[dtype] for gap in gaps)  # false for NaN
    return {"largest_difference": worst, "tolerance": TOLERANCE[dtype], "agree": agree}


def ratio(
    others: list[float], mine: list[float], other_tokens: int = 1, my_tokens: int = 1
) -> float:
    """Return the median over repeats of how many times faster than the other.

    Args:
        other_tokens, my_tokens: Real tokens trained on. Contenders with other batches see more or
            fewer of them in as many steps, so seconds are compared per token.
    """
    times = statistics.median(x / y for x, y in zip(others, mine, strict=True))
    return times * my_tokens / other_tokens


def rates(row: dict, tokens: int, seconds: float, parameters: int, result: dict) -> None:
    """Non-pad tokens a second, and the share of the machine's peak at 4 x parameters a token."""
    row["tokens_per_second"] = tokens / seconds
    peak = result["peak_matmul_flops_per_second"]
    row["share_of_peak"] = 4 * parameters * tokens / seconds / peak


def matmul_bound(parameters: int, tokens: int, peak: float) -> float:
    """Return the seconds that the frozen base's matrix products alone would take.

    Two FLOPs per parameter and token forward, two backward to the inputs; frozen weights get no
    gradient.

    Args:
        parameters: Those of the linear layers, the head included.
        peak: FLOPs per second.
    """
    return 4 * parameters * tokens / peak


def all_agree(result: dict[str, Any]) -> bool:
    """Return whether every contender that sees the batches of (a) has its first losses.

    `losses_as_a` is None where nothing can be compared: other batches, or (a) was not asked for.
    """
    groups = [result.get("contenders", {})]
    groups += [case.get("packs", {}) for case in result.get("cases", {}).values()]
    checks = [row["losses_as_a"] for rows in groups for row in rows.values()]
    return all(check is None or check["agree"] for check in checks)
