"""The sweep folder: which runs there are, in which packs, who asked for them, how far they are.

`sweep.json` lists every run, every pack and every command ever asked of the folder. Commands and
splits of packs are added under a lock; nothing is removed. A run's record says how far it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field

from lorabench import lease, masking, record
from lorabench.config import ConfigErrors
from lorabench.files import replace
from lorabench.record import Record
from lorabench.sweep.jobs import Job

SCHEMA_VERSION = 2
LOCK_TIMEOUT = 120.0  # seconds to wait for another process that adds to sweep.json


class Strict(BaseModel):
    """A part of sweep.json; a key that this version does not know is damage."""

    model_config = ConfigDict(extra="forbid")


class RunEntry(Strict):
    """One run: the overrides that tell it from its mates, and its resolved config."""

    label: str
    config: dict[str, Any]  # of the newest command: another one may ask for other scores


class PackEntry(Strict):
    """Runs that train together, in the order of their slots: a run's bits depend on the shape."""

    id: str
    runs: list[str]
    split_from: str | None = None  # the pack that this one is a part of
    reason: str | None = None  # why that pack was split
    compiled: bool = False  # by torch.compile: other bits, so it is fixed as the shape is


class CommandEntry(Strict):
    """A command that asked for runs of this folder."""

    words: list[str]
    started: str
    runs: list[str]


class LookEntry(Strict):
    """A look at the sweep while seeds are added to it, fixed before the first of them."""

    seeds: list[int]  # values of the config key `seed`
    level: float  # share of sweeps that may have a false verdict at this look
    taken: str | None = None  # when it was


class SettlingEntry(Strict):
    """What `lorabench settle` was asked, and its looks."""

    vary: list[str] = Field(default_factory=list)
    select: str | None = None
    baseline: dict[str, str] = Field(default_factory=dict)
    metric: str
    margin: float | None = None
    looks: list[LookEntry]
    started: str


class SweepFile(Strict):
    """sweep.json."""

    schema_version: int = SCHEMA_VERSION
    runs: dict[str, RunEntry] = Field(default_factory=dict)
    packs: list[PackEntry] = Field(default_factory=list)
    commands: list[CommandEntry] = Field(default_factory=list)
    settling: SettlingEntry | None = None

    def current_packs(self) -> list[PackEntry]:
        """The packs that were not split, in the order in which they were asked for."""
        split = {pack.split_from for pack in self.packs}
        return [pack for pack in self.packs if pack.id not in split]


def _version(text: str) -> int:
    content = json.loads(text)
    return int(content.get("schema_version", 1)) if isinstance(content, dict) else 1


def entry_of(job: Job) -> RunEntry:
    """A planned run as sweep.json lists it."""
    return RunEntry(label=job.label, config=dataclasses.asdict(job.config))


def pack_id(runs: Iterable[str]) -> str:
    """First 12 hex digits of sha256 over the run ids, in the order of their slots."""
    return hashlib.sha256(" ".join(runs).encode()).hexdigest()[:12]


class SweepFolder:
    """The folder of one sweep."""

    def __init__(self, path: Path):
        self.path = path
        self.locks = path / ".locks"

    def read(self) -> SweepFile:
        """The content of sweep.json; empty if there is none yet.

        Raises:
            ConfigErrors: it is damaged, or written by a newer lorabench.
        """
        path = self.path / "sweep.json"
        try:
            text = path.read_text(encoding="utf-8")
            if (version := _version(text)) > SCHEMA_VERSION:
                raise ConfigErrors(
                    f"sweep.json: must have a schema version of at most {SCHEMA_VERSION}; '{path}' "
                    f"has {version}: it was written by a newer lorabench; update this one"
                )
            found = SweepFile.model_validate_json(text)
            unknown = [run for pack in found.packs for run in pack.runs if run not in found.runs]
            if unknown:
                raise ValueError(f"a pack has the run {unknown[0]}, which is not in it")
        except FileNotFoundError:
            return SweepFile()
        except ConfigErrors:
            raise
        except (ValueError, OSError) as error:
            raise ConfigErrors(
                f"sweep.json: must be as lorabench wrote it; '{path}' is damaged "
                f"({str(error).splitlines()[0]}); restore it, or move it away: finished runs are "
                f"kept, interrupted ones start again in new packs"
            ) from error
        return found

    def settled(self) -> SweepFile:
        """Read when nobody is about to write.

        A worker that holds a pack and finds it here can rely on it: whoever splits a pack looks
        at its holder and writes under the same lock.
        """
        with self._lock():
            return self.read()

    # --- adding --------------------------------------------------------------------------

    def add(
        self,
        runs: dict[str, RunEntry],
        packs: Sequence[Sequence[str]],
        words: Sequence[str],
        compiled: Collection[str] = (),
    ) -> SweepFile:
        """Add a command with its runs; those that are in no pack yet form the packs given.

        A pack of which nothing has begun, and of which the command wants only some runs, is split:
        the command need not carry the others along.

        Args:
            packs: run ids of the packs that the runs would form in an empty folder.
            words: of the command line.
            compiled: runs whose packs are compiled.
        """
        with self._lock():
            content = self.read()
            for one in content.current_packs():
                wanted = [run for run in one.runs if run in runs]
                if wanted and len(wanted) < len(one.runs) and not self._has_begun(one):
                    rest = [run for run in one.runs if run not in runs]
                    content.packs += _parts(one, [wanted, rest], "a command wanted some of it")
            content.runs |= runs
            packed = {run for pack in content.packs for run in pack.runs}
            for pack in packs:
                if new := [run for run in pack if run not in packed]:
                    is_compiled = set(new) <= set(compiled)
                    content.packs.append(PackEntry(id=pack_id(new), runs=new, compiled=is_compiled))
            content.commands.append(
                CommandEntry(words=list(words), started=record.now(), runs=list(runs))
            )
            self._write(content)
            return content

    def split(self, pack: PackEntry, parts: Sequence[Sequence[str]], reason: str) -> None:
        """Replace a pack, which the caller holds, by parts of it."""
        with self._lock():
            content = self.read()
            content.packs += _parts(pack, parts, reason)
            self._write(content)

    def begin_settling(self, entry: SettlingEntry) -> SettlingEntry:
        """Fix the looks; those of another process that has taken one hold."""
        with self._lock():
            content = self.read()
            before = content.settling
            if before is None or not any(look.taken for look in before.looks):
                content.settling = entry
                self._write(content)
            assert content.settling is not None
            return content.settling

    def take_look(self, number: int) -> SettlingEntry:
        """Note that a look, counted from 0, is taken now."""
        with self._lock():
            content = self.read()
            assert content.settling is not None
            look = content.settling.looks[number]
            look.taken = look.taken or record.now()
            self._write(content)
            return content.settling

    def _has_begun(self, pack: PackEntry) -> bool:
        if lease.holder_of(self.lease_path(pack)) is not None:
            return True
        return any((self.path / run / "record.json").exists() for run in pack.runs)

    def _lock(self) -> FileLock:
        self.locks.mkdir(parents=True, exist_ok=True)
        return FileLock(self.locks / "sweep.lock", timeout=LOCK_TIMEOUT)

    def base_lock(self, id: str) -> FileLock:
        """The lock of an entry of base/ while its base is scored; nobody waits for it.

        Entering raises filelock.Timeout if another process holds it.
        """
        self.locks.mkdir(parents=True, exist_ok=True)
        return FileLock(self.locks / f"base-{id}.lock", timeout=0)

    def _write(self, content: SweepFile) -> None:
        content.schema_version = SCHEMA_VERSION
        masked = SweepFile.model_validate(masking.mask(content.model_dump()))
        replace(self.path / "sweep.json", masked.model_dump_json(indent=1) + "\n")

    # --- how far it is -------------------------------------------------------------------

    def lease_path(self, pack: PackEntry) -> Path:
        """The file that says who holds a pack."""
        return self.locks / f"{pack.id}.json"

    def memory_path(self, pack: PackEntry) -> Path:
        """The file that says how full memory was when processes died that trained a pack."""
        return self.locks / f"{pack.id}.memory.json"

    def planned(self) -> list[tuple[Path, Record]]:
        """The runs that have no record yet, in the order in which they were asked for."""
        content = self.read()
        packs = {run: pack for pack in content.current_packs() for run in pack.runs}
        return [
            (
                self.path / run,
                Record(
                    run_id=run,
                    sweep=entry.config["sweep"],
                    status="planned",
                    config=entry.config,
                    seeds=entry.config["seeds"],
                    plan={"pack": {"id": packs[run].id, "size": len(packs[run].runs)}},
                    provenance={},
                ),
            )
            for run, entry in content.runs.items()
            if not (self.path / run / "record.json").exists()
        ]

    def record(self, run: str) -> Record | None:
        """The record of a run; None while it is only planned."""
        return record.read(self.path / run)

    def holder(self, run: str) -> lease.Holder | None:
        """Return the process that holds a run's pack, if any."""
        for pack in self.read().current_packs():
            if run in pack.runs:
                return lease.holder_of(self.lease_path(pack))
        return None


def _parts(pack: PackEntry, parts: Sequence[Sequence[str]], reason: str) -> list[PackEntry]:
    return [
        PackEntry(
            id=pack_id(runs),
            runs=list(runs),
            split_from=pack.id,
            reason=reason,
            compiled=pack.compiled,
        )
        for runs in parts
        if runs
    ]
