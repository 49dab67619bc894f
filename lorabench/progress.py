"""What the user sees while a sweep runs: a live view on a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Terminal(Console):
    """stderr; once it is closed or full, nothing is shown any more, and the runs go on."""

    def on_broken_pipe(self) -> None:  # rich's own ends the process
        self.quiet = True

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
            self.file.flush()
        except OSError:
            self.quiet = True


class Display:
    """Progress of the runs of one command; it goes to stderr, results to stdout."""

    def __init__(self, num_runs: int, steps_total: int):
        self.console = Terminal(stderr=True, highlight=False, soft_wrap=True)
        self.num_runs, self.steps_total = num_runs, steps_total
        self.steps_done = 0  # of all runs that have ended, and of this pack
        self.counted = 0  # of them, those done by this command since `started`
        self.runs_done = 0
        self.labels: list[str] = []
        self.started = 0.0  # when the first step had ended: start-up says nothing of the rest
        self.live: Live | None = None
        self.last_line = 0.0

    def __enter__(self) -> Display:
        if self.console.is_terminal and self.num_runs:
            self.live = Live(console=self.console, transient=True, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False)

    def resumed(self, steps: int) -> None:
        """Steps that an earlier command has done."""
        self.steps_done += steps

    def pack(self, labels: list[str]) -> None:
        """These runs train now."""
        self.labels = labels
        self.done_before = self.steps_done

    def step(self, step: int, steps: int, losses: list[float], tokens_per_second: float) -> None:
        """The runs of the pack have done `step` of their `steps`."""
        self.steps_done += len(losses)
        tail = f"{tokens_per_second:,.0f} tokens/s"
        if not self.started:
            self.started = time.monotonic()
        else:
            self.counted += len(losses)
            each = (time.monotonic() - self.started) / self.counted
            tail += f"  {clock(each * max(0, self.steps_total - self.steps_done))} left"
        first = self.runs_done + 1
        runs = (
            f"run {first}" if len(losses) == 1 else f"runs {first}-{self.runs_done + len(losses)}"
        )
        head = f"{runs} of {self.num_runs}  step {step}/{steps}"
        if self.live is not None:
            self.live.update(self._view(head, tail, losses))
        elif time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            spread = f"{min(losses):.4f}"
            if len(losses) > 1:
                spread += f" to {max(losses):.4f}"
            self.say(f"  {head}  loss {spread}  {tail}")

    def _view(self, head: str, tail: str, losses: list[float]) -> Group:
        bar = Table.grid(padding=(0, 2))
        progress = ProgressBar(total=self.steps_total, completed=self.steps_done, width=30)
        bar.add_row(Text(head), progress, Text(tail))
        table = Table.grid(padding=(0, 2))
        for label, loss in zip(self.labels, losses, strict=True):
            table.add_row(Text(f"  {label}", style="dim"), Text(f"loss {loss:.4f}"))
        return Group(bar, table)

    def done(self, label: str, text: str) -> None:
        """A run has ended, one way or another."""
        self.runs_done += 1
        self.say(f"run {self.runs_done}/{self.num_runs}  {label}  {text}")
