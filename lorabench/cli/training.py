"""The verbs that plan: train and plan."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorabench.cli.composing import (
    compose,
    conf_folder,
    refuse_values,
    register,
    say_if_sweep,
)
from lorabench.cli.mistakes import fail

PLAN_FLAGS = ("-m", "--multirun", "--json", "--smoke", "-h", "--help")


class Train:
    """The task Hydra runs: one config alone, or packs under the packed launcher."""

    __module__ = "lorabench.cli"

    def __init__(self) -> None:
        self.outcomes: list[Any] = []
        self.jobs: list[Any] = []
        self.refused: list[str] = []  # what was wrong with runs that Hydra started one by one
        self.kept: dict[int, dict[str, Any]] = {}  # results of jobs that are not trained, by job
        self.twins: dict[int, list[int]] = {}  # grid points that are the same run, by the first

    def __call__(self, cfg: Any) -> dict[str, Any]:
        """One run by itself, or under another launcher than packed."""
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        overrides = []
        if HydraConfig.initialized():
            overrides = HydraConfig.get().overrides.task
            if HydraConfig.get().mode is RunMode.RUN:
                say_if_sweep(HydraConfig.get())
        kept, packs = self.plan([cfg], [" ".join(overrides) or "defaults"])
        return kept[0] if kept else self.run(packs[0])[0]

    def plan(
        self, configs: list[Any], labels: list[str], pack_size: int = 1
    ) -> tuple[dict[int, dict[str, Any]], list[list[int]]]:
        """All jobs planned: results that need no training, and packs of those that do.

        A grid point that is the same run as another gets its result in `run`, after its twin.
        """
        import dataclasses

        from lorabench import runner, sweep
        from lorabench.config import ConfigErrors

        self.jobs = sweep.plan_jobs(configs, labels)
        self.kept, self.twins = {}, {}
        todo, first = [], {}
        for i, job in enumerate(self.jobs):
            outcome = sweep.earlier(job)
            if outcome is not None:
                self.kept[i] = dataclasses.asdict(outcome)
                self.outcomes.append(outcome)
            elif job.plan.run_id not in first:
                first[job.plan.run_id] = i
                todo.append(i)
            else:
                self.twins.setdefault(first[job.plan.run_id], []).append(i)
        runner.check_data([self.jobs[i] for i in todo])
        packs = self._packs(todo, pack_size)
        if stale := runner.stale_checkpoints([[self.jobs[i] for i in pack] for pack in packs]):
            raise ConfigErrors(stale)
        self._display(todo)
        gc.freeze()  # what came so far stays: later collections need not look at it
        gc.enable()
        return self.kept, packs

    def _packs(self, todo: list[int], limit: int) -> list[list[int]]:
        """Which of the jobs to train do so together."""
        from lorabench import machine, sweep

        if not todo:
            return []
        jobs = [self.jobs[i] for i in todo]
        memory = machine.free_memory(machine.choose_device(jobs[0].config.trainer.device))
        return [[todo[i] for i in pack] for pack in sweep.form_packs(jobs, limit, memory)]

    def _display(self, todo: list[int]) -> None:
        from lorabench import sweep
        from lorabench.progress import Display

        self.display = Display(len(todo), sum(self.jobs[i].config.trainer.steps for i in todo))
        kept = [sweep.Outcome(**found) for found in self.kept.values()]
        if len(self.jobs) > len(todo):
            same = len(self.jobs) - len(todo) - len(self.kept)
            busy = sum(outcome.status == "running" for outcome in kept)
            self.display.say(
                f"{len(self.kept) - busy} of {len(self.jobs)} runs are kept from before, "
                f"{len(todo)} to train"
                + (f", {busy} in training by another process" if busy else "")
                + (f", {same} the same as another" if same else "")
            )
        for outcome in kept:
            if names := sweep.lacking(outcome):
                self.display.say(
                    f"{outcome.label}: kept without {' and '.join(names)}, which "
                    f"{'are' if len(names) > 1 else 'is'} gone; "
                    f"remove {outcome.folder} to train it again"
                )

    def run(self, members: list[int]) -> list[dict[str, Any]]:
        """Train one pack."""
        import dataclasses

        from lorabench import runner

        with self.display:
            outcomes = runner.run_pack([self.jobs[i] for i in members], self.display)
            for i, outcome in zip(members, outcomes, strict=True):
                for twin in self.twins.get(i, ()):
                    label = self.jobs[twin].label
                    again = dataclasses.replace(outcome, label=label, kept=True)
                    self.kept[twin] = dataclasses.asdict(again)
                    self.display.say(f"{label}  {outcome.status}: the same run as {outcome.label}")
        self.outcomes += outcomes
        return [dataclasses.asdict(outcome) for outcome in outcomes]


def train(arguments: list[str]) -> int:
    """lorabench train [-m] OVERRIDES"""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import hydra

    from lorabench import interrupt
    from lorabench.config import ConfigErrors

    interrupt.install()
    refuse_values(arguments)
    gc.disable()  # until all is planned: a second of searching objects that have come to stay
    register()
    task = Train()
    function = _function(task)
    # argparse refuses overrides on both sides of a flag, which `plan` takes
    flags = [a for a in arguments if a in ("-m", "--multirun")]
    sys.argv = ["lorabench", *flags[:1], *(a for a in arguments if a not in flags)]
    loud = logging.raiseExceptions
    logging.raiseExceptions = False  # a log on a full disk, ours or W&B's, is no traceback
    try:
        hydra.main(config_path=conf_folder(), config_name="train", version_base="1.3")(function)()
    finally:
        gc.unfreeze()
        gc.enable()
        logging.raiseExceptions = loud
    if task.refused:
        raise ConfigErrors(task.refused)
    return _closing(task.outcomes)


def _function(task: Train) -> Callable[[Any], Any]:
    """A plain function, which Hydra wants, carrying the packed launcher's two calls."""

    from lorabench.config import ConfigErrors

    def train_task(cfg: Any) -> Any:
        try:
            return task(cfg)
        except ConfigErrors as error:  # raised in the job, Hydra would write a line of its own
            task.refused += error.errors
            return None

    train_task.plan = task.plan  # type: ignore[attr-defined]
    train_task.run = task.run  # type: ignore[attr-defined]
    return train_task


def _closing(outcomes: list[Any]) -> int:
    """The last lines of a command, and its exit code."""
    if not outcomes:
        return 0  # --cfg, --info, ...: Hydra has printed what was asked for
    folders = {str(Path(outcome.folder).parent) for outcome in outcomes}
    bad = [outcome for outcome in outcomes if outcome.status in ("failed", "running")]
    for outcome in outcomes:
        if outcome.status == "stopped":
            print(f"{outcome.label}: {outcome.error} ({outcome.folder})", file=sys.stderr)
    if bad:
        lines = [f"{len(bad)} of {len(outcomes)} runs did not finish:"]
        lines += [f"  {o.label or 'run'} ({o.folder}): {o.status}: {o.error}" for o in bad]
        return fail(lines, 1)
    for folder in sorted(folders):
        print(
            f"{folder}: {len(outcomes)} of {len(outcomes)} runs done; lorabench compare {folder}",
            file=sys.stderr,
        )
    return 0


def plan(arguments: list[str]) -> int:
    """lorabench plan [-m] [--json] [--smoke] OVERRIDES"""
    unknown = [a for a in arguments if a.startswith("-") and a not in PLAN_FLAGS]
    if unknown:
        from lorabench.config import did_you_mean

        config = "; `lorabench train --cfg job` prints the config" if "--cfg" in unknown else ""
        return fail(
            [
                f"plan: a flag must be one of {', '.join(PLAN_FLAGS)}; "
                f"got {did_you_mean(unknown[0], PLAN_FLAGS)}{config}"
            ]
        )
    from lorabench import machine, show, sweep

    as_json = "--json" in arguments
    if "-h" in arguments or "--help" in arguments:
        print(
            "lorabench plan [-m] [--json] [--smoke] KEY=VALUE ...\n\n"
            "what `lorabench train` with the same words would do\n\n"
            "--json   the same for programs, with every adapted module\n"
            "--smoke  also two steps of every pack on two examples, in each of its stages, and\n"
            "         its adapters reloaded; exit code 1 where that fails"
        )
        return 0
    words = [a for a in arguments if a not in ("--json", "--smoke")]
    composed = compose(words)
    if not {"-m", "--multirun"} & set(words):
        say_if_sweep(composed.hydra)
    planned = sweep.plan_jobs(composed.configs, composed.labels)
    first: dict[str, Any] = {}
    for job in planned:
        first.setdefault(job.plan.run_id, job)
    jobs = list(first.values())
    memory = machine.free_memory(machine.choose_device(jobs[0].config.trainer.device))
    limit = composed.hydra.launcher.get("pack_size", 1)  # 1 under another launcher than packed
    packs = sweep.form_packs(jobs, limit, memory)
    attempts: list[Any] = []

    def tried() -> Iterator[Any]:
        from lorabench import smoke

        for members in packs:
            attempts.append(smoke.attempt([jobs[i] for i in members]))
            yield attempts[-1]

    if len(jobs) < len(planned) and not as_json:
        print(f"{len(planned)} grid points, {len(planned) - len(jobs)} the same run as another")
    show.plan(jobs, packs, as_json, tried() if "--smoke" in arguments else ())
    return 1 if any(attempt.error is not None for attempt in attempts) else 0
