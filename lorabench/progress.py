"""What the user sees while a sweep runs: a live bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Display:
    """Progress of the runs of one command; lines go to stderr, results to stdout."""

    def __init__(self, num_runs: int, steps_total: int):
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.num_runs, self.steps_total = num_runs, steps_total
        self.steps_done = 0
        self.runs_done = 0
        self.started = time.monotonic()
        self.live: Progress | None = None
        self.bar: TaskID | None = None
        self.last_line = 0.0

    def __enter__(self) -> Display:
        if self.console.is_terminal and self.num_runs:
            self.live = Progress(
                TextColumn("{task.fields[runs]}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                console=self.console,
                transient=True,
            )
            self.bar = self.live.add_task("", total=self.steps_total, runs="", text="starting")
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
        sys.stderr.flush()

    def step(
        self, label: str, step: int, steps: int, loss: float, tokens_per_second: float
    ) -> None:
        """A run has done `step` of its `steps`."""
        self.steps_done += 1
        elapsed = time.monotonic() - self.started
        left = clock(elapsed / self.steps_done * (self.steps_total - self.steps_done))
        text = (
            f"step {step}/{steps}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {left} left"
        )
        if self.live is not None and self.bar is not None:
            runs = f"run {self.runs_done + 1}/{self.num_runs}"
            self.live.update(
                self.bar, completed=self.steps_done, runs=runs, text=f"{text}  {label}"
            )
        elif time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            self.say(f"  {label}: {text}")

    def skip(self, steps: int) -> None:
        """Steps that will not be done (resumed, failed or stopped runs)."""
        self.steps_total = max(self.steps_done + 1, self.steps_total - steps)
        if self.live is not None and self.bar is not None:
            self.live.update(self.bar, total=self.steps_total)

    def done(self, label: str, text: str) -> None:
        """A run has ended."""
        self.runs_done += 1
        self.say(f"run {self.runs_done}/{self.num_runs}  {label}  {text}")
