"""Trackers: mirrors of a run's values. A tracker may fail without hurting a run.

Only this room knows Weights & Biases.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorabench.config import TrackerConfig, first_line

log = logging.getLogger(__name__)

LIVE: set[str] = set()  # W&B runs open in this process
OFFLINE_SINCE: list[str] = []  # the failure after which this process tries no server any more


class NoTracker:
    """The null object: the loop never asks whether there is a tracker."""

    address = "none"

    def log(self, row: dict[str, float], step: int) -> None:
        """Take the values of one step."""

    def finish(self, summary: dict[str, float], failed: bool = False) -> None:
        """Close the run with its final values."""


class WandbTracker(NoTracker):
    """One W&B run: group = sweep, id = run id."""

    def __init__(self, run: Any, address: str, notify: Callable[[str], None]):
        self.run, self.address, self.notify = run, address, notify

    def _try(self, what: str, act: Callable[[], Any]) -> None:
        if self.run is None:
            return
        try:
            act()
        except Exception as error:  # whatever a network or a disk does, the run goes on
            self.notify(f"wandb: {what} failed ({first_line(error)}); the run goes on without it")
            self.run = None

    def log(self, row: dict[str, float], step: int) -> None:
        self._try("log", lambda: self.run.log({**row, "step": step}))

    def finish(self, summary: dict[str, float], failed: bool = False) -> None:
        def close() -> None:
            self.run.summary.update(summary)
            self.run.finish(exit_code=int(failed))
            LIVE.discard(self.run.id)

        self._try("finish", close)


def start(
    settings: TrackerConfig,
    *,
    run_id: str,
    sweep: str,
    name: str,
    tags: list[str],
    config: dict[str, Any],
    folder: Path,
    notify: Callable[[str], None],
) -> NoTracker:
    """The tracker of one run.

    Args:
        name: what the dashboard calls the run.
        folder: the sweep's folder; W&B's files go to its `wandb/`.
        notify: where a failure is told.
    """
    if settings.kind == "none" or settings.mode == "disabled":
        return NoTracker()
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
    except ImportError as error:
        notify(f"wandb: cannot be imported ({first_line(error)}); the run goes on without it")
        return NoTracker()

    folder.mkdir(parents=True, exist_ok=True)
    online = settings.mode == "online" and not OFFLINE_SINCE
    modes = ["online", "offline"] if online else ["offline"]
    if settings.mode == "online" and not online:
        notify(f"wandb: {OFFLINE_SINCE[0]}; this run is offline too")
    wandb_id = run_id
    for mode in modes:
        try:
            run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                id=wandb_id,
                name=name,
                group=sweep,
                job_type="train",
                tags=[*tags, *settings.tags],
                config=config,
                dir=str(folder),
                mode=mode,  # type: ignore[arg-type]
                resume="allow" if mode == "online" else None,
                reinit="create_new",  # the default would hand back the previous run of the process
                settings=wandb.Settings(
                    init_timeout=20,
                    finish_timeout=30,
                    console="off",
                    silent=True,
                    x_disable_stats=True,
                ),
            )
            run.define_metric("step")
            for pattern in ("train/loss", "validation/*", "test/*"):
                run.define_metric(pattern, step_metric="step", summary="last")
        except Exception as error:  # no key, no network, no server: all end here
            if mode == "online":
                OFFLINE_SINCE.append(f"online start failed ({first_line(error)})")
                # The client keeps the id of the failed start in use until it is torn down.
                if LIVE:
                    wandb_id = f"{run_id}-offline"
                else:
                    wandb.teardown()
            told = "goes on offline" if mode != modes[-1] else "goes on without wandb"
            notify(f"wandb: {mode} start failed ({first_line(error)}); the run {told}")
            continue
        LIVE.add(run.id)
        address = run.url if mode == "online" else str(Path(run.dir).parent)
        return WandbTracker(run, str(address), notify)
    return NoTracker()
