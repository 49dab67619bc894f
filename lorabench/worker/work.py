"""A worker: takes packs of one sweep folder under a lock, trains and scores them, lets go.

Any number of workers may serve a folder. A run that another one trains is waited for, and taken
over when its worker is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import time
import traceback
from collections.abc import Sequence
from typing import Any

from lorabench import (
    checkpoint,
    deaths,
    hashes,
    intact,
    interrupt,
    lease,
    machine,
    record,
    tracking,
)
from lorabench.config import ConfigErrors, and_more
from lorabench.lease import Holder, Lease, Lost
from lorabench.progress import Display
from lorabench.sweep import Job, PackEntry, SweepFolder, first_of_each
from lorabench.worker import members as at_work
from lorabench.worker.asked import Asked
from lorabench.worker.members import Member
from lorabench.worker.outcome import Outcome, last_line
from lorabench.worker.scoring import load_pack, score
from lorabench.worker.shared import Shared
from lorabench.worker.training import train_pack
from lorabench.worker.untrained import UntrainedBase
from lorabench.worker.watch import Watch

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # between looks at packs that others hold
SMALLER = (
    "the run trains alone already: use a smaller trainer.micro_batch_size or data.max_length, or "
    "trainer.gradient_checkpointing=true"
)


class Worker:
    """Brings the runs of a command to their end, in the pack shapes of their sweep folder.

    Args:
        scores_base: whether the untrained base gets scores of its own beside the runs'.
    """

    def __init__(
        self,
        folder: SweepFolder,
        jobs: Sequence[Job],
        shared: Shared,
        display: Display,
        scores_base: bool = True,
    ):
        self.folder, self.shared, self.display = folder, shared, display
        self.asked = Asked(folder, jobs)
        self.untrained = UntrainedBase(folder, shared, display) if scores_base else None
        self.told_waiting = ""
        self.told: set[str] = set()  # runs whose end was shown

    def look_at_kept(self) -> None:
        """Read the files of runs that have ended; those without a whole adapter have failed.

        Raises:
            ConfigErrors: a newer lorabench has written some of them.
        """
        newer = [str(job.folder) for job in self.asked.jobs if record.is_newer(job.folder)]
        if newer:
            raise ConfigErrors(
                f"record.json: must have a schema version of at most {record.SCHEMA_VERSION}; got "
                f"{and_more(newer)} of a newer lorabench; update this one, or give another "
                f"sweep=NAME"
            )
        for job in first_of_each(self.asked.jobs):
            found = job.record()
            if found is None and (job.folder / "record.json").exists():
                self.display.say(f"{job.folder}: record.json is damaged; the run is trained again")
            if found is None or not found.has_trained():
                continue
            damaged = intact.damage(job.folder, found, hashes.file_hash)
            if not damaged:
                continue
            told = intact.described_damage(job.folder, found, damaged)
            if intact.of_adapter(damaged):
                self.asked.failed[job.plan.run_id] = told
            else:
                self.display.say(told)

    def finish(self, job: Job) -> Outcome:
        """Train and score until a run has ended, its own pack first."""
        was_left = self.asked.is_left(job)
        while self.asked.is_left(job):
            if not self._take_one(first=job.plan.run_id):
                self._wait(job)
        if was_left and job.plan.run_id not in self.told:
            found = job.record()
            assert found is not None, "a run that nobody here has tried was tried by another"
            self._tell_one(job, f"{last_line(found)}, by another process")
        self._score_base([job])  # of a run that was kept, or that another process has scored
        return self.asked.outcome(job)

    def finish_all(self) -> list[Outcome]:
        """Train and score until every run has ended."""
        return [self.finish(job) for job in self.asked.jobs]

    def _take_one(self, first: str) -> bool:
        """Do what is left of one pack; False if others hold all of them."""
        packs = self.folder.read().current_packs()
        packs.sort(key=lambda pack: first not in pack.runs)
        for pack in packs:
            left = self.asked.left_of(pack)
            if not left:
                continue
            stale = left[0].config.worker.stale_seconds
            taken = lease.take(self.folder.lease_path(pack), stale)
            if isinstance(taken, Holder):
                continue
            with taken.lease:
                if taken.replaced:
                    self.display.say(f"pack {pack.id}: {taken.replaced}; taken over")
                if pack not in self.folder.settled().current_packs():
                    return True  # split before it was held
                self._do(pack, taken.lease)
            self._score_base(left)
            return True
        return False

    def _score_base(self, jobs: Sequence[Job]) -> None:
        """Score the untrained base of these runs, then drop what no other run needs."""
        if self.untrained is not None:
            for job in jobs:
                self.untrained.score_for(job)
        self.shared.keep_only(self.asked.not_known_to_have_ended())

    def _wait(self, job: Job) -> None:
        holder = self.folder.holder(job.plan.run_id)
        if holder is not None:
            text = f"waiting for {holder}, which works on {job.label or job.plan.run_id}"
            if text != self.told_waiting:
                self.told_waiting = text
                self.display.say(text)
        time.sleep(POLL_SECONDS)

    def _do(self, pack: PackEntry, held: Lease) -> None:
        """Train and score what is left of a pack that is held."""
        left = self.asked.left_of(pack)
        if not left:
            return  # another process was faster
        try:
            slots = self.asked.slots(pack, left[0], self.shared.planner)
        except ConfigErrors as refused:
            self._fail(left, "; ".join(refused.errors))
            return
        to_train = first_of_each([job for job in left if self.asked.must_train(job)])
        memory = self.folder.memory_path(pack)
        died = deaths.of_memory(memory) if to_train else None
        try:
            if died and len(pack.runs) > 1:
                self._halve(pack, to_train, held, f"is too large for memory: {died}")
                deaths.forget(memory)
            elif to_train:
                if died:
                    self.display.say(f"{to_train[0].label}: {died}; {SMALLER}")
                with deaths.watched(memory, held):
                    self._train_and_score(pack, slots, to_train, held)
            else:
                self._score_saved(pack, slots, left, held)
        except Lost as lost:
            self.display.say(f"pack {pack.id}: {lost}")

    def _train_and_score(
        self, pack: PackEntry, slots: list[Job], jobs: list[Job], held: Lease
    ) -> None:
        opened = at_work.open_members(jobs, pack, slots, held)
        try:
            start_step, members = at_work.furthest(opened, pack, self.display)
        except OSError as error:  # checkpoints that can be neither read nor set aside
            self._fail(jobs, at_work.what_failed(error))
            return
        begun = time.perf_counter()
        short_of_memory = False
        with at_work.logs_of([member.folder for member in members]):
            try:
                for member in members:
                    with at_work.own_failure(member):
                        at_work.begin(member)
                able = [member for member in members if not member.failed]
                if able:
                    trained = train_pack(able, slots, pack, start_step, self.shared, self.display)
                    self._score([member for member in able if not member.failed], trained)
                    del trained
            except KeyboardInterrupt:
                with contextlib.suppress(Lost):
                    self._close(members, begun, "interrupted", f"interrupted by {interrupt.name()}")
                raise
            except Lost:
                tracking.drop_all([member.tracker for member in members])
                raise
            except Exception as error:
                log.error("pack %s failed\n%s", pack.id, traceback.format_exc())
                short_of_memory = machine.is_out_of_memory(error)
                for member in members:
                    if not member.entry.has_trained():
                        member.fail(error)
        # Outside the handler: the exception held the frames, and they the pack.
        if short_of_memory and len(pack.runs) > 1:
            tracking.drop_all([member.tracker for member in members])
            self._halve(pack, jobs, held, "does not fit into memory")
            return
        if short_of_memory:
            members[0].entry.error = f"{members[0].entry.error}; {SMALLER}"
        self._close(members, begun)
        self._tell(members)

    def _halve(self, pack: PackEntry, jobs: list[Job], held: Lease, why: str) -> None:
        """Split a pack that does not fit into memory; its parts are trained from the start."""
        gc.collect()
        machine.release_memory()
        held.check()
        runs = [job.plan.run_id for job in jobs]
        half = (len(runs) + 1) // 2
        rest = [run for run in pack.runs if run not in runs]  # ended, or of other commands
        self.folder.split(pack, [runs[:half], runs[half:], rest], f"it {why}")
        self.display.say(f"a pack of {len(pack.runs)} {why}; trying packs of {half}")

    def _score_saved(self, pack: PackEntry, slots: list[Job], jobs: list[Job], held: Lease) -> None:
        """Score adapters that are saved already; nothing is trained."""
        begun = time.perf_counter()
        members = []
        for job in first_of_each(jobs):
            found = job.record()
            assert found is not None
            slot = pack.runs.index(job.plan.run_id)
            members.append(Member(job, slot, found, held, Watch.of(job.config)))
            at_work.clear(members[-1])
            checkpoint.remove(job.folder / "checkpoint")  # of a kill right after training
        with at_work.logs_of([member.folder for member in members]):
            try:
                loaded, errors = load_pack(members, slots, self.shared)
                self.asked.failed |= errors
                self._score([m for m in members if m.entry.run_id not in errors], loaded)
            except (KeyboardInterrupt, Lost):
                raise
            except Exception as error:
                log.error("pack %s: not scored\n%s", pack.id, traceback.format_exc())
                self.asked.failed |= {m.entry.run_id: at_work.what_failed(error) for m in members}
            finally:
                with contextlib.suppress(Lost):
                    self._close(members, begun)
        self._tell(members)

    def _score(self, members: Sequence[Member], loaded: Any) -> None:
        """Score every evaluation that the command asks of these runs, packed."""
        wanted: dict[str, dict[str, Member]] = {}  # evaluation id -> run id -> member
        for member in members:
            for job in self.asked.jobs:
                same_run = job.plan.run_id == member.job.plan.run_id
                if same_run and not self.asked.is_scored(member.entry, job):
                    asked = dataclasses.replace(member, job=job)
                    wanted.setdefault(job.plan.evaluation_id, {})[job.plan.run_id] = asked
        for evaluation, of_runs in wanted.items():
            scored = list(of_runs.values())
            try:
                errors = score(scored, evaluation, loaded, self.shared, self.display)
            except (KeyboardInterrupt, Lost):
                raise
            except Exception as error:
                log.error("scoring failed\n%s", traceback.format_exc())
                errors = dict.fromkeys(of_runs, at_work.what_failed(error))
            for run, text in errors.items():
                self.asked.failed[run] = f"scoring failed: {text}"
                if of_runs[run].entry.status == "trained":  # others have scores from before
                    of_runs[run].entry.error = self.asked.failed[run]

    def _close(
        self,
        members: list[Member],
        begun: float,
        status: record.Status | None = None,
        error: str | None = None,
    ) -> None:
        """Write the records' last state, then finish the trackers."""
        try:
            for member in members:
                self._close_one(member, begun, status, error)
        except Lost:
            tracking.drop_all([member.tracker for member in members])
            raise
        ended = [
            (m.tracker, tracking.last_values(m.entry), m.entry.status == "failed") for m in members
        ]
        tracking.finish_all(ended, is_interrupted=status == "interrupted")

    def _close_one(
        self, member: Member, begun: float, status: record.Status | None, error: str | None
    ) -> None:
        entry = member.entry
        if status is not None and not entry.has_trained() and not member.failed:
            entry.status, entry.error = status, error
        if member.failed:
            self.asked.failed[entry.run_id] = entry.error or "failed"
        before = entry.cost.total_seconds or member.earlier_seconds
        entry.cost.total_seconds = round(before + time.perf_counter() - begun, 3)
        entry.ended = record.now()
        try:
            member.write()
        except OSError as unwritable:
            self.asked.failed[entry.run_id] = f"record cannot be written: {unwritable}"
            return
        if entry.has_trained():  # kept so far if the record could not be written before
            checkpoint.remove(member.folder / "checkpoint")

    def _fail(self, jobs: Sequence[Job], error: str) -> None:
        """Give up on runs of which nothing was written."""
        for job in jobs:
            self.asked.failed[job.plan.run_id] = error
            self._tell_one(job, f"failed: {error}")

    def _tell(self, members: Sequence[Member]) -> None:
        for member in members:
            error = self.asked.failed.get(member.entry.run_id)
            self._tell_one(member.job, last_line(member.entry, error))

    def _tell_one(self, job: Job, text: str) -> None:
        self.told.add(job.plan.run_id)
        self.display.done(job.label, text)
