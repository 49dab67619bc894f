"""How the packed launcher runs jobs: compose all, hand all to the task, run each as a Hydra job.

A task function may carry `begin(configs, labels, pack_size) -> session`. It sees every job of the
launch before the first one runs; `session.result(i)` then brings job i to its end, and may train
others with it. Each is still a Hydra job with its own folder, config files and callbacks; a job
that was over before (`session.is_over(i)`) leaves the config files in `session.folder(i)` as they
are. Without `begin` (any other Hydra app) jobs run one by one, as under Hydra's basic launcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


def launch(
    context: HydraContext,
    task_function: TaskFunction,
    config: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
    pack_size: int,
) -> Sequence[JobReturn]:
    """Run every job; results come back in the order of `job_overrides`."""
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    jobs = compose_jobs(context.config_loader, config, job_overrides, initial_job_idx)
    tasks: list[Any] = [task_function] * len(jobs)
    session = None
    begin = getattr(task_function, "begin", None)
    if begin is not None:
        labels = [" ".join(filter_overrides(overrides)) for overrides in job_overrides]
        session = begin([task_config(job) for job in jobs], labels, pack_size)
        tasks = [partial(_result, session, i) for i in range(len(jobs))]
    place = Path(str(config.hydra.sweep.dir))
    place.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, place / "multirun.yaml")
    returns = []
    for i, (job, task) in enumerate(zip(jobs, tasks, strict=True)):
        if session is not None and session.is_over(i):
            _keep_files(job, session.folder(i))
        returned = run_job(
            hydra_context=context,
            task_function=task,
            config=job,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        returns.append(returned)
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    return returns


def _result(session: Any, index: int, _: DictConfig) -> Any:
    """The task of one job."""
    return session.result(index)


def _keep_files(job: DictConfig, folder: Path) -> None:
    """Have Hydra write no config files where the command that ran this job has left its own.

    Nor where the job has failed because nothing can be written there: that must end no other job.
    """
    name = job.hydra.output_subdir
    if name is None:
        return
    try:
        (folder / name).mkdir(parents=True)
    except OSError:  # it is there, or cannot be
        job.hydra.output_subdir = None


def compose_jobs(
    loader: ConfigLoader,
    config: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int = 0,
) -> list[DictConfig]:
    """Compose the config of every job, Hydra's own node included."""
    from hydra_plugins.lorabench_launcher._loader import for_jobs

    loader, jobs = for_jobs(loader), []
    for i, overrides in enumerate(job_overrides):
        job = loader.load_sweep_config(config, list(overrides))
        with open_dict(job):
            job.hydra.job.id = job.hydra.job.num = initial_job_idx + i
        jobs.append(job)
    return jobs


def task_config(job: DictConfig) -> DictConfig:
    """What the task function sees of a job: all but Hydra's own node.

    A config of lorabench is told which files it was composed from, as that node knows.
    """
    from lorabench.cli import presets

    task = job.copy()
    with open_dict(task):
        if "presets" in task:
            task.presets = presets.used(job.hydra)
        del task["hydra"]
    return task
