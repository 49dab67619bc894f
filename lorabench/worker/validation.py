"""Scores on validation while a pack trains: the best weights so far, and early stopping."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorabench import data, identity, interrupt, record
from lorabench.config import HIGHER_IS_BETTER, Config, TrainerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.worker.members import Member


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


class Validation:
    """Scores a pack on validation every `trainer.eval_every` steps."""

    def __init__(self, members: list[Member], pack: Any, tokens: data.Tokens, tokenizer: Any):
        self.members, self.pack, self.tokenizer = members, pack, tokenizer
        config = members[0].job.config  # runs of a pack share what decides this
        self.trainer, self.metrics = config.trainer, ["nll"]
        self.selects = identity.selects(dataclasses.asdict(config.trainer))
        if self.selects:
            self.metrics = list(dict.fromkeys(["nll", config.objective.partition("/")[2]]))
        self.settings = dataclasses.replace(config.data, metric=self.metrics)
        limit = config.trainer.eval_examples
        self.tokens = tokens if limit is None else tokens.first(limit)

    def after(self, step: int) -> None:
        """Score if it is time to, note what was found, and stop runs that have waited too long."""
        if not is_due(self.trainer, step, self.selects):
            return
        waiting = [m for m in self.members if m.is_training and m.watch.evaluated < step]
        if not waiting:
            return
        from lorabench.evaluate import scored, summarise

        tables = scored(
            self.pack, self.tokens, self.tokenizer, data.pad_id(self.tokenizer), self.settings,
            self.trainer.eval_batch_size,
        )  # fmt: skip
        with interrupt.whole():
            for member in waiting:
                found = summarise(tables[member.slot], self.metrics)
                self._note(member, step, {name: found[name][0] for name in self.metrics})

    def _note(self, member: Member, step: int, values: dict[str, float]) -> None:
        member.log(step, {f"validation/{name}": value for name, value in values.items()})
        watch = member.watch
        watch.evaluated = step
        if not self.selects:
            return
        if watch.see(step, values[watch.objective.partition("/")[2]]):
            member.entry.best = watch.best
            if self.trainer.keep == "best":
                watch.weights = weights_of(self.pack, member.slot)
        if step < self.trainer.num_steps and (why := watch.why_stop()):
            member.entry.stopped_early = f"{why}; stopped after step {step}"
            self.pack.stop(member.slot)


def is_due(trainer: TrainerConfig, step: int, selects: bool) -> bool:
    """Whether validation is scored after this step.

    After the last step only a run that selects needs it: scores are made of every saved adapter.
    """
    if step >= trainer.num_steps:
        return selects
    return trainer.eval_every > 0 and step % trainer.eval_every == 0


def weights_of(pack: Any, slot: int) -> dict[str, Tensor]:
    """Copy what a run trains to the CPU, without the optimizer's moments."""
    state = pack.state(slot)
    return {name: one.cpu().clone() for name, one in state.items() if "|" not in name}


def put_back(pack: Any, slot: int, weights: dict[str, Tensor]) -> None:
    """Give a run the weights that `weights_of` copied."""
    state = pack.state(slot)  # detached views of the run's own storage
    for name, one in weights.items():
        state[name].copy_(one)
