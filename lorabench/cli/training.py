"""The verb train, and what Hydra runs for it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench import masking
from lorabench.cli import presets
from lorabench.cli.composing import compose, register, say_if_sweep
from lorabench.cli.telling import tell
from lorabench.cli.words import conf_folder, in_hydras_order, refuse_flags

if TYPE_CHECKING:
    from lorabench.cli.sessions import Command, Session

SHOWS = {"--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--version"}  # and no more


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
        run_hydra(lambda _: None, arguments)  # prints what was asked for
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
            run_hydra(_task(command, single), arguments)
    except ConfigErrors:  # of a later launch of the same command
        closing(list(command.outcomes.values()))
        raise
    if command.refused:
        raise ConfigErrors(command.refused)
    return closing(list(command.outcomes.values()))


def run_hydra(function: Callable[[Any], Any], arguments: Sequence[str]) -> None:
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
        cfg.presets = presets.used(HydraConfig.get())
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
