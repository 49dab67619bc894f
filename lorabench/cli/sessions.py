"""The jobs of one launch, from their plans to their results: what Hydra's launchers call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench import machine, record, sweep
from lorabench.cli import presets
from lorabench.config import ConfigErrors
from lorabench.plan import Planner
from lorabench.progress import Display
from lorabench.sweep import Job, SweepFolder
from lorabench.sweep.needs import Needs

if TYPE_CHECKING:
    from lorabench.worker import Outcome, Worker


@dataclass
class Command:
    """One command that trains: its words, what it plans with, and how its runs ended."""

    words: list[str]
    planner: Planner = field(default_factory=Planner)
    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)  # errors of jobs that Hydra started singly

    def begin(self, configs: Sequence[Any], labels: list[str], pack_size: int) -> Session:
        """Plan the jobs of a launch, all of them or all their errors at once."""
        jobs = sweep.plan_jobs(list(configs), labels, self.planner)
        return Session(self, jobs, pack_size)


class Session:
    """The jobs of one launch. Each result brings its run to its end, and others on the way."""

    def __init__(self, command: Command, jobs: list[Job], pack_size: int):
        from lorabench.worker import Shared, Worker  # heavy: after all mistakes were told

        self.command, self.jobs = command, jobs
        shared = Shared(command.planner, command.words)
        self.display = Display(0, 0)
        by_folder: dict[Path, list[Job]] = {}
        for job in jobs:
            by_folder.setdefault(job.folder.parent, []).append(job)
        self.workers = {
            place: Worker(SweepFolder(place), mine, shared, self.display)
            for place, mine in by_folder.items()
        }
        for worker in self.workers.values():
            worker.look_at_kept()
        self.left = [job for job in jobs if self.worker(job).asked.is_left(job)]
        notes = presets.note(job.config for job in jobs) + shared.check_data(self.left)
        self.needs = Needs(command.planner)
        self.needs.know(self.left)
        for worker in self.workers.values():
            self._add(worker, pack_size)
        self._greet()
        for device in dict.fromkeys(job.config.trainer.device for job in self.left):
            self.display.say(f"device: {machine.describe(machine.choose_device(device))}")
        for note in notes:
            self.display.say(f"note: {note}")

    def worker(self, job: Job) -> Worker:
        return self.workers[job.folder.parent]

    def _add(self, worker: Worker, pack_size: int) -> None:
        """Add the runs of one folder to its sweep.json, in packs if they are new there."""
        from lorabench.worker import stale_checkpoints

        known = worker.folder.read()
        packed = {run for pack in known.packs for run in pack.runs}
        fresh = [j for j in sweep.first_of_each(worker.asked.jobs) if j.plan.run_id not in packed]
        to_train = sweep.first_of_each(
            job for job in worker.asked.jobs if worker.asked.must_train(job)
        )
        sweep.check_memory(to_train, self.needs)
        packs: list[list[str]] = []
        compiled: set[str] = set()
        if fresh:
            device = machine.choose_device(fresh[0].config.trainer.device)
            memory = machine.free_memory(device)
            formed = sweep.form_packs(fresh, pack_size, memory, self.needs)
            packs = [[fresh[i].plan.run_id for i in members] for members in formed]
            which = zip(packs, sweep.to_compile(fresh, formed, device, self.needs), strict=True)
            compiled = {run for runs, is_compiled in which if is_compiled for run in runs}
        shapes = [*(pack.runs for pack in known.current_packs()), *packs]
        sweep.check_room([[j for j in to_train if j.plan.run_id in runs] for runs in shapes])
        if stale := stale_checkpoints(to_train, known.current_packs()):
            raise ConfigErrors(stale)
        worker.folder.add(
            {job.plan.run_id: sweep.entry_of(job) for job in worker.asked.jobs},
            packs,
            self.command.words,
            compiled,
        )

    def _greet(self) -> None:
        """Say what is kept, what is to do, and what others are doing."""
        distinct = [
            job
            for worker in self.workers.values()
            for job in sweep.first_of_each(job for job in self.left if job in worker.asked.jobs)
        ]
        to_score = [job for job in distinct if self.worker(job).asked.must_score(job)]
        self.display.num_runs = len(distinct)
        self.display.steps_total = sum(
            job.config.trainer.num_steps for job in distinct if job not in to_score
        )
        kept = [job for job in self.jobs if job not in self.left]
        busy = [j for j in distinct if self.worker(j).folder.holder(j.plan.run_id)]
        same = len(self.left) - len(distinct)
        for place, worker in self.workers.items():
            mine = {job.plan.run_id for job in worker.asked.jobs}
            older = [
                entry
                for path, entry in record.find(place)
                if entry.arithmetic_version < record.ARITHMETIC_VERSION and path.name not in mine
            ]
            if older:
                self.display.say(
                    f"{place}: {len(older)} run{'s' if len(older) > 1 else ''} of arithmetic "
                    f"version {older[0].arithmetic_version} stay as they are; this lorabench "
                    f"computes otherwise (version {record.ARITHMETIC_VERSION}) and trains beside "
                    f"them"
                )
        if kept or to_score or busy or same:
            train = len(distinct) - len(to_score)
            self.display.say(
                f"{len(kept)} of {len(self.jobs)} runs are kept from before, {train} to train"
                + (f", {len(to_score)} to score" if to_score else "")
                + (f", {len(busy)} of them held by another process" if busy else "")
                + (f", {same} the same as another" if same else "")
            )

    def is_over(self, index: int) -> bool:
        """Whether a job's run has ended already."""
        return not self.worker(self.jobs[index]).asked.is_left(self.jobs[index])

    def folder(self, index: int) -> Path:
        """The folder of a job's run."""
        return self.jobs[index].folder

    def result(self, index: int) -> float:
        """Bring a job's run to its end; return its objective, NaN if it failed or stopped."""
        job = self.jobs[index]
        with self.display:
            outcome = self.worker(job).finish(job)
        first = next(one for one in self.jobs if one.folder == job.folder)
        if first is not job and job in self.left:
            self.display.say(f"{job.label}  {outcome.status}: the same run as {first.label}")
        self.command.outcomes.setdefault((outcome.folder, job.plan.evaluation_id), outcome)
        return outcome.objective
