"""A process that takes packs of a sweep under a lock, trains them, saves them and scores them.

asked     the runs of a command, and how far they are
work      which pack is next, who holds it, what a failure means for the others
training  planned runs -> saved adapters
scoring   saved adapters -> evaluations
untrained the base without an adapter, scored once per sweep
members   one run while its pack is at work: record, logs, checkpoints
shared    what packs share: the base, its tokenizer, the tokens
"""

from lorabench.worker.members import stale_checkpoints
from lorabench.worker.outcome import Outcome
from lorabench.worker.shared import Shared
from lorabench.worker.training import begin_from, make_pack
from lorabench.worker.work import Worker

__all__ = ["Outcome", "Shared", "Worker", "begin_from", "make_pack", "stale_checkpoints"]
