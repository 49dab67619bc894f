"""Tables a person reads: rich on a terminal, the same text in a pipe, JSON on request."""

from lorabench.show.compared import comparison, nothing_asked
from lorabench.show.generated import answers
from lorabench.show.planned import plan
from lorabench.show.results import runs
from lorabench.show.text import dump

__all__ = ["answers", "comparison", "dump", "nothing_asked", "plan", "runs"]
