"""Which packs compile the body of the model, forward and backward, as one graph.

The head is not in that graph: its gradient is made in the forward, chunk by chunk (head.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lorabench.config import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorabench.config import Config
    from lorabench.needs import Needs
    from lorabench.plan import Plan
    from lorabench.sweep import Job


class Cost(NamedTuple):
    """What compiling costs and saves on a kind of device, measured by `benchmarks/compiling.py`."""

    seconds_a_call: float  # to compile, by calls of operators in the graph
    saved: float  # of a step's time


# benchmarks/results/<device>-compiling.json. A kind that is not here was not measured: `auto`
# compiles nothing there.
COSTS = {"cpu": Cost(seconds_a_call=0.07, saved=0.05)}
CALLS_A_MODULE = 12  # of operators in the graph, for a module with an adapter and what is around it


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
    cost = COSTS.get(device.partition(":")[0])
    if cost is None or jobs[0].plan.lengths is None:
        return False
    modules = len({name for job in jobs for name in job.plan.lora_modules})
    return cost.saved * needs.seconds(jobs) > cost.seconds_a_call * CALLS_A_MODULE * modules


def compiled(body: Any) -> Callable[..., Any]:
    """The body as one graph of fixed shapes.

    Raises:
        RuntimeError: when it is called, and cannot be compiled: no compiler is there, say.
    """
    import torch

    graph = torch.compile(body, fullgraph=True, dynamic=False)

    def call(**inputs: Any) -> Any:
        try:
            return graph(**inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            inner = getattr(error, "inner_exception", error)
            raise RuntimeError(
                f"torch.compile failed here ({type(inner).__name__}: {first_line(inner)}); set "
                f"trainer.compile=never"
            ) from error

    return call
