"""The verbs that plan: train and plan."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorabench.cli.composing import compose, conf_folder, refuse_values, register
from lorabench.cli.mistakes import fail


class Train:
    """The task Hydra runs: one config alone, or packs under the packed launcher."""

    __module__ = "lorabench.cli"

    def __init__(self) -> None:
        self.outcomes: list[Any] = []
        self.jobs: list[Any] = []

    def __call__(self, cfg: Any) -> dict[str, Any]:
        """One run by itself, or under another launcher than packed."""
        from hydra.core.hydra_config import HydraConfig

        overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
        kept, packs = self.plan([cfg], [" ".join(overrides) or "defaults"])
        return kept[0] if kept else self.run(packs[0])[0]

    def plan(
        self, configs: list[Any], labels: list[str], pack_size: int = 1
    ) -> tuple[dict[int, dict[str, Any]], list[list[int]]]:
        """All jobs planned: results kept from earlier commands, and packs of those to train."""
        import dataclasses

        from lorabench import runner, sweep
        from lorabench.config import ConfigErrors

        self.jobs = sweep.plan_jobs(configs, labels)
        kept, todo = {}, []
        first: dict[str, int] = {}
        for i, job in enumerate(self.jobs):
            outcome = sweep.earlier(job)
            if outcome is not None:
                kept[i] = dataclasses.asdict(outcome)
                self.outcomes.append(outcome)
            elif job.plan.run_id not in first:
                first[job.plan.run_id] = i
                todo.append(i)
            else:  # two grid points that are the same run
                outcome = sweep.Outcome(
                    job.plan.run_id, job.label, "finished", job.plan.folder, kept=True
                )
                kept[i] = dataclasses.asdict(outcome)
        packs = self._packs(todo, pack_size)
        if stale := runner.stale_checkpoints([[self.jobs[i] for i in pack] for pack in packs]):
            raise ConfigErrors(stale)
        self._display(todo)
        return kept, packs

    def _packs(self, todo: list[int], limit: int) -> list[list[int]]:
        """Which of the jobs to train do so together."""
        from lorabench import machine, sweep

        if not todo:
            return []
        jobs = [self.jobs[i] for i in todo]
        memory = machine.free_memory(machine.choose_device(jobs[0].config.trainer.device))
        return [[todo[i] for i in pack] for pack in sweep.form_packs(jobs, limit, memory)]

    def _display(self, todo: list[int]) -> None:
        from lorabench.progress import Display

        self.display = Display(len(todo), sum(self.jobs[i].config.trainer.steps for i in todo))
        if len(self.jobs) > len(todo):
            self.display.say(
                f"{len(self.jobs) - len(todo)} of {len(self.jobs)} runs are kept from before, "
                f"{len(todo)} to train"
            )

    def run(self, members: list[int]) -> list[dict[str, Any]]:
        """Train one pack."""
        import dataclasses

        from lorabench import runner

        with self.display:
            outcomes = runner.run_pack([self.jobs[i] for i in members], self.display)
        self.outcomes += outcomes
        return [dataclasses.asdict(outcome) for outcome in outcomes]


def train(arguments: list[str]) -> int:
    """lorabench train [-m] OVERRIDES"""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import hydra

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    refuse_values(arguments)
    register()
    task = Train()
    function = _function(task)
    # argparse refuses overrides on both sides of a flag, which `plan` takes
    flags = [a for a in arguments if a in ("-m", "--multirun")]
    sys.argv = ["lorabench", *flags[:1], *(a for a in arguments if a not in flags)]
    hydra.main(config_path=conf_folder(), config_name="train", version_base="1.3")(function)()
    return _closing(task.outcomes)


def _function(task: Train) -> Callable[[Any], Any]:
    """A plain function, which Hydra wants, carrying the packed launcher's two calls."""

    def train_task(cfg: Any) -> Any:
        return task(cfg)

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
    """lorabench plan [-m] [--json] OVERRIDES"""
    from hydra_plugins.lorabench_launcher.packed_launcher import PackedLauncherConf
    from lorabench import machine, show, sweep

    as_json = "--json" in arguments
    if "-h" in arguments or "--help" in arguments:
        print(
            "lorabench plan [-m] [--json] KEY=VALUE ...\n\n"
            "what `lorabench train` with the same words would do"
        )
        return 0
    jobs = sweep.plan_jobs(*compose([a for a in arguments if a != "--json"]))
    memory = machine.free_memory(machine.choose_device(jobs[0].config.trainer.device))
    packs = sweep.form_packs(jobs, PackedLauncherConf.pack_size, memory)
    show.plan(jobs, packs, as_json)
    return 0
