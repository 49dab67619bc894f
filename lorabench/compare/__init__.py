"""Records and predictions -> a table, questions and verdicts. Imports without torch.

tables       one row per setting, its values over seeds
questions    what varies, and what can be asked of it
scores       per-example scores, paired; scored: those of a sweep, by setting and seed
statistics   what seeds and examples can tell: tests and intervals
power        what so many seeds and examples find; outlook: what a planned sweep will tell
selection    a value chosen on validation; looks: a sweep that seeds are added to
judging      every question answered, at most 5% of commands with a false answer
sentences    verdicts as people read them
ranks        where a setting may stand among all
answers      all of it for the runs of a sweep
lints        what makes a comparison misleading, and the remedy
foreign      results of PEFT's own benchmark as rows of the table; peft_results reads one file
"""

from typing import TYPE_CHECKING, Any

from lorabench.compare.tables import other_stack, spread, table, usual_stack
from lorabench.config import HIGHER_IS_BETTER

if TYPE_CHECKING:
    from lorabench.compare.answers import Answers, verdicts

__all__ = [
    "HIGHER_IS_BETTER",
    "Answers",
    "other_stack",
    "spread",
    "table",
    "usual_stack",
    "verdicts",
]


def __getattr__(name: str) -> Any:
    """`verdicts` needs numpy and scipy, which the table does not."""
    if name in ("Answers", "verdicts"):
        from lorabench.compare import answers

        return getattr(answers, name)
    raise AttributeError(name)
