"""Completion: by the files of conf/, by --help, and by bash itself."""

from __future__ import annotations

import os
import pty
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import say

from lorabench import cli
from lorabench.cli import conf_folder


def completed(line: str) -> list[str]:
    said = say("completion", "--line", line)
    assert said.code == 0, said.err
    return said.out.split()


def test_verbs() -> None:
    assert completed("lorabench ") == [*cli.VERBS]
    assert completed("lorabench re") == ["report", "replay"]
    assert completed("lorabench nothing ") == []


def test_names_of_a_group_are_its_files() -> None:
    files = sorted(path.stem for path in (Path(conf_folder()) / "head").glob("*.yaml"))
    assert completed("lorabench train head=") == [f"head={name}" for name in files]
    assert completed("lorabench plan -m lora.r=16,32 head=exclude,l") == ["head=exclude,lora"]


def test_keys_are_those_of_the_config() -> None:
    printed = say("train", "--cfg", "job", "--package", "lora").out
    keys = re.findall(r"^(\w+):", printed, re.MULTILINE)
    assert completed("lorabench train lora.") == sorted(f"lora.{key}=" for key in keys)


@pytest.mark.parametrize("verb", [one for one in cli.VERBS if one != "train"])
def test_options_are_those_of_the_help(verb: str) -> None:
    usage = re.sub(r"\s+", " ", say(verb, "--help").out)
    found = completed(f"lorabench {verb} --")
    assert all(option in usage for option in found)
    assert {*re.findall(r"\[(--[\w-]+)", usage)} <= {*found}


def test_bash_completes() -> None:
    """In bash itself, which replaces only what follows the last equals sign."""
    script = """
    eval "$(lorabench completion bash)"
    COMP_LINE='lorabench train -m head=exclude,l'; COMP_POINT=${#COMP_LINE}
    _lorabench; printf '%s\\n' "${COMPREPLY[@]}"
    COMP_LINE='lorabench com and more'; COMP_POINT=13
    _lorabench; printf '%s\\n' "${COMPREPLY[@]}"
    complete -p lorabench
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=on_path())
    assert done.stdout.splitlines() == [
        "exclude,lora", "compare", "completion",
        "complete -o default -o nospace -F _lorabench lorabench",
    ]  # fmt: skip


def on_path() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish is installed")
def test_fish_completes() -> None:
    script = """
    lorabench completion fish | source
    complete -C 'lorabench com'
    complete -C 'lorabench train -m head=exclude,l'
    """
    done = subprocess.run(["fish", "-c", script], capture_output=True, text=True, env=on_path())
    assert done.stdout.split() == ["compare", "completion", "head=exclude,lora"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh is installed")
def test_zsh_completes() -> None:
    """In an interactive zsh, by the tab key."""
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe("zsh", ["zsh", "-f", "-i"], on_path() | {"TERM": "dumb"})
    try:
        typed(terminal, b'eval "$(lorabench completion zsh)"; echo so""urced\n', b"sourced\r")
        typed(terminal, b"lorabench train -m head=exclude,l\t", b"head=exclude,lora")
        typed(terminal, b"\x15lorabench comp\tl\t", b"completion")
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)


def typed(terminal: int, keys: bytes, expected: bytes) -> None:
    """Type keys, and read until the terminal shows something."""
    os.write(terminal, keys)
    shown, until = b"", time.monotonic() + 60
    while expected not in shown:
        assert time.monotonic() < until, shown
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 4096)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_parse(shell: str) -> None:
    script = say("completion", shell).out
    if shell != "fish":  # zsh reads what bash does, by bashcompinit
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr
    assert "lorabench completion --line" in script


@pytest.mark.slow
def test_a_completion_takes_less_than_two_seconds() -> None:
    """Of a core's time; Hydra composes the config for each: 0.8 s on a quiet one."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    begun = used()
    command = [sys.executable, "-m", "lorabench", "completion", "--line", "lorabench train lora."]
    subprocess.run(command, check=True, capture_output=True)
    assert 0.1 < used() - begun < 2
