"""What one run has found on validation: its best value so far, and whether it waits too long."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorabench import record
from lorabench.config import HIGHER_IS_BETTER, Config

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Watch:
    """What one run has found on validation so far.

    A value is better only if it is strictly better than the best before; one that is not finite
    never is. With `patience` evaluations in a row that are not better, the run is to stop.
    Source: transformers' EarlyStoppingCallback with early_stopping_threshold=0.
    """

    objective: str  # validation/METRIC
    patience: int | None
    best: record.Best | None = None
    waited: int = 0  # evaluations since the best one
    evaluated: int = 0  # step of the last evaluation
    weights: dict[str, Tensor] = field(default_factory=dict)  # of the best step, with keep=best

    @classmethod
    def of(cls, config: Config) -> Watch:
        return cls(config.objective, config.trainer.patience)

    def see(self, step: int, value: float) -> bool:
        """Take in the value of a step, and say whether it is the best so far."""
        sign = -1 if self.objective.partition("/")[2] in HIGHER_IS_BETTER else 1
        better = math.isfinite(value) and (
            self.best is None or sign * value < sign * self.best.value
        )
        if better:
            self.best = record.Best(step=step, metric=self.objective, value=value)
        self.waited = 0 if better else self.waited + 1
        return better

    def why_stop(self) -> str | None:
        """Why the run is to stop, or None."""
        if self.patience is None or self.waited < self.patience:
            return None
        since = f"since step {self.best.step}" if self.best else "so far"
        return f"no better {self.objective} in {self.waited} evaluations, {since}"

    def told(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the weights."""
        best = self.best and self.best.model_dump()
        return {"best": best, "waited": self.waited, "evaluated": self.evaluated}

    def resume(self, told: dict[str, Any]) -> None:
        """Continue from what `told` returned."""
        self.best = record.Best(**told["best"]) if told["best"] else None
        self.waited, self.evaluated = told["waited"], told["evaluated"]
