"""A run while its pack trains: its record, its logs, its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lorabench import checkpoint, plan, record, tracking
from lorabench.config import ConfigErrors
from lorabench.progress import Display, clock
from lorabench.stages import Stage, Stages
from lorabench.sweep import Job

log = logging.getLogger(__name__)


@dataclass
class Member:
    """One run while its pack trains."""

    job: Job
    entry: record.Record
    tracker: tracking.NoTracker = field(default_factory=tracking.NoTracker)
    metrics_file: IO[str] | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    earlier_seconds: float = 0.0  # of training, by the commands that this one resumes
    error: Exception | None = None  # what went wrong with this run alone

    @property
    def folder(self) -> Path:
        return self.job.folder

    def enter(self, stage: Stage, modules: list[str]) -> None:
        """Note what trains from now on: one entry a learning rate.

        Args:
            modules: what this run trains in any stage.
        """
        from lorabench.train import learning_rate

        rate = learning_rate(self.job.config.trainer, stage.step)
        for scale in dict.fromkeys(stage.lr_scale.values()):
            mine = [module for module in modules if stage.lr_scale.get(module) == scale]
            if mine:
                entry = record.StageStart(
                    step=stage.step, modules=mine, lr_scale=scale, lr=rate * scale
                )
                self.entry.stages.append(entry)

    def log(self, step: int, row: dict[str, float], **more: float) -> None:
        """One row, in the file and in the tracker."""
        assert self.metrics_file is not None
        record.append_line(self.metrics_file, {"step": step, **row, **more})
        self.tracker.log(row, step)


def pack_id(jobs: list[Job]) -> str:
    """First 12 hex digits of sha256 over the run ids, in order."""
    ids = " ".join(job.plan.run_id for job in jobs)
    return hashlib.sha256(ids.encode()).hexdigest()[:12]


def planned_fingerprint(job: Job, jobs: list[Job]) -> dict[str, Any]:
    """What a checkpoint must agree in before anything is loaded."""
    packages = record.versions()
    return {
        "run_id": job.plan.run_id,
        "pack": pack_id(jobs),
        "config": plan.deciding(job.config),
        "modules": job.plan.lora_modules,
        "packages": {name: packages.get(name) for name in ("torch", "peft", "transformers")},
    }


def stale_checkpoints(packs: list[list[Job]]) -> list[str]:
    """Checkpoints that the packs would resume from and must not: every difference, old and new."""
    return [
        error
        for jobs in packs
        for job in jobs
        for error in checkpoint.check(
            job.folder / "checkpoint", pack_id(jobs), planned_fingerprint(job, jobs)
        )
    ]


class RunLog(logging.FileHandler):
    """A run's own log; where it cannot be written (a full disk), the run's outcome says why."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def log_to(path: Path) -> logging.Handler:
    """Send this process's log to a run's own file."""
    handler = RunLog(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    return handler


def open_member(job: Job, jobs: list[Job]) -> Member:
    planned = job.plan.model_copy()
    planned.pack = {
        "id": pack_id(jobs),
        "size": len(jobs),
        "members": [mate.plan.run_id for mate in jobs],
        "alone": job.plan.alone,
    }
    return Member(
        job,
        record.Record(
            run_id=job.plan.run_id,
            sweep=job.config.sweep,
            status="running",
            seeds=dataclasses.asdict(job.config.seeds),
            config=dataclasses.asdict(job.config),
            plan=planned.model_dump(),
            provenance={},
            exports=record.Exports.none("the run has not finished"),
            process=record.this_process(),
            started=record.now(),
        ),
    )


def close(member: Member, seconds: float) -> None:
    """Write the record's last state."""
    entry = member.entry
    if member.error is not None:
        first = str(member.error).strip().splitlines()
        entry.status = "failed"
        entry.error = f"{type(member.error).__name__}: {first[0] if first else ''}".rstrip(": ")
        if isinstance(member.error, ConfigErrors):
            entry.error = "; ".join(member.error.errors)
    if entry.status == "finished":
        entry.exports = record.Exports(**entry.plan["exports"])
    entry.cost.total_seconds = round(member.earlier_seconds + seconds, 3)
    entry.ended = record.now()
    entry.process = {}
    try:
        entry.write(member.folder)
    except OSError as error:
        entry.status, entry.error = "failed", f"record cannot be written: {error}"


def last_line(entry: record.Record) -> str:
    if entry.status == "failed":
        return f"failed: {entry.error}"
    scores = "".join(
        f"  {name} {'not finite' if m.value is None else format(m.value, '.4f')}"
        for name, m in entry.metrics.get("test", {}).items()
    )
    size = entry.plan["pack"]["size"]
    packed = f" in a pack of {size}" if size > 1 else ""
    return f"{entry.status}{scores}  {clock(entry.cost.total_seconds)}{packed}"


@contextlib.contextmanager
def own_failure(member: Member) -> Any:
    """What fails here is this run's, not its pack's."""
    try:
        yield
    except Exception as error:
        log.error("run %s failed\n%s", member.entry.run_id, traceback.format_exc())
        member.error = error


def summary(member: Member) -> dict[str, float]:
    scores = {
        f"{split}/{name}": metric.value
        for split, found in member.entry.metrics.items()
        for name, metric in found.items()
        if metric.value is not None
    }
    return scores | {
        "trainable_parameters": member.job.plan.trainable_parameters,
        "train_seconds": member.entry.cost.train_seconds,
    }


def open_logs(members: list[Member], start_step: int, display: Display) -> None:
    for member in members:
        path = member.folder / "metrics.jsonl"
        kept = _kept_rows(path, start_step)
        member.metrics_file = open(path, "w", encoding="utf-8")  # noqa: SIM115
        for row in kept:
            record.append_line(member.metrics_file, row)
        config = member.job.config
        member.tracker = tracking.start(
            config.tracker,
            run_id=member.entry.run_id,
            sweep=config.sweep,
            name=member.job.label,
            tags=[member.job.plan.model, f"head={config.head.policy}"],
            config=member.entry.config,
            folder=member.folder.parent,
            notify=display.say,
        )


def _kept_rows(path: Path, steps_done: int) -> list[dict[str, Any]]:
    """Rows of an interrupted run's metrics.jsonl that its checkpoint has behind it."""
    rows = []
    if steps_done and path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break  # the line a kill cut short
            if row["step"] <= steps_done:
                rows.append(row)
    return rows


def resume(members: list[Member], pack: Any, display: Display) -> int:
    """Load the latest step that every member has a checkpoint of; 0 where there is none."""
    steps = [
        set(checkpoint.steps(member.folder / "checkpoint", member.fingerprint["pack"]))
        for member in members
    ]
    common = set.intersection(*steps)
    if not common:
        return 0
    step = max(common)
    for run, member in enumerate(members):
        state = checkpoint.load(member.folder / "checkpoint", step, member.fingerprint)
        pack.load_state(run, state)
        member.entry.steps_done = step
        told = checkpoint.told(member.folder / "checkpoint", step)
        cost = told.get("cost", {})  # checkpoints before this key have none
        member.tokens = cost.get("train_tokens", 0)
        member.earlier_seconds = cost.get("train_seconds", 0.0)
        if stop := told.get("stopped"):
            member.entry.steps_done, member.entry.error = stop["steps_done"], stop["error"]
            pack.stop(run)
        modules = pack.modules(run)
        for stage in Stages(member.job.config.stages, modules).all:
            if stage.step < step:
                member.enter(stage, modules)
    display.resumed(step * len(members))
    return step


def keep_checkpoint(members: list[Member], pack: Any) -> None:
    """All members' checkpoints of this step: written first, then put in place together."""
    step = max(member.entry.steps_done for member in members)  # a stopped run did fewer
    for run, member in enumerate(members):
        entry = member.entry
        stop = {"steps_done": entry.steps_done, "error": entry.error} if entry.error else None
        place = member.folder / "checkpoint"
        cost = {
            "train_seconds": entry.cost.train_seconds,
            "train_tokens": entry.cost.train_tokens,
        }
        checkpoint.write(place, pack.state(run), step, member.fingerprint, stop, cost)
    for member in members:
        checkpoint.commit(member.folder / "checkpoint")
