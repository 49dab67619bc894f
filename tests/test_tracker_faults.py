"""W&B in trouble: the real client, a small server that fails, a service process that is stopped.

Whatever happens, the run has the bits it has without a tracker, ends in time, and the command that
it prints uploads every row.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from conftest import say
from processes import Process, slowly, start_call, wait_for
from test_tracking import live, metrics, start, sync_command
from wandb_server import Server

from lorabench import cli, tracking
from lorabench.tracking import limits

RUNS = [
    "train", "-m", "seed=0,1", "trainer=smoke", "trainer.steps=12", "trainer.num_threads=1",
    "target_modules=attention", "data.num_train=64", "data.num_validation=4", "data.num_test=4",
]  # fmt: skip
INIT, FINISH, CLIENT, REWRITE = 3.0, 5.0, 2.0, 10.0  # seconds, in place of the product's
ADAPTER = 1.0
LONGEST = FINISH + 3 * CLIENT + REWRITE  # what finish_all states


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The adapters of the same runs without a tracker."""
    folder = tmp_path_factory.mktemp("untracked")
    process = start_call(folder, lambda: cli.main([*RUNS, "tracker=none", f"output_dir={folder}"]))
    assert process.wait() == 0, process.said
    return adapters(folder)


def adapters(folder: Path) -> dict[str, bytes]:
    paths = folder.glob("default/*/adapter/adapter_model.safetensors")
    return {path.parts[-3]: path.read_bytes() for path in paths}


@contextlib.contextmanager
def tracked(
    folder: Path,
    address: str,
    key: str | None = "f" * 40,
    mode: str = "online",
    words: Sequence[str] = (),
    **constants: float,
) -> Iterator[Process]:
    """The command with a tracker, and with the exit that a real process has.

    Args:
        words: added to the command.
        constants: of lorabench.tracking.limits, with other values.
    """
    short = {"INIT_SECONDS": INIT, "FINISH_SECONDS": FINISH, "CLIENT_SECONDS": CLIENT}
    short |= {"REWRITE_SECONDS": REWRITE, "ADAPTER_SECONDS": ADAPTER}

    def before() -> None:
        atexit._clear()  # pytest's own
        import wandb

        wandb.teardown()
        os.environ.update(WANDB_BASE_URL=address, HOME=str(folder), NETRC=str(folder / "none"))
        os.environ.pop("WANDB_API_KEY", None)
        if key is not None:
            os.environ["WANDB_API_KEY"] = key
        for name, value in (short | constants).items():
            setattr(limits, name, value)
        slowly(0.2)

    def command() -> int:
        code = cli.main([*RUNS, *words, f"tracker.mode={mode}", f"output_dir={folder}"])
        atexit._run_exitfuncs()
        return code

    process = start_call(folder, command, before=before)
    try:
        yield process
    finally:
        family = []
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.send(signal.SIGKILL)
            process.wait()
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def has_rows(folder: Path, number: int) -> Callable[[], bool]:
    """Whether both runs have so many rows."""

    def holds() -> bool:
        files = list(folder.glob("default/*/metrics.jsonl"))
        return len(files) == 2 and all(f.read_text().count("\n") >= number for f in files)

    return holds


def service_of(pid: int) -> psutil.Process:
    """The service process of a process."""

    def found() -> list[psutil.Process]:
        children = psutil.Process(pid).children()
        return [child for child in children if child.name() == "wandb-core"]

    wait_for(found)
    (service,) = found()
    return service


def upload(command: list[str], server: Server, place: Path) -> None:
    """Run a command that sends, against a healthy server."""
    variables = {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": "f" * 40, "HOME": str(place)}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=os.environ | variables | {"WANDB_SILENT": "false"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "ERROR" not in done.stderr, done.stderr


def check(
    process: Process, folder: Path, untracked: dict[str, bytes], within: float, healthy: Server
) -> str:
    """Wait for the end of the command; it must have lost nothing.

    Args:
        within: seconds from the last row to the exit, scoring included.
    Returns:
        What the command said.
    """
    wait_for(lambda: process.poll() is not None or has_rows(folder, 12)(), 60)
    last = time.monotonic()
    assert process.wait(60) == 0, process.said
    assert time.monotonic() - last < within + 5, process.said  # 5 s to save, score and leave
    assert "Traceback" not in process.said and "defect" not in process.said
    assert adapters(folder) == untracked
    upload(sync_command(process.said), healthy, folder)
    for run_id in untracked:
        assert healthy.rows(run_id) == metrics(folder / "default", run_id)
        assert len(healthy.rows(run_id)) == 12
    return process.said


def kill_when_rows_are_sent(folder: Path, server: Server, words: Sequence[str]) -> None:
    """Train online; kill command and service when more than four rows a run are there."""
    with tracked(folder, server.address, words=words) as process:
        sends = server.lines.values
        wait_for(lambda: len(sends()) == 2 and all(len(rows) > 4 for rows in sends()), 40)
        service = service_of(process.pid)
        process.send(signal.SIGKILL)
        service.kill()
        process.wait()


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["hang", "refuse", "401", "500"])
def test_a_server_that_fails_in_mid_run(tmp_path, server, untracked, fault):
    healthy = Server()
    with tracked(tmp_path, server.address) as process:
        wait_for(lambda: len(server.started) == 2)
        server.break_down(fault)
        said = check(process, tmp_path, untracked, FINISH + CLIENT, healthy)
    assert "2 of 2 runs are not wholly at the server" in said
    assert not list(tmp_path.glob("default/wandb/offline-*"))  # the client's own files are whole
    healthy.close()


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["hang", "401", "500"])
def test_a_server_that_works_again_gets_what_it_lacks(tmp_path, server, fault, monkeypatch):
    """Fails where a run of which the server has some rows is sent from its first row again."""
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")
    sweep, words = tmp_path / "default", ["trainer.steps=40"]
    with tracked(tmp_path, server.address, words=words) as process:
        wait_for(lambda: len(server.lines) == 2 and has_rows(tmp_path, 4)())
        server.break_down(fault)
        assert process.wait(60) == 0, process.said
    server.fault = ""
    had = {run_id: dict(lines) for run_id, lines in server.lines.items()}
    assert len(had) == 2 and all(0 < len(lines) < 40 for lines in had.values())
    upload(sync_command(process.said), server, tmp_path)
    for run_id, lines in had.items():
        assert server.rows(run_id) == metrics(sweep, run_id)
        assert lines.items() <= server.lines[run_id].items(), "with the times they had"
        content = (sweep / run_id / "record.json").read_bytes()
        hashes = json.loads(content)["hashes"]
        assert server.summaries[run_id]["adapter_hash"] == hashes["adapter"]
        assert server.files[f"{run_id}/record.json"] == content
        assert f"adapter-{run_id}" in server.artifacts
    assert say("sync", sweep).out == f"{sweep}: nothing to send to W&B\n"


@pytest.mark.faults
def test_a_run_that_goes_on_offline_is_sent_to_the_server_that_has_its_first_rows(
    tmp_path, server, monkeypatch
):
    """Fails where the offline file, with rows of other settings, is laid over what is there."""
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")
    sweep, words = tmp_path / "default", ["trainer.steps=40"]
    kill_when_rows_are_sent(tmp_path, server, words)
    had = {run_id: server.rows(run_id) for run_id in server.lines}
    server.break_down("500")
    with tracked(tmp_path, server.address, words=[*words, "trainer.log_every=2"]) as process:
        assert process.wait(60) == 0, process.said
    assert "go on offline" in process.said
    server.fault = ""
    shutil.rmtree(sweep / min(had) / "adapter")  # an adapter that cannot be sent holds up nothing
    assert "2 of 2 runs are not wholly at the server" in process.said
    upload(sync_command(process.said), server, tmp_path)
    for run_id, first in had.items():
        rest = [row for row in metrics(sweep, run_id) if row["step"] > first[-1]["step"]]
        assert rest and server.rows(run_id) == first + rest
    assert say("sync", sweep).out == f"{sweep}: nothing to send to W&B\n"


@pytest.mark.faults
def test_sync_with_a_server_that_hangs_ends_and_sends_later(tmp_path, server):
    """No thread, no hook at the exit of Python and no second command waits for it."""
    with tracked(tmp_path, server.address, mode="offline") as process:
        assert process.wait(60) == 0, process.said
    server.break_down("hang")
    command = ["lorabench", "sync", str(tmp_path / "default")]
    variables = {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": "f" * 40, "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=os.environ | variables, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and "is not sent" in done.stderr, done.stderr
    server.fault = ""
    upload(command, server, tmp_path)
    assert len(server.lines) == 2
    for run_id in server.lines:
        assert server.rows(run_id) == metrics(tmp_path / "default", run_id)


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["hang", "401", "500"])
def test_a_server_that_fails_from_the_start(tmp_path, server, untracked, fault):
    healthy = Server()
    server.break_down(fault)
    with tracked(tmp_path, server.address) as process:
        said = check(process, tmp_path, untracked, LONGEST, healthy)
    assert said.count("online start failed") <= 1
    healthy.close()


@pytest.mark.faults
def test_no_key(tmp_path, server, untracked):
    healthy = Server()
    with tracked(tmp_path, server.address, key=None) as process:
        said = check(process, tmp_path, untracked, FINISH, healthy)
    assert said.count("online start failed") == 1 and not server.lines
    healthy.close()


@pytest.mark.faults
def test_a_slow_server_gets_what_it_can_take_in_time(tmp_path, server, untracked):
    healthy = Server()
    server.break_down("slow")
    with tracked(tmp_path, server.address) as process:
        check(process, tmp_path, untracked, LONGEST, healthy)
    healthy.close()


@pytest.mark.faults
@pytest.mark.parametrize(("number", "mode"), [(3, "online"), (12, "offline")])
def test_the_service_process_is_stopped(tmp_path, server, untracked, number, mode):
    """In mid-run and at the end."""
    with tracked(tmp_path, server.address, mode=mode) as process:
        wait_for(has_rows(tmp_path, number))
        service = service_of(process.pid)
        service.send_signal(signal.SIGSTOP)
        said = check(process, tmp_path, untracked, LONGEST, server)
    assert not service.is_running()
    assert "2 of 2 runs" in said
    for run_id in untracked:  # both written again, whole
        assert len(list(tmp_path.glob(f"default/wandb/offline-run-*-{run_id}"))) >= 1


@pytest.mark.faults
def test_the_service_process_is_killed(tmp_path, server, untracked):
    """What it leaves is in the way of no upload, of the whole folder either."""
    healthy = Server()
    with tracked(tmp_path, server.address) as process:
        wait_for(has_rows(tmp_path, 4))
        service_of(process.pid).kill()
        check(process, tmp_path, untracked, LONGEST, server)
    sweep = tmp_path / "default"
    everything = ["wandb", "sync", "--no-skip-online", "--include-synced", str(sweep / "wandb")]
    upload(everything, healthy, tmp_path)
    for run_id in untracked:
        assert healthy.rows(run_id) == metrics(sweep, run_id)
    healthy.close()


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["in training", "while trackers finish"])
def test_a_signal_does_not_wait_for_a_server_that_hangs(tmp_path, server, moment):
    sweep, healthy = tmp_path / "default", Server()
    status = "interrupted" if moment == "in training" else "finished"

    def written() -> bool:
        entries = [json.loads(path.read_text()) for path in sweep.glob("*/record.json")]
        return [entry["status"] for entry in entries] == [status, status]

    with tracked(tmp_path, server.address, FINISH_SECONDS=60) as process:
        wait_for(lambda: len(server.started) == 2)
        server.break_down("hang")
        if moment != "in training":
            wait_for(written)
            time.sleep(0.5)
            assert process.poll() is None
        process.send(signal.SIGTERM)
        begun = time.monotonic()
        wait_for(written)
        assert time.monotonic() - begun < 4  # the records wait for no tracker
        assert process.wait(60) == 128 + signal.SIGTERM
        assert time.monotonic() - begun < limits.INTERRUPTED_SECONDS + 3 * CLIENT + REWRITE
    upload(sync_command(process.said), healthy, tmp_path)
    for run_id in [path.parent.name for path in sweep.glob("*/record.json")]:
        assert healthy.rows(run_id) == metrics(sweep, run_id)
    healthy.close()


@pytest.mark.faults
def test_a_process_whose_tracker_is_stopped_exits_by_itself(tmp_path):
    """A real interpreter from start to end, with the product's own timeouts."""
    words = [sys.executable, "-m", "lorabench", *RUNS, "trainer.steps=2000"]
    output = tmp_path / "said.txt"
    with open(output, "w") as file:
        process = subprocess.Popen([*words, f"output_dir={tmp_path}"], stdout=file, stderr=file)
    wait_for(has_rows(tmp_path, 2))
    service = service_of(process.pid)  # just begun: its client still waits for its first word
    service.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    assert process.wait(timeout=120) == 128 + signal.SIGTERM, output.read_text()
    bound = limits.INTERRUPTED_SECONDS + limits.REWRITE_SECONDS + 3 * limits.CLIENT_SECONDS
    assert time.monotonic() - begun < bound + 2  # and a checkpoint
    assert not service.is_running()
    assert "2 of 2 runs are not wholly at the server" in output.read_text()
    assert len([*tmp_path.glob("default/wandb/offline-run-*/run-*.wandb")]) == 2


@pytest.mark.faults
def test_rows_never_wait_for_a_stopped_service(tmp_path, monkeypatch, capsys):
    """More rows than its socket takes: the client blocks in `log`, the loop does not."""
    monkeypatch.setattr(limits, "INTERRUPTED_SECONDS", 0.2)
    (tmp_path / "abc").mkdir()
    row = {f"train/{number}": number / 3 for number in range(200)}
    from wandb.sdk import wandb_setup

    with tracking.of_command():
        tracker = start(tmp_path, pytest.fail)
        wait_for(lambda: live(tmp_path))
        popen = wandb_setup.singleton()._connection._proc._process
        service = service_of(os.getpid())
        service.send_signal(signal.SIGSTOP)
        begun = time.perf_counter()
        for step in range(200):
            tracker.log(row, step)
        assert time.perf_counter() - begun < 0.5
        time.sleep(0.2)
        assert tracker.queue.qsize() > 50, "the client takes everything: nothing was tested"
        text = "".join(json.dumps({"step": step, **row}) + "\n" for step in range(200))
        (tmp_path / "abc" / "metrics.jsonl").write_text(text)
        tracking.finish_all([(tracker, {"test/nll": 1.0}, False)], is_interrupted=True)
    assert not service.is_running()
    popen.wait(1)  # or Python warns of a process that the client has not waited for
    assert "1 of 1 runs are not wholly at the server" in capsys.readouterr().err
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert file.name == "run-abc.wandb"
