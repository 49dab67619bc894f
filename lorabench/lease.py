"""Who may write the runs of a pack: one holder at a time, replaced when it stops beating.

The holder's file says who holds the pack (host, boot id, pid) under which token, and its
modification time is the holder's heartbeat. A file lock guards only the change of holder. A second
one is held for as long as its process lives: where the kernel keeps it, a killed process on this
machine is known to be gone at once. Everywhere else the age of the heartbeat decides, measured by
the file system's clock: two hosts' clocks need not agree.

Every change of holder raises the token. A holder compares it before every write; one that was
suspended for too long finds another token, and stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from lorabench.files import replace, write_atomic

STALE_SECONDS = 120.0  # NFS clients may cache a file's time for a minute
BEATS = 6  # heartbeats in the time after which a holder is replaced
SLOWEST_BEAT = 10.0  # seconds
RETRIES, RETRY_SECONDS = 10, 0.1  # of a share that does not answer for a moment
GUARD_TIMEOUT = 60.0  # seconds to wait for the few file operations of a change of holder


class Lost(Exception):
    """Another process has taken over: nothing more may be written."""


@dataclass
class Holder:
    """Who holds a pack, as its file says."""

    token: int
    host: str
    boot_id: str
    pid: int
    stale_seconds: float  # without a beat for this long, it is replaced
    nonce: str = ""  # tells two holders apart even if the token was lost with its file

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass
class Taken:
    """A pack was free, or its holder is gone: the lease, and whom it was taken from."""

    lease: Lease
    replaced: str | None  # how the previous holder ended; None if it let go


class Lease:
    """The right to write the runs of a pack, kept alive by a thread until it is released.

    Raises:
        Lost: from `check`, when another process has taken over.
    """

    def __init__(self, path: Path, holder: Holder, process_lock: FileLock):
        self.path, self.holder = path, holder
        self._process_lock = process_lock
        self._released = threading.Event()
        self._beat = threading.Thread(target=self._keep_beating, daemon=True, name="lease")
        self._beat.start()

    def check(self) -> None:
        """Refuse to go on if another process holds the pack by now.

        Raises:
            Lost: it does.
        """
        now = _read_again(self.path)
        if now is None:
            raise Lost(f"'{self.path}' is gone; nothing more is written here")
        if now.nonce != self.holder.nonce:
            by = f"by {now} " if now.pid else ""
            raise Lost(
                f"taken over {by}while this process did not answer for more than "
                f"{self.holder.stale_seconds:g} s; nothing more is written here"
            )

    def _keep_beating(self) -> None:
        pause = min(SLOWEST_BEAT, self.holder.stale_seconds / BEATS)
        while not self._released.wait(pause):
            now = _read(self.path)
            if now is not None and now.nonce != self.holder.nonce:
                return
            with contextlib.suppress(OSError):  # a share that is away for a moment
                os.utime(self.path)

    def release(self) -> None:
        """Let go, unless another process has taken over."""
        self._released.set()
        self._beat.join()
        with contextlib.suppress(Timeout, OSError), _guard(self.path):
            now = _read(self.path)
            if now is not None and now.nonce == self.holder.nonce:
                write_atomic(self.path, json.dumps({"token": now.token}) + "\n")
        self._process_lock.release(force=True)
        with contextlib.suppress(OSError):
            os.unlink(self._process_lock.lock_file)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def take(path: Path, stale_seconds: float = STALE_SECONDS) -> Taken | Holder:
    """Take a pack, or say who holds it.

    Args:
        path: the holder's file, in a folder of its own kind.
        stale_seconds: after this time without a beat of ours, others may take over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _guard(path):
        before = _read_again(path) if path.exists() else None
        ended = None
        if before is not None and before.pid:
            ended = _how_it_ended(path, before)
            if ended is None:
                return before
            _process_lock(path, before.token).unlink(missing_ok=True)
        _remove_old_locks(path)
        token, process_lock = _next_token(path, before.token if before else 0)
        host, pid = socket.gethostname(), os.getpid()
        holder = Holder(token, host, boot_id(), pid, stale_seconds, secrets.token_hex(8))
        replace(path, json.dumps(asdict(holder)) + "\n")
        _remove_old_clocks(path)
    return Taken(Lease(path, holder, process_lock), ended)


def _next_token(path: Path, last: int) -> tuple[int, FileLock]:
    """A token that nobody has, and the lock that says that its process lives."""
    token = last
    while True:
        token += 1
        lock = FileLock(_process_lock(path, token))
        with contextlib.suppress(Timeout):  # of a holder whose own file was removed
            lock.acquire(blocking=False)
            return token, lock


def holder_of(path: Path) -> Holder | None:
    """Who holds a pack now; None if nobody does, or only a process that is gone."""
    holder = _read(path)
    if holder is None or not holder.pid or _how_it_ended(path, holder) is not None:
        return None
    return holder


def _how_it_ended(path: Path, holder: Holder) -> str | None:
    """Why a holder is to be replaced; None while it beats."""
    if holder.boot_id == boot_id() and _process_is_gone(path, holder):
        return f"{holder} was killed"
    silent = _age(path)
    if silent > holder.stale_seconds:
        return f"{holder} has not answered for {silent:.0f} s (limit {holder.stale_seconds:g} s)"
    return None


def _process_is_gone(path: Path, holder: Holder) -> bool:
    """Whether the kernel has dropped the lock that the holder's process keeps while it lives."""
    place = _process_lock(path, holder.token)
    if not place.exists():
        return False
    lock = FileLock(place)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError):
        return False
    lock.release()
    now = _read(path)
    if now is not None and now.nonce != holder.nonce:
        # It let go a moment ago, and looking at its lock has made the file again.
        place.unlink(missing_ok=True)
        return False
    return True


def _age(path: Path) -> float:
    """Seconds since a file was touched, by the clock of the file system it lies on."""
    probe = path.with_name(f".clock.{os.getpid()}.{threading.get_ident()}")
    try:
        probe.touch()
        os.utime(probe)
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        with contextlib.suppress(OSError):  # a share that is mounted for reading
            probe.unlink(missing_ok=True)


def _remove_old_clocks(path: Path) -> None:
    """Remove what processes that were killed while they read the clock have left.

    Args:
        path: a file written just now: its time is the file system's.
    """
    with contextlib.suppress(OSError):
        now = path.stat().st_mtime
        for clock in path.parent.glob(".clock.*"):
            if now - clock.stat().st_mtime > GUARD_TIMEOUT:
                clock.unlink(missing_ok=True)


def _remove_old_locks(path: Path) -> None:
    """Remove what processes that were killed while they let go have left."""
    for place in path.parent.glob(f"{path.stem}.*.alive"):
        with contextlib.suppress(Timeout, OSError), FileLock(place, timeout=0):
            place.unlink(missing_ok=True)


def _guard(path: Path) -> FileLock:
    return FileLock(path.with_suffix(".lock"), timeout=GUARD_TIMEOUT)


def _process_lock(path: Path, token: int) -> Path:
    return path.with_suffix(f".{token}.alive")


def _read_again(path: Path) -> Holder | None:
    """Read the holder's file, again if need be: a share may not answer for a moment."""
    for _ in range(RETRIES):
        if (found := _read(path)) is not None:
            return found
        time.sleep(RETRY_SECONDS)
    return None


def _read(path: Path) -> Holder | None:
    """The holder's file; pid 0 where the last one has let go."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Holder(
            token=int(content["token"]),
            host=str(content.get("host", "")),
            boot_id=str(content.get("boot_id", "")),
            pid=int(content.get("pid", 0)),
            stale_seconds=float(content.get("stale_seconds", STALE_SECONDS)),
            nonce=str(content.get("nonce", "")),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def boot_id() -> str:
    """What names this boot of this machine, whatever a container calls its host."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
