"""The verbs that plan: train and plan."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench import masking
from lorabench.cli.composing import compose, register, say_if_sweep
from lorabench.cli.telling import tell
from lorabench.cli.words import conf_folder, in_hydras_order, refuse_flags

if TYPE_CHECKING:
    from lorabench.cli.sessions import Command, Session

SHOWS = {"--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--version"}  # and no more
PLAN_FLAGS = ("--json", "--smoke")
PLAN_HELP = """\
lorabench plan [-m] [--json] [--smoke] KEY=VALUE ...

what `lorabench train` with the same words would do

--json   the same for programs, with every adapted module; refusals too
--smoke  also two steps of every pack on two examples, in each of its stages, and
         its adapters reloaded

exit code 0: it can be trained; 1: --smoke failed; 2: refused"""


def train(arguments: list[str]) -> int:
    """lorabench train [-m] OVERRIDES"""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lorabench import interrupt, tracking
    from lorabench.cli.sessions import Command
    from lorabench.config import ConfigErrors

    interrupt.install()
    refuse_flags("train", arguments)
    if SHOWS.intersection(arguments):
        register()
        _run_hydra(lambda _: None, arguments)  # prints what was asked for
        return 0
    command = Command(["train", *arguments])
    # Before Hydra makes a folder: nothing is left of a command that is refused.
    composed = compose(list(arguments), command.planner, expand=False)
    single = None
    if not composed.is_sweep:
        say_if_sweep(composed.hydra)
        single = command.begin(composed.configs, composed.labels, 1)
    try:
        with tracking.of_command():
            _run_hydra(_task(command, single), arguments)
    except ConfigErrors:  # of a later launch of the same command
        closing(list(command.outcomes.values()))
        raise
    if command.refused:
        raise ConfigErrors(command.refused)
    return closing(list(command.outcomes.values()))


def _run_hydra(function: Callable[[Any], Any], arguments: Sequence[str]) -> None:
    import hydra

    sys.argv = ["lorabench", *in_hydras_order(arguments)]
    loud = logging.raiseExceptions
    logging.raiseExceptions = False  # a log to a full disk or a closed pipe is no traceback
    main = hydra.main(config_path=conf_folder(), config_name="train", version_base="1.3")
    try:
        with masking.hydras_files():
            main(function)()
    finally:
        logging.raiseExceptions = loud


def _task(command: Command, single: Session | None) -> Callable[[Any], float]:
    """The function that Hydra runs: one config alone, or many under the packed launcher.

    Args:
        single: the session of a single run; None: of a multirun.
    """
    from lorabench.config import ConfigErrors

    def train_task(cfg: Any) -> float:
        from hydra.core.hydra_config import HydraConfig

        if single is not None:
            return single.result(0)
        label = " ".join(HydraConfig.get().overrides.task) or "defaults"
        try:
            return command.begin([cfg], [label], 1).result(0)
        except ConfigErrors as error:  # raised in the job, Hydra would write a line of its own
            command.refused += error.errors
            return float("nan")

    train_task.begin = command.begin  # type: ignore[attr-defined]
    return train_task


def closing(outcomes: Sequence[Any]) -> int:
    """Print the last lines of a command and return its exit code."""
    if not outcomes:
        return 0  # the only launch was refused
    folders: dict[Path, set[str]] = {}  # of sweeps, with their runs
    for outcome in outcomes:
        folders.setdefault(Path(outcome.folder).parent, set()).add(outcome.folder)
    if bad := [outcome for outcome in outcomes if outcome.is_bad]:
        lines = [f"{len(bad)} of {len(outcomes)} runs did not finish:"]
        for one in bad:
            why = one.error if one.status == "stopped" else f"{one.status}: {one.error}"
            lines.append(f"  {one.label or 'run'} ({one.folder}): {why}")
        if any(outcome.status == "trained" for outcome in bad):
            lines.append("trained runs keep their adapter; the same command only scores them")
        return tell(lines, 1)
    lines = [
        f"{folder}: {len(runs)} of {len(runs)} runs done; lorabench compare {folder}"
        for folder, runs in sorted(folders.items())
    ]
    return tell(lines, 0)


def plan(arguments: list[str]) -> int:
    """lorabench plan [-m] [--json] [--smoke] OVERRIDES"""
    if "-h" in arguments or "--help" in arguments:
        print(PLAN_HELP)
        return 0
    refuse_flags("plan", arguments, PLAN_FLAGS)
    words = [word for word in arguments if word not in PLAN_FLAGS]
    if SHOWS.intersection(words):
        register()
        _run_hydra(lambda _: None, words)  # prints what was asked for
        return 0
    from lorabench import machine, show, sweep
    from lorabench.config import ConfigErrors
    from lorabench.plan import Planner

    as_json = "--json" in arguments
    planner = Planner()
    composed = compose(words, planner)
    if not composed.is_sweep:
        say_if_sweep(composed.hydra)
    planned = sweep.plan_jobs(composed.configs, composed.labels, planner)
    jobs = sweep.first_of_each(planned)
    from lorabench.worker import Shared  # heavy: after all mistakes were told

    shared, unread = Shared(planner), ""
    notes: Iterable[str] = ()
    try:
        notes = shared.check_data(jobs)
    except ConfigErrors as error:
        # A hub may be out of reach; what is wrong with files here is refused, as by `train`.
        if "--smoke" in arguments or any(job.config.data.source != "hub" for job in jobs):
            raise
        unread = error.errors[0]
    memory = machine.free_memory(machine.choose_device(jobs[0].config.trainer.device))
    packs = sweep.form_packs(jobs, composed.pack_size, memory)
    trained = {i for i, job in enumerate(jobs) if (found := job.record()) and found.has_trained()}
    sweep.check_room([[jobs[i] for i in members if i not in trained] for members in packs])
    attempts: list[Any] = []

    def tried() -> Iterator[Any]:
        from lorabench import smoke

        for members in packs:
            attempts.append(smoke.attempt([jobs[i] for i in members], shared))
            yield attempts[-1]

    if len(jobs) < len(planned) and not as_json:
        print(f"{len(planned)} grid points, {len(planned) - len(jobs)} the same run as another")
    show.plan(jobs, packs, as_json, tried() if "--smoke" in arguments else (), notes, unread)
    return 1 if any(attempt.error is not None for attempt in attempts) else 0
