"""Without root's power over modes: what a test forbids is forbidden to it too."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER (capabilities(7))
OVER_MODES = 1 << 1 | 1 << 2 | 1 << 3
VERSION_3 = 0x20080522


class Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class Sets(ctypes.Structure):
    _fields_ = [
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    ]


@contextlib.contextmanager
def none_over_modes() -> Iterator[None]:
    """Let this thread do only what modes allow; root gets its power back afterwards."""
    if not sys.platform.startswith("linux"):
        assert os.geteuid() != 0, "as root, modes forbid nothing here: run the tests as a user"
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = Header(VERSION_3, 0), (Sets * 2)()
    assert libc.capget(ctypes.byref(header), sets) == 0
    before = sets[0].effective
    sets[0].effective = before & ~OVER_MODES
    assert libc.capset(ctypes.byref(header), sets) == 0
    try:
        yield
    finally:
        sets[0].effective = before
        assert libc.capset(ctypes.byref(header), sets) == 0


@contextlib.contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    """Give a file or folder a mode, which is put back: pytest removes its folders."""
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        with none_over_modes():
            yield
    finally:
        path.chmod(before)


def forbid_writing(place: Path) -> None:
    """In the child: what would make a file or a folder below fails as on a read-only file system.

    For machines that let their user mount nothing. What libraries write natively is not seen.
    """

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        makes = event == "os.mkdir" or (event == "open" and arguments[2] & os.O_CREAT)
        if makes and str(arguments[0]).startswith(str(place)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

    sys.addaudithook(heard)


def mount_read_only(place: Path) -> None:
    """Mount an empty read-only file system, for this process alone.

    Raises:
        OSError: the machine lets this user make no namespace.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts, read_only = 0x10000000, 0x00020000, 1
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(new_user | new_mounts) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    if libc.mount(b"none", os.fsencode(place), b"tmpfs", read_only, None) != 0:
        raise OSError(ctypes.get_errno(), "mount")
