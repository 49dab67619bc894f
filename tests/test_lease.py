"""Who may write the runs of a pack: one holder at a time, and a replaced one writes nothing."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import wait_for

from lorabench import lease
from lorabench.lease import Holder, Lost, Taken

STALE = 1.0  # seconds; a holder beats six times in it


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "pack.json"


def taken(found: Taken | Holder) -> Taken:
    assert isinstance(found, Taken), f"held by {found}"
    return found


@pytest.fixture
def other(place: Path) -> Iterator[int]:
    """Another process that holds the pack."""
    pid = os.fork()
    if not pid:
        lease.take(place, STALE)
        while True:
            time.sleep(10)
    wait_for(place.exists)
    yield pid
    with_no_error = lambda: os.kill(pid, signal.SIGKILL)  # noqa: E731
    try:
        with_no_error()
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def test_a_pack_has_one_holder_until_it_lets_go(place: Path) -> None:
    first = taken(lease.take(place, STALE))
    assert first.replaced is None
    held = lease.take(place, STALE)
    assert isinstance(held, Holder) and held.pid == os.getpid()
    assert lease.holder_of(place) == held
    first.lease.release()
    assert lease.holder_of(place) is None
    second = taken(lease.take(place, STALE))
    assert second.lease.holder.token == first.lease.holder.token + 1
    second.lease.release()
    # Nothing is left but the holder's file, with the last token, and the guard.
    assert sorted(path.name for path in place.parent.iterdir()) == ["pack.json", "pack.lock"]


@pytest.mark.slow
def test_a_holder_that_beats_is_kept_beyond_the_stale_time(place: Path, other: int) -> None:
    time.sleep(2 * STALE)
    held = lease.take(place, STALE)
    assert isinstance(held, Holder) and held.pid == other


def test_a_killed_local_holder_is_replaced_at_once(place: Path, other: int) -> None:
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    begun = time.monotonic()
    found = taken(lease.take(place, STALE))
    assert time.monotonic() - begun < STALE / 2, "long before its heartbeat is stale"
    assert found.replaced is not None and "was killed" in found.replaced
    found.lease.release()


def test_a_killed_holder_whose_parent_has_not_looked_is_replaced_too(
    place: Path, other: int
) -> None:
    os.kill(other, signal.SIGKILL)
    os.waitid(os.P_PID, other, os.WEXITED | os.WNOWAIT)  # a zombie: its process number is taken
    taken(lease.take(place, STALE)).lease.release()


def test_a_suspended_holder_is_replaced_when_it_is_stale_and_then_stops(
    place: Path, tmp_path: Path
) -> None:
    """SIGSTOP and SIGCONT: its process exists and has its kernel lock, and must write no more."""
    verdict = tmp_path / "verdict"
    pid = os.fork()
    if not pid:
        mine = lease.take(place, STALE)
        assert isinstance(mine, Taken)
        while True:
            try:
                mine.lease.check()
            except Lost as lost:
                verdict.write_text(str(lost))
                mine.lease.release()
                os._exit(0)
            time.sleep(0.01)
    wait_for(place.exists)
    os.kill(pid, signal.SIGSTOP)
    begun = time.monotonic()
    found = lease.take(place, STALE)
    assert isinstance(found, Holder), "it was alive a moment ago"
    while isinstance(found, Holder):
        time.sleep(0.05)
        found = lease.take(place, STALE)
    assert time.monotonic() - begun >= STALE * 0.8
    assert "has not answered" in str(found.replaced)
    os.kill(pid, signal.SIGCONT)
    os.waitpid(pid, 0)
    assert f"process {os.getpid()}" in verdict.read_text()
    found.lease.check()  # what the old one did on leaving has not touched ours
    assert lease.holder_of(place) == found.lease.holder
    found.lease.release()


def test_a_holder_on_another_host_is_replaced_by_its_age_alone(place: Path) -> None:
    """No process of this machine says anything about it, and its clock is not asked."""
    place.parent.mkdir()
    content = {
        "token": 7, "host": "elsewhere", "boot_id": "another boot", "pid": os.getpid(),
        "stale_seconds": 30,
    }  # fmt: skip
    place.write_text(json.dumps(content))
    held = lease.take(place)
    assert isinstance(held, Holder) and str(held) == f"process {os.getpid()} on elsewhere"
    now = place.stat().st_mtime
    os.utime(place, (now - 31, now - 31))
    found = taken(lease.take(place))
    assert found.replaced == f"{held} has not answered for 31 s (limit 30 s)"
    assert found.lease.holder.token == 8
    found.lease.release()


def test_a_clock_that_a_killed_process_left_is_removed(place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    old, young = place.parent / ".clock.1.1", place.parent / ".clock.2.2"
    old.touch()
    young.touch()
    os.utime(old, (time.time() - lease.GUARD_TIMEOUT - 5,) * 2)
    taken = lease.take(place, 60)
    assert isinstance(taken, lease.Taken)
    taken.lease.release()
    assert not old.exists() and young.exists()


def test_a_lock_that_a_process_left_while_it_let_go_is_removed(place: Path) -> None:
    """Killed between the last change of its file and the removal of its lock."""
    first = lease.take(place)
    assert isinstance(first, Taken)
    first.lease.release()
    left = place.with_suffix(".1.alive")
    left.touch()
    second = lease.take(place)
    assert isinstance(second, Taken) and second.replaced is None
    assert not left.exists() and place.with_suffix(".2.alive").exists()
    second.lease.release()
    assert not list(place.parent.glob("*.alive"))


def test_looking_at_a_holder_that_lets_go_leaves_no_lock(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = lease.take(place)
    assert isinstance(taken, Taken)
    exists = Path.exists

    def then_let_go(path: Path) -> bool:
        found = exists(path)
        if path.suffix == ".alive" and not taken.lease._released.is_set():
            taken.lease.release()
        return found

    monkeypatch.setattr(Path, "exists", then_let_go)
    assert not lease._process_is_gone(place, taken.lease.holder)
    monkeypatch.undo()
    assert lease.holder_of(place) is None
    assert not list(place.parent.glob("*.alive"))


def test_age_is_told_by_the_file_systems_clock(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host whose clock is an hour ahead takes nobody's pack."""
    found = taken(lease.take(place, STALE))
    before = found.lease.holder
    os.utime(place)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    monkeypatch.setattr(lease, "boot_id", lambda: "another machine")
    assert lease.holder_of(place) == before
    monkeypatch.undo()
    found.lease.release()


MORE_DAMAGED = ["", "[]", '{"token": null}', "\0"]
DAMAGED = ["{", *(pytest.param(text, marks=pytest.mark.slow) for text in MORE_DAMAGED)]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_holder_file_is_nobodys(place: Path, content: str) -> None:
    place.parent.mkdir()
    place.write_text(content)
    taken(lease.take(place, STALE)).lease.release()


def test_of_many_that_take_at_once_one_gets_it(place: Path, tmp_path: Path) -> None:
    pids = []
    for number in range(8):
        pid = os.fork()
        if not pid:
            found = lease.take(place, 60)
            if isinstance(found, Taken):
                (tmp_path / f"won-{number}").touch()
                time.sleep(1)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    assert len(list(tmp_path.glob("won-*"))) == 1


def test_a_holder_whose_file_was_removed_stops_when_another_has_the_pack(place: Path) -> None:
    """The token starts again with the file; it alone would not tell the two apart."""
    first = taken(lease.take(place, 60))
    place.unlink()
    second = taken(lease.take(place, 60))
    with pytest.raises(Lost):
        first.lease.check()
    second.lease.check()
    first.lease.release()
    second.lease.check()
    second.lease.release()
