"""A run while its pack is at work: its record, its logs, its checkpoints.

Every write goes through the lease of the pack: a process that was replaced writes nothing more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from lorabench import checkpoint, data, files, identity, masking, provenance, record, tracking
from lorabench.config import ConfigErrors, first_line, flatten
from lorabench.files import sync, write_atomic
from lorabench.lease import Lease, Lost
from lorabench.progress import Display
from lorabench.stages import Stage, Stages
from lorabench.sweep import Job, PackEntry
from lorabench.worker.watch import Watch

log = logging.getLogger(__name__)

BEST = "best|"  # opens the names of a checkpoint's best weights; no parameter has a | in its name


@dataclass
class Member:
    """One run of a pack that is at work."""

    job: Job
    slot: int  # its place in the pack
    entry: record.Record
    lease: Lease
    watch: Watch
    tracker: tracking.NoTracker = field(default_factory=tracking.NoTracker)
    metrics_file: IO[str] | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    rows: int = 0  # of metrics.jsonl
    earlier_seconds: float = 0.0  # of training, by the commands that this one resumes
    failed: bool = False  # this run alone; its mates go on

    @property
    def folder(self) -> Path:
        return self.job.folder

    @property
    def is_training(self) -> bool:
        """Whether it neither diverged nor stopped early."""
        return self.entry.error is None and self.entry.stopped_early is None

    def write(self) -> None:
        """Write the record."""
        self.lease.check()
        self.entry.write(self.folder)

    def enter(self, stage: Stage, modules: list[str]) -> None:
        """Note what trains from now on: one entry per learning rate and re-warm-up.

        Args:
            modules: what this run trains in any stage.
        """
        from lorabench.train import learning_rate

        rate = learning_rate(self.job.config.trainer, stage.step)
        alike: dict[tuple[float, int], list[str]] = {}
        for module, scale in stage.lr_scale.items():
            alike.setdefault((scale, stage.rewarm_steps.get(module, 0)), []).append(module)
        for (scale, rewarm), found in alike.items():
            mine = [module for module in modules if module in found]
            if mine:
                entry = record.StageStart(
                    step=stage.step, modules=mine, lr_scale=scale, lr=rate * scale,
                    rewarm_steps=rewarm,
                )  # fmt: skip
                self.entry.stages.append(entry)

    def log(self, step: int, row: dict[str, float], **more: float) -> None:
        """Write one row to metrics.jsonl and to the tracker."""
        assert self.metrics_file is not None
        record.append_line(self.metrics_file, {"step": step, **row, **more})
        self.rows += 1
        self.tracker.log(row, step)

    def fail(self, error: BaseException) -> None:
        """Note in the record why this run failed. Keeps no reference to the exception's frames."""
        self.failed = True
        self.entry.status = "failed"
        self.entry.error = what_failed(error)


def what_failed(error: BaseException) -> str:
    """Return an exception as one line."""
    if isinstance(error, ConfigErrors):
        return "; ".join(error.errors)
    return f"{type(error).__name__}: {first_line(error, None)}".removesuffix(
        f": {type(error).__name__}"
    )


def open_members(
    jobs: Sequence[Job], pack: PackEntry, slots: Sequence[Job], lease: Lease
) -> list[Member]:
    """Runs that start, or start again.

    Args:
        slots: every run of the pack.
    """
    blocks = data.blocks([slot.config for slot in slots])
    contents = {slot.plan.run_id: flatten(dataclasses.asdict(slot.config)) for slot in slots}
    members = []
    for job in jobs:
        run = job.plan.run_id
        planned = job.plan.model_copy()
        planned.pack = {
            "id": pack.id,
            "size": len(pack.runs),
            "members": pack.runs,
            "alone": job.plan.alone,
            "blocks": blocks,
            "compiled": pack.compiled,
        }
        mine = flatten(dataclasses.asdict(job.config))
        entry = record.Record(
            run_id=run,
            sweep=job.config.sweep,
            status="running",
            seeds=dataclasses.asdict(job.config.seeds),
            config=dataclasses.asdict(job.config),
            plan=planned.model_dump(),
            mates={
                mate: {key: value for key, value in content.items() if mine.get(key) != value}
                for mate, content in contents.items()
                if mate != run
            },
            provenance={},
            exports=record.Exports.none("the run has not finished"),
            started=record.now(),
        )
        members.append(Member(job, pack.runs.index(run), entry, lease, Watch.of(job.config)))
    return members


def begin(member: Member) -> None:
    """Write what is known of a run before anything is loaded."""
    member.folder.mkdir(parents=True, exist_ok=True)
    clear(member)
    place = member.folder / "record.json"
    if place.exists() and record.read(member.folder) is None:
        place.replace(place.with_suffix(".json.damaged"))
    content = OmegaConf.to_yaml(OmegaConf.create(masking.mask(member.entry.config)))
    member.lease.check()
    write_atomic(member.folder / "config.yaml", content)
    member.write()


def clear(member: Member) -> None:
    """Remove what a holder that was killed or replaced was about to put in place."""
    member.lease.check()
    for left in list(member.folder.rglob(".*.part")):
        files.remove(left)


@contextlib.contextmanager
def own_failure(member: Member) -> Iterator[None]:
    """An exception in this block fails this run only."""
    try:
        yield
    except Lost:
        raise
    except Exception as error:
        log.error("run %s failed\n%s", member.entry.run_id, traceback.format_exc())
        member.fail(error)


class RunLog(logging.FileHandler):
    """A run's own log; if it cannot be written (a full disk), the run's outcome says why."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def logs_of(folders: Sequence[Path]) -> Iterator[None]:
    """Send this process's log to the train.log of each run."""
    root, handlers = logging.getLogger(), []
    try:
        for folder in folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                handler = RunLog(folder / "train.log", encoding="utf-8")
            except OSError:
                continue  # what the run itself cannot write fails it, with this reason
            handlers.append(handler)
            handler.setFormatter(
                logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
            )
            handler.setLevel(logging.INFO)
            root.addHandler(handler)
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def setting_id(entry: record.Record) -> str:
    """Return six hex digits that the seeds of a setting share, and no other runs."""
    from lorabench.compare import tables

    chosen = [tables.setting(entry.config), entry.hashes["base"], entry.hashes["train"]]
    return identity.short_hash(chosen)[:6]


def start_tracker(member: Member, display: Display) -> None:
    config, entry = member.job.config, member.entry
    if not tracking.is_on(config.tracker):
        return
    content = tracking.columns(config, setting_id(entry)) | entry.config
    content |= {"plan": entry.plan, "hashes": entry.hashes}
    mirrored = tracking.Mirrored(
        settings=dataclasses.replace(config.tracker, tags=masking.mask(config.tracker.tags)),
        run_id=entry.run_id,
        sweep=config.sweep,
        name=member.job.label,
        tags=[member.job.plan.model, f"head={config.head.policy}"],
        config=masking.mask(content),
        folder=member.folder.parent,
        notify=display.say,
        notes=masking.mask("\n".join(entry.notes)),
        num_rows=member.rows,
    )
    member.tracker = tracking.start(mirrored)


def open_logs(members: list[Member], start_step: int, display: Display) -> None:
    """Open metrics.jsonl, with the rows that the checkpoint has behind it, and the tracker."""
    for member in members:
        path = member.folder / "metrics.jsonl"
        rows, num_damaged = _kept_rows(path, start_step)
        if num_damaged:
            display.say(f"{path}: {num_damaged} damaged lines are left out")
        if len(rows) < member.rows:
            display.say(f"{path}: {member.rows - len(rows)} of {member.rows} rows are lost")
        member.rows = len(rows)
        member.lease.check()
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
        member.metrics_file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        start_tracker(member, display)


def _kept_rows(path: Path, steps_done: int) -> tuple[list[dict[str, Any]], int]:
    """Rows of an interrupted run's metrics.jsonl that its checkpoint has behind it.

    Returns:
        The rows, and how many lines cannot be read; a last line that a kill cut short is none.
    """
    rows, num_damaged = [], 0
    if steps_done and path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for line in filter(None, lines[:-1]):
            try:
                row = json.loads(line)
                if row["step"] <= steps_done:
                    rows.append(row)
            except (ValueError, TypeError, KeyError):
                num_damaged += 1
    return rows, num_damaged


# --- checkpoints -----------------------------------------------------------------------------


def planned_fingerprint(job: Job, pack: PackEntry) -> dict[str, Any]:
    """What a checkpoint must agree in before anything is loaded."""
    return {
        "run_id": job.plan.run_id,
        "arithmetic": record.ARITHMETIC_VERSION,
        "pack": pack.id,
        "modules": job.plan.lora_modules,
        "packages": provenance.moving(provenance.versions()),
    }


def stale_checkpoints(jobs: Sequence[Job], packs: Sequence[PackEntry]) -> list[str]:
    """Checkpoints that these runs would resume from and must not: every difference, old and new."""
    errors = []
    for pack in packs:
        for job in (job for job in jobs if job.plan.run_id in pack.runs):
            place = job.folder / "checkpoint"
            errors += checkpoint.check(place, pack.id, planned_fingerprint(job, pack))
    return errors


def furthest(members: list[Member], pack: PackEntry, display: Display) -> tuple[int, list[Member]]:
    """The runs that train in this round, and the step they continue from.

    Damaged checkpoints are set aside first.

    All runs of a round are at the same step: the latest that all of them have a checkpoint of. If
    there is none, those with the latest checkpoint go first, and the others follow in another round
    of the same pack.
    """
    damaged = [
        text
        for member in members
        for text in checkpoint.set_damaged_aside(member.folder / "checkpoint")
    ]
    step, together = _furthest(members, pack)
    for text in damaged:
        display.say(f"{text}; {f'continuing from step {step}' if step else 'starting again'}")
    return step, together


def _furthest(members: list[Member], pack: PackEntry) -> tuple[int, list[Member]]:
    steps = {
        member.slot: set(checkpoint.steps(member.folder / "checkpoint", pack.id))
        for member in members
    }
    if common := set.intersection(*steps.values()):
        return max(common), members
    last = max((step for found in steps.values() for step in found), default=0)
    together = [member for member in members if last in steps[member.slot]]
    return (last, together) if last else (0, members)


def resume(members: list[Member], pack: Any, step: int, display: Display) -> None:
    """Load the checkpoints of a step."""
    for member in members:
        place = member.folder / "checkpoint"
        state = checkpoint.load(place, step, member.fingerprint)
        member.watch.weights = {
            name.removeprefix(BEST): one for name, one in state.items() if name.startswith(BEST)
        }
        pack.load_state(member.slot, state)
        member.entry.steps_done = step
        told = checkpoint.told(place, step)
        member.tokens = told["train_tokens"]
        member.earlier_seconds = told["train_seconds"]
        cost = member.entry.cost  # what the next checkpoint tells, should no step be done before it
        cost.train_tokens, cost.train_seconds = told["train_tokens"], told["train_seconds"]
        member.rows = told.get("rows", 0)  # checkpoints before this key have none
        commits = [*told["commits"], *member.entry.provenance["commits"]]
        distinct = [one for i, one in enumerate(commits) if one not in commits[:i]]
        member.entry.provenance["commits"] = distinct
        member.watch.resume(told.get("watch") or {"best": None, "waited": 0, "evaluated": step})
        member.entry.best = member.watch.best
        if stop := told["stopped"]:
            member.entry.steps_done, member.entry.error = stop["steps_done"], stop["error"]
            member.entry.stopped_early = stop.get("early")
            pack.stop(member.slot)
        modules = pack.modules(member.slot)
        for stage in Stages(member.job.config.stages, modules).all:
            if stage.step < step:
                member.enter(stage, modules)
    display.resumed(step * len(members))


def keep_checkpoint(members: list[Member], pack: Any, step: int) -> None:
    """Keep all members' checkpoints of this step: written first, then put in place together."""
    for member in members:
        entry = member.entry
        stop = {"steps_done": entry.steps_done, "error": entry.error, "early": entry.stopped_early}
        told = {
            # Before its mates: the steps it did, and why.
            "stopped": None if member.is_training else stop,
            "watch": member.watch.told(),
            "train_seconds": entry.cost.train_seconds,
            "train_tokens": entry.cost.train_tokens,
            "rows": member.rows,
            "commits": entry.provenance["commits"],
        }
        member.lease.check()
        place = member.folder / "checkpoint"
        best = {f"{BEST}{name}": one for name, one in member.watch.weights.items()}
        state, token = pack.state(member.slot) | best, member.lease.holder.token
        checkpoint.write(place, state, step, member.fingerprint, told, token)
        sync(member.folder / "metrics.jsonl")  # a checkpoint has its rows behind it
    for member in members:
        member.lease.check()
        checkpoint.commit(member.folder / "checkpoint", member.lease.holder.token)


def put_in_place(part: Path, place: Path, lease: Lease) -> None:
    """Rename a folder that is written whole to its name, replacing what an earlier try left."""
    lease.check()
    shutil.rmtree(place, ignore_errors=True)
    os.replace(part, place)
    sync(place.parent)
