"""What a W&B run holds: config, metrics on the axis of steps, summary, the record, the adapter.

W&B numbers rows by `_step`, which may only grow, and tells a client that resumes a run the next
number. Here a row's `_step` follows from the row alone, so a resumed run leaves out the rows that
the server has, even if `trainer.log_every` or `trainer.eval_every` has changed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lorabench.tracking import limits
from lorabench.tracking.mirrored import Ending, Mirrored

SYNCED = ".wandb.synced"  # the client's own mark of a file whose runs are at the server


def begin(mirrored: Mirrored, mode: str) -> Any:
    """Start the W&B run. May block."""
    import wandb

    settings = mirrored.settings
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        id=mirrored.run_id,
        name=mirrored.name,
        group=mirrored.sweep,
        job_type="train",
        tags=[*mirrored.tags, *settings.tags],
        notes=mirrored.notes or None,
        config=mirrored.config,
        dir=str(mirrored.folder),
        mode=mode,  # type: ignore[arg-type]
        resume="allow" if mode == "online" else None,
        reinit="create_new",  # the default would hand back the previous run of the process
        # Before our own deadline: a client that gives up by itself leaves a whole file.
        settings=_client_settings(
            mirrored, max(limits.FINISH_SECONDS - limits.CLIENT_SECONDS - limits.ADAPTER_SECONDS, 1)
        ),
    )
    _draw_over_steps(run)
    return run


def resume(mirrored: Mirrored, folder: Path) -> Any:
    """Resume a W&B run to send what its server lacks. May block.

    Args:
        folder: for the client's own files of this run.
    Raises:
        wandb.errors.UsageError: The server has no such run, or there is no key.
    """
    import wandb

    run = wandb.init(
        project=mirrored.settings.project,
        entity=mirrored.settings.entity,
        id=mirrored.run_id,
        dir=str(folder),
        mode="online",
        resume="must",
        reinit="create_new",
        settings=_client_settings(mirrored, limits.SYNC_SECONDS),
    )
    _draw_over_steps(run)
    return run


def _client_settings(mirrored: Mirrored, finish_seconds: float) -> Any:
    import wandb

    def refuse_stop() -> None:  # else the client interrupts the command, with all its runs
        name = mirrored.name
        mirrored.notify(f"wandb: the server asks to stop {name}; press Ctrl-C here instead")

    return wandb.Settings(
        init_timeout=limits.INIT_SECONDS,
        finish_timeout=finish_seconds,
        finish_timeout_raises=True,
        stop_fn=refuse_stop,
        console="off",
        silent=True,
    )


def _draw_over_steps(run: Any) -> None:
    run.define_metric("step")
    run.define_metric("*", step_metric="step")


def log(run: Any, row: dict[str, Any]) -> None:
    """Log a row of metrics.jsonl, unless it is before the first one that the server lacks.

    A step has at most two rows: what was trained, then what validation gave.
    """
    number = 2 * row["step"] + any(name.startswith("validation/") for name in row)
    if number >= run.starting_step:  # 0 where nothing is resumed
        run.log(row, step=number, commit=True)


def finish(run: Any, mirrored: Mirrored, ending: Ending) -> bool:
    """End a W&B run; False if the server did not take everything in time."""
    run.summary.update(ending.summary)
    _keep_record(run, mirrored)
    try:
        run.finish(exit_code=int(ending.failed))
    except TimeoutError:
        return False
    return True


def _keep_record(run: Any, mirrored: Mirrored) -> None:
    """Put a copy of the record among the run's files: the sweep folder may move before a sync."""
    record = mirrored.run_folder / "record.json"
    if record.is_file():
        copy = Path(run.dir) / record.name
        shutil.copyfile(record, copy)
        run.save(str(copy), base_path=run.dir, policy="now", glob=False)


def log_adapter(run: Any, mirrored: Mirrored) -> None:
    """Log the adapter as an artifact, without a copy in W&B's own folders. May block."""
    import wandb

    artifact = wandb.Artifact(
        f"adapter-{mirrored.run_id}", type="model", metadata=dict(mirrored.config["hashes"])
    )
    folder = str(mirrored.run_folder / "adapter")
    artifact.add_dir(folder, skip_cache=True, policy="immutable")
    run.log_artifact(artifact)


def gave_up_sending(run: Any) -> bool:
    """Whether the client has stopped sending rows, say after a 401: only its own log tells."""
    log = Path(run.settings.log_internal)
    return log.is_file() and '"level":"ERROR+4"' in log.read_text(errors="replace")
