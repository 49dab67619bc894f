"""`lorabench watch`: whole pages while a sweep runs, by whatever process."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GRID, SMOKE, say
from pages import Parsed, write_rows
from sweeps import write_run

from lorabench import record


@contextlib.contextmanager
def watching(folder: Path, before: Callable[[], Any] | None = None) -> Iterator[Any]:
    command = [sys.executable, "-m", "lorabench", "watch", str(folder), "--seconds", "0.5"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, preexec_fn=before
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def going(folder: Path) -> record.Record:
    """A sweep of a finished run and one that goes on."""
    for seed in range(2):
        run = write_run(folder, "lora", 16, seed, {"nll": np.arange(5.0)})
        write_rows(run, [{"step": 1, "train/loss": 1.0}])
    entry = record.read(run)
    assert entry is not None
    going_on = entry.model_copy(
        update={"status": "interrupted", "evaluations": [], "steps_done": 1}
    )
    going_on.write(run)
    return entry


def test_watch_writes_whole_pages_until_all_runs_have_ended(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    entry = going(folder)
    page_file = folder / "report.html"
    with watching(folder) as process:
        assert process.stdout.readline() == f"{page_file}: 1 finished, 1 interrupted\n"
        assert Parsed(page_file.read_text()).data["reload"] == 1
        run = folder / entry.run_id
        write_rows(run, [{"step": step, "train/loss": 1.0} for step in (1, 2, 3)])
        deadline = time.monotonic() + 20
        while "3 of 4" not in (text := page_file.read_text()):
            assert text.endswith("</html>"), "no reader sees half a page"
            assert time.monotonic() < deadline
        entry.write(run)
        assert process.wait(20) == 0
        assert process.stdout.read() == f"{page_file}: 2 finished\n"
        assert Parsed(page_file.read_text()).data["reload"] is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_watch_ends_with_a_signal(tmp_path: Path, number: int) -> None:
    """Ctrl-C, also where a script has started it with it ignored, and what a scheduler sends."""
    going(tmp_path / "s")
    ignored = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with watching(tmp_path / "s", before=ignored) as process:
        process.stdout.readline()
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert "Traceback" not in process.stderr.read()
        page_file = tmp_path / "s" / "report.html"
        assert Parsed(page_file.read_text()).data["reload"] is None, "the last page stays"


@pytest.mark.slow
def test_watch_waits_for_a_look_that_is_planned(tmp_path: Path) -> None:
    """As between two commands of `settle`; it says what it waits for, once."""
    folder = tmp_path / "default"
    words = [*SMOKE, "head=exclude,lora", "seed=0,1", f"output_dir={tmp_path}"]
    assert say("train", "-m", *words).code == 0
    assert say("settle", folder, "--max-seeds", "3").code == 0
    content = json.loads((folder / "sweep.json").read_text())
    content["settling"]["looks"].append({"seeds": [0, 1, 2, 3], "level": 0.02, "taken": None})
    content["settling"]["margin"] = 1e-9  # nothing is settled
    (folder / "sweep.json").write_text(json.dumps(content))
    with watching(folder) as process:
        assert process.stdout.readline() == f"{folder / 'report.html'}: 6 finished\n"
        time.sleep(3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read().count("waiting for the next look: `lorabench settle") == 1


def test_watch_refuses_what_is_no_sweep(tmp_path: Path) -> None:
    said = say("watch", tmp_path / "none")
    assert said.code == 2 and "does not exist" in said.err


@pytest.mark.slow
def test_a_sweep_is_watched_from_its_plan_to_its_end(tmp_path: Path) -> None:
    """Planned, running and finished runs in pages that another process writes."""
    folder = tmp_path / "default"
    command = [
        sys.executable, "-m", "lorabench", "train", "-m", *SMOKE, *GRID, f"output_dir={tmp_path}",
        "hydra.launcher.pack_size=1", "trainer.steps=300",  # seconds a run
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as training:
        while not (folder / "sweep.json").exists():
            assert training.poll() is None
            time.sleep(0.05)
        with watching(folder) as process:
            said = process.stdout.read()
            assert process.wait() == 0, process.stderr.read()
        assert training.wait() == 0
    counts = [line.partition(": ")[2] for line in said.splitlines()]
    assert "planned" in counts[0] and counts[-1] == "4 finished"
    assert any("running" in one for one in counts)
    found = Parsed((folder / "report.html").read_text())
    assert found.data["reload"] is None and len(found.data["figures"]["curves"]) >= 1
