"""One pack from its plan to its finished records."""

from lorabench.runner.members import pack_id, stale_checkpoints
from lorabench.runner.run import make_pack, run_pack
from lorabench.runner.shared import SHARED, Shared, check_data

__all__ = [
    "SHARED",
    "Shared",
    "check_data",
    "make_pack",
    "pack_id",
    "run_pack",
    "stale_checkpoints",
]
