"""The body of a model, forward and backward, as one graph of torch.compile.

The head is not in it: its gradient is made in the forward, chunk by chunk (head.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorabench.config import first_line


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
