"""Reasons why a comparison of runs may mislead, each with its remedy. Imports without torch.

design     the runs by setting, and what varies
scales     how much an update counts; ranks above a module's size
rates      learning rates
budgets    steps, batches, tokens, parameters
evidence   seeds and test examples that verdicts rest on
origins    stacks, data and evaluations that runs come from
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.compare.lints import budgets, evidence, origins, rates, scales
from lorabench.compare.lints.design import Design, Lint
from lorabench.record import Record

if TYPE_CHECKING:
    from lorabench.compare.answers import Answers

__all__ = ["Lint", "is_linted", "lints"]

# What makes a comparison void comes first, then what else differs, then what is only weak.
CHECKS = (
    origins.mixed_evaluations,
    origins.mixed_data,
    origins.mixed_arithmetic,
    origins.mixed_stacks,
    evidence.test_in_train,
    evidence.selection_seeds,
    scales.scale_with_rank,
    scales.rslora_beside_plain,
    rates.lr_edge,
    rates.one_rate,
    budgets.unequal_training,
    budgets.unequal_parameters,
    scales.rank_above_module,
    evidence.one_seed,
    evidence.few_examples,
)


def lints(runs: Sequence[tuple[Path, Record]], answers: Answers | None = None) -> list[Lint]:
    """Return what makes a comparison of these runs misleading, each finding once for all its runs.

    Args:
        runs: folders and records, such as from `lorabench.record.find`; those that have not
            finished are not compared.
        answers: `lorabench.compare.verdicts` of the same runs: lints of a key that was chosen on
            validation are left out, and questions that lack examples are named.
    Raises:
        ConfigErrors: a sweep.json beside the runs is damaged.
    """
    design = Design.of(runs, answers)
    return [lint for check in CHECKS for lint in check(design)]


def is_linted(note: str) -> bool:
    """Whether a note of a record is the source of a lint, which says the same."""
    return bool(scales.NARROW.match(note) or evidence.OVERLAP.match(note))
