"""Which packs are compiled: by torch.compile, as one graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from lorabench.config import Config, ConfigErrors
from lorabench.plan import Plan
from lorabench.sweep.jobs import Job

if TYPE_CHECKING:
    from lorabench.sweep.needs import Needs


class Cost(NamedTuple):
    """What compiling costs and saves on a kind of device, measured by `benchmarks/compiling.py`."""

    seconds_a_call: float  # to compile, by calls of operators in the graph
    saved: float  # of a step's time


# From benchmarks/results/<device>-compiling.json: of packs whose runs share rank and batches, and
# of others, whose products are many small ones. What is not here was not measured yet: `auto`
# compiles nothing there.
COSTS: dict[tuple[str, Literal["alike", "mixed"]], Cost] = {
    ("cpu", "alike"): Cost(0.077, 0.09),
    ("cpu", "mixed"): Cost(0.189, 0.05),
}
CALLS_A_MODULE = 20  # of operators in the graph, for a module with an adapter and what is around it


def why_not(config: Config, plan: Plan) -> str | None:
    """The reason a run's pack cannot be compiled; None where it can."""
    if plan.alone is not None:
        return f"it trains alone: {plan.alone}"
    if config.task == "seq_cls":
        return "the body of a classifier is called with its pooling"
    if config.trainer.gradient_checkpointing:
        return "gradient checkpointing keeps its layers apart"
    if plan.lengths is not None and not plan.lengths.is_one_shape(config):
        return "its batches have different shapes, each of which would be compiled by itself"
    return None


def pays(jobs: Sequence[Job], device: str, needs: Needs) -> bool:
    """Whether compiling a pack of these runs is reckoned to save time, by the table of costs."""
    parts = {(job.config.lora.r, job.config.seeds.data) for job in jobs}
    cost = COSTS.get((device.partition(":")[0], "alike" if len(parts) == 1 else "mixed"))
    if cost is None or jobs[0].plan.lengths is None:
        return False
    modules = len({name for job in jobs for name in job.plan.lora_modules})
    spent = cost.seconds_a_call * CALLS_A_MODULE * modules
    if cost.saved * needs.seconds_at_most(jobs) <= spent:
        return False  # true of most small packs, and soon known
    return cost.saved * needs.seconds(jobs) > spent


def to_compile(
    jobs: list[Job], packs: list[list[int]], device: str, needs: Needs
) -> list[bool]:
    """Which packs are compiled, by `trainer.compile`.

    Raises:
        ConfigErrors: `always`, and one of its runs cannot be.
    """
    found, errors = [], []
    for members in packs:
        first = jobs[members[0]]
        wanted = first.config.trainer.compile
        reason = None if wanted == "never" else why_not(first.config, first.plan)
        if wanted == "always" and reason:
            errors.append(
                f"trainer.compile: always must be a pack that compiles once; {first.label}: "
                f"{reason}; use trainer.compile=auto or never"
            )
        compiles = wanted == "always"
        if wanted == "auto" and reason is None:
            compiles = pays([jobs[i] for i in members], device, needs)
        found.append(compiles)
    if errors:
        raise ConfigErrors(errors)
    return found
