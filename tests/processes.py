"""Processes of their own: forks of this one, and of an interpreter that has nothing of this one.

A fork starts at once; a fresh interpreter needs seconds to import torch and PEFT. What is started
so can be killed, stopped and waited for like any other process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Process:
    """A command line at work; what it prints, both streams, goes to a file."""

    pid: int
    output: Path
    code: int | None = None

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = 120) -> int:
        wait_for(lambda: self.poll() is not None, seconds)
        assert self.code is not None
        return self.code

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


def wait_for(holds: Callable[[], Any], seconds: float = 120) -> None:
    """Wait until something holds, looking often."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.02)


def start(output: Path, *words: Any, before: Callable[[], Any] | None = None) -> Process:
    """Run `lorabench WORDS` in a fork of this process.

    Args:
        output: a file, or a folder to write one into.
        before: called in the child first, to break something in it.
    """
    from lorabench import cli

    return start_call(output, lambda: cli.main([str(word) for word in words]), before=before)


def start_call(
    output: Path, function: Callable[[], int], before: Callable[[], Any] | None = None
) -> Process:
    """Run a function, which returns the exit code, in a fork of this process.

    Args:
        output, before: as for `start`.
    """
    if output.is_dir():
        output = output / f"said-{time.monotonic_ns()}.txt"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Process(pid, output)
    code = 70
    try:  # the child: it must never return into pytest
        with open(output, "w", buffering=1) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
            if before is not None:
                before()
            code = function()
            with contextlib.suppress(OSError):  # of tests that close them
                sys.stdout.flush()
                sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@contextlib.contextmanager
def running(
    output: Path, *words: Any, before: Callable[[], Any] | None = None
) -> Iterator[Process]:
    """A process that is gone when the block ends, whatever happens in it."""
    process = start(output, *words, before=before)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send(signal.SIGKILL)
            process.wait()


def slowly(seconds: float = 0.1) -> None:
    """In the child: steps that others can be faster than."""
    from lorabench.progress import Display

    step = Display.step

    def slow(self: Display, *rest: Any) -> None:
        time.sleep(seconds)
        step(self, *rest)

    Display.step = slow  # type: ignore[method-assign]


SERVER = """
import gc, json, os, sys, traceback

gc.disable()
import peft, torch, transformers

gc.freeze()
gc.enable()
for line in sys.stdin:
    asked = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["-c", *asked["arguments"]]
        torch.set_num_threads(1)
        exec(asked["code"], {"__name__": "__main__"})
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
"""


class Elsewhere:
    """An interpreter with another hash seed, where PEFT is imported and lorabench is not.

    Each call is a fork of it.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        own = os.environ.get("PYTHONHASHSEED")
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=os.environ | {"PYTHONHASHSEED": "2" if own == "1" else "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str, *arguments: Any) -> str:
        """What the code printed, which has the arguments in `sys.argv[1:]`; it must not fail."""
        asked: dict[str, Any] = {"code": code, "arguments": [str(one) for one in arguments]}
        asked |= {name: str(self.place / name) for name in ("out", "err")}
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        assert self.server.stdout.readline() == "0\n", (self.place / "err").read_text()
        return (self.place / "out").read_text()

    def close(self) -> None:
        self.server.kill()
        self.server.communicate()
