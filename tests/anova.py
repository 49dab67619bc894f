"""statsmodels' answers to the questions of a table of differences; imported when asked: 4 s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def mean_squares(table: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean squares and degrees of freedom of seeds, examples and the rest of a table, (S, N)."""
    import pandas as pd
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    seeds, examples = table.shape
    long = pd.DataFrame(
        [(s, e, table[s, e]) for s in range(seeds) for e in range(examples)],
        columns=["seed", "example", "d"],
    )
    found = anova_lm(ols("d ~ C(seed) + C(example)", long).fit(), typ=1)
    return (found["sum_sq"] / found["df"]).tolist(), found["df"].tolist()


def holm(p: Sequence[float] | np.ndarray) -> tuple[Any, Any]:
    """Which are rejected at 5%, and the adjusted p-values."""
    from statsmodels.stats.multitest import multipletests

    rejected, adjusted, *_ = multipletests(p, 0.05, method="holm")
    return rejected, adjusted
