"""Scores on validation while a pack trains: the best weights so far, and early stopping."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lorabench import data, identity, interrupt
from lorabench.config import TrainerConfig
from lorabench.worker.members import Member

if TYPE_CHECKING:
    from torch import Tensor


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
