"""What a command asks of a sweep folder, and how far each of its runs is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lorabench import hashes, masking, plan
from lorabench.config import ConfigErrors, typed
from lorabench.record import Record
from lorabench.sweep import Job, PackEntry, RunEntry, SweepFolder, first_of_each
from lorabench.worker.outcome import Outcome, objective


class Asked:
    """The runs of a command in one sweep folder."""

    def __init__(self, folder: SweepFolder, jobs: Sequence[Job]):
        self.folder, self.jobs = folder, list(jobs)
        self.failed: dict[str, str] = {}  # by this process, which tries once: run id -> error
        self._before = {job.plan.run_id: _stamp(job.record()) for job in jobs}
        self._ended: set[str] = set()  # evaluations of runs that need no further look

    def must_train(self, job: Job) -> bool:
        """Whether a run has no adapter yet, and nobody has tried and failed since we began."""
        found = job.record()
        return not (found and found.has_trained()) and not self._has_failed(job, found)

    def must_score(self, job: Job) -> bool:
        """Whether a run has an adapter and lacks the scores that this command asks for."""
        found = job.record()
        if found is None or not found.has_trained() or self._has_failed(job, found):
            return False
        return not self.is_scored(found, job)

    def is_scored(self, found: Record, job: Job) -> bool:
        """Whether a run has the evaluation that a job asks for, and its predictions whole."""
        evaluation = found.evaluation(job.plan.evaluation_id)
        if evaluation is None:
            return False
        path = job.folder / evaluation.predictions
        return path.is_file() and hashes.file_hash(path) == evaluation.predictions_sha256

    def is_left(self, job: Job) -> bool:
        """Whether there is something to do for a run."""
        key = _key(job)
        if key not in self._ended and not (self.must_train(job) or self.must_score(job)):
            self._ended.add(key)
        return key not in self._ended

    def not_known_to_have_ended(self) -> list[Job]:
        """The runs that may still need what they share; looks at no file."""
        return [job for job in self.jobs if _key(job) not in self._ended]

    def left_of(self, pack: PackEntry) -> list[Job]:
        """The runs of a pack for which there is something to do."""
        return [job for job in self.jobs if job.plan.run_id in pack.runs and self.is_left(job)]

    def _has_failed(self, job: Job, found: Record | None) -> bool:
        """Whether this process, or another one since this one began, has tried and failed."""
        if job.plan.run_id in self.failed:
            return True
        if found is None or found.error is None or found.status not in ("failed", "trained"):
            return False
        return _stamp(found) != self._before[job.plan.run_id]

    def outcome(self, job: Job) -> Outcome:
        """Say how a run has ended."""
        run_id = job.plan.run_id
        found = job.record()
        status, error = (found.status, found.error) if found else ("failed", None)
        has_failed = run_id in self.failed
        if has_failed:
            error = self.failed[run_id]
            status = status if found and found.has_trained() else "failed"
        value = math.nan if has_failed else objective(job, found)
        folder = job.plan.folder
        return Outcome(run_id, job.label, status, folder, error, value, has_failed)

    def slots(self, pack: PackEntry, like: Job, planner: plan.Planner) -> list[Job]:
        """Every run of a pack's shape as a job; those of other commands from sweep.json.

        Args:
            like: a run of the pack that is at work.
        """
        known = {job.plan.run_id: job for job in first_of_each(self.jobs)}
        entries = self.folder.read().runs
        return [known.get(run) or mate_of(like, run, entries[run], planner) for run in pack.runs]


def _key(job: Job) -> str:
    return f"{job.plan.run_id} {job.plan.evaluation_id}"


def mate_of(like: Job, run: str, entry: RunEntry, planner: plan.Planner) -> Job:
    """Return a run of sweep.json that shares a pack with `like`, as far as its slot needs it.

    Data and whatever else the runs of a pack share are those of `like`: how another command last
    asked this run to be scored is of no importance here.

    Raises:
        ConfigErrors: it no longer resolves to the run it was.
    """
    from omegaconf import OmegaConf

    from lorabench.sweep.packs import OWN_GROUPS, OWN_TRAINER

    own = typed(OmegaConf.create(entry.config))
    trainer = {key: getattr(own.trainer, key) for key in OWN_TRAINER}
    config = dataclasses.replace(
        like.config,
        **{group: getattr(own, group) for group in OWN_GROUPS},
        trainer=dataclasses.replace(like.config.trainer, **trainer),
    )
    made = planner.make(config)
    # Unless `like` itself is scored with settings under which it would be trained otherwise.
    is_as_planned = planner.make(like.config).run_id == like.plan.run_id
    if not is_as_planned:
        made = made.model_copy(update={"run_id": run, "folder": str(like.folder.parent / run)})
    if made.run_id != run:
        raise ConfigErrors(
            f"sweep.json: run {run} must still resolve to what was planned; it resolves to "
            f"{made.run_id} now: its base or its data changed{masking.why_other(entry.config)}; "
            f"repeat the command that asked for it"
        )
    return Job(config, entry.label, made)


def _stamp(found: Record | None) -> tuple[Any, ...]:
    """What changes when somebody tries a run again."""
    return (found.status, found.started, found.ended, found.error) if found else ()
