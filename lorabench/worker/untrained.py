"""Scores the untrained base, once per base and evaluation of a sweep folder.

A worker does so while the base of a pack is still loaded, or at its end for runs that are kept.
Whatever goes wrong here is a warning: no run depends on it.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import traceback

from filelock import Timeout

from lorabench import base_scores, files, machine
from lorabench import model as base_model
from lorabench.base_scores import BaseEvaluation
from lorabench.hashes import fresh_hash
from lorabench.progress import Display, clock
from lorabench.record import Evaluation
from lorabench.sweep import Job, SweepFolder
from lorabench.worker.members import logs_of, what_failed
from lorabench.worker.outcome import test_scores
from lorabench.worker.scoring import evaluation_of, score_packed, write_predictions
from lorabench.worker.shared import Shared

log = logging.getLogger(__name__)


class UntrainedBase:
    """Scores the bases of one sweep folder for a command, which tries each once."""

    def __init__(self, folder: SweepFolder, shared: Shared, display: Display):
        self.folder, self.shared, self.display = folder, shared, display
        self._seen: set[str] = set()  # entries that are there, or that this command has tried

    def score_for(self, job: Job) -> None:
        """Score a run's base as the run was scored, unless the folder has that already."""
        config = dataclasses.asdict(job.config)
        found = job.record()
        scored = found.evaluation(job.plan.evaluation_id) if found else None
        checksum = found.hashes.get("base") if found else None
        if scored is None or checksum is None or base_scores.why_none(config) is not None:
            return
        tokenizer = base_scores.tokenizer_of(job.plan.contents)
        conditions = base_scores.conditions_of(config)
        id = base_scores.id_of(checksum, tokenizer, conditions, job.plan.evaluation)
        if id in self._seen:
            return
        self._seen.add(id)
        if base_scores.read(self.folder.path, id) is not None:
            return
        error = ""
        with logs_of([job.folder]):
            try:
                with self.folder.base_lock(id):
                    if base_scores.read(self.folder.path, id) is not None:
                        return  # another process was faster
                    evaluation = self._score(job, id, checksum, scored.batch_size)
                    BaseEvaluation(
                        id=id,
                        model=job.plan.model,
                        base=checksum,
                        tokenizer=tokenizer,
                        conditions=conditions,
                        evaluation=evaluation,
                    ).write(self.folder.path)
            except Timeout:  # another process is scoring it: look again later
                self._seen.discard(id)
                return
            except Exception as failed:
                log.error("untrained base: not scored\n%s", traceback.format_exc())
                error = what_failed(failed)
        # Outside the handler: the exception held the frames, and they the tensors.
        if error:
            gc.collect()
            machine.release_memory()
            self.display.say(
                f"warning: the untrained base {job.plan.model} is not scored, the next command "
                f"tries again: {error}"
            )
        else:
            scores = test_scores({split: one.metrics for split, one in evaluation.splits.items()})
            self.display.say(
                f"untrained base {job.plan.model}{scores}  {clock(evaluation.seconds)}"
            )

    def _score(self, job: Job, id: str, checksum: str, batch_size: int) -> Evaluation:
        """Score the base and write its predictions.

        Args:
            checksum: of the base that the run was trained on.
            batch_size: that the run was scored with; memory may not have sufficed for more.
        Raises:
            RuntimeError: the base is another one, or did not stay as it was.
        """
        from lorabench.pack import ModulePack

        machine.configure_torch(job.config)
        device = machine.choose_device(job.config.trainer.device)
        base, found = self.shared.base(job, device)
        if found != checksum:
            raise RuntimeError(f"it has checksum {found[:12]}, that of the run {checksum[:12]}")
        pack = ModulePack.of_base(base, job.config, device)
        scored = score_packed(pack, job, batch_size, self.shared, self.display)
        if base_model.checksum(base) != checksum:
            self.shared.drop_base()
            raise RuntimeError("the frozen base changed while it was scored")
        place = base_scores.place_of(self.folder.path, id).with_suffix(".parquet")
        for left in place.parent.glob(f".{place.name}.*.part"):  # by a process that was killed
            files.remove(left)
        os.replace(write_predictions(place, scored, 0, os.getpid()), place)
        files.sync(place.parent)
        return evaluation_of(job, scored, 0, place.name, fresh_hash(place))
