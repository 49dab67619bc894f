"""How the packed launcher runs jobs: compose all, let the task plan all, run pack by pack.

A task function may carry `plan(configs, labels, pack_size) -> kept, packs` and
`run(members) -> results`. Without
them (any other Hydra app) jobs run one by one, as under Hydra's basic launcher.

The jobs of a pack are opened inside one another: the task of job i opens job i + 1 and the
innermost trains them all, so each keeps Hydra's own folder, config files and callbacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import (
    JobReturn,
    JobStatus,
    configure_log,
    filter_overrides,
    run_job,
    setup_globals,
)
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


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
    Path(str(config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    jobs = [
        _compose(context.config_loader, config, list(overrides), initial_job_idx + i)
        for i, overrides in enumerate(job_overrides)
    ]
    plan = getattr(task_function, "plan", None)
    if plan is None:
        results = []
        for job in jobs:
            results.append(_run_job(context, task_function, job))
            configure_log(config.hydra.hydra_logging, config.hydra.verbose)
        return results

    labels = [" ".join(filter_overrides(overrides)) for overrides in job_overrides]
    # `packs` lists the jobs that train together; `kept` are results by job of all others, some of
    # them known only when a pack has run.
    kept, packs = plan([_task_config(job) for job in jobs], labels, pack_size)
    returns: dict[int, JobReturn] = {}
    for members in packs:
        returns |= _run_pack(context, task_function, jobs, members)
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    returns |= {i: _kept_return(jobs[i], result) for i, result in kept.items()}
    return [returns[i] for i in range(len(jobs))]


def compose_once(loader: ConfigLoader) -> None:
    """Hand the configs that the sweeper composes to check a batch on to the launcher.

    Composing costs 0.1 s a job or more; the sweeper does it once only to see whether it can.
    """
    compose = loader.load_sweep_config
    checked: dict[tuple[int, tuple[str, ...]], DictConfig] = {}

    def remember(master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        key = id(master_config), tuple(sweep_overrides)
        if key in checked:
            return checked.pop(key)
        checked[key] = compose(master_config, sweep_overrides)
        return checked[key]

    loader.load_sweep_config = remember  # type: ignore[method-assign]


def _compose(
    loader: ConfigLoader, config: DictConfig, overrides: list[str], index: int
) -> DictConfig:
    job = loader.load_sweep_config(config, overrides)
    with open_dict(job):
        job.hydra.job.id = index
        job.hydra.job.num = index
    return job


def _task_config(job: DictConfig) -> DictConfig:
    """What the task function sees of a job: all but Hydra's own node."""
    task = job.copy()
    with open_dict(task):
        del task["hydra"]
    return task


def _run_job(context: HydraContext, task_function: TaskFunction, job: DictConfig) -> JobReturn:
    return run_job(
        hydra_context=context,
        task_function=task_function,
        config=job,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def _run_pack(
    context: HydraContext, task_function: Any, jobs: list[DictConfig], members: list[int]
) -> dict[int, JobReturn]:
    """Open the members' jobs inside one another and train them in the innermost."""
    returns: dict[int, JobReturn] = {}
    results: list[Any] = []

    def open_job(depth: int) -> None:
        def task(_: DictConfig) -> Any:
            if depth + 1 < len(members):
                open_job(depth + 1)
            else:
                results.extend(task_function.run(members))
            return results[depth]

        returned = _run_job(context, task, jobs[members[depth]])
        if returned.status == JobStatus.FAILED:  # or the job around it would fail of no result
            raise returned._return_value
        returns[members[depth]] = returned

    open_job(0)
    return returns


def _kept_return(job: DictConfig, result: Any) -> JobReturn:
    """The return of a job that an earlier command finished: Hydra's files stay as they were."""
    returned = JobReturn()
    returned.overrides = list(job.hydra.overrides.task)
    returned.cfg = _task_config(job)
    returned.hydra_cfg = job
    returned.status = JobStatus.COMPLETED
    returned.return_value = result
    return returned
