"""Random command lines for `plan`: an answer or a refusal, never a defect, never a traceback."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compositions
import pytest
import random_words
from conftest import Said, say, untouched
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from processes import start

# A line at most: a plan of the 60 runs of an experiment takes 12 s on a quiet core, twice that
# beside another test. What hangs never ends.
SECONDS = 60
CHUNK = 50


class Hangs(BaseException):
    """Nothing catches it on the way."""


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder to work in, and an alarm for what hangs."""

    def ring(*_: Any) -> None:
        raise Hangs

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def what_is_wrong(words: list[str]) -> str | None:
    """What a command line ends in that it must not; None if it ends well."""
    signal.alarm(SECONDS)
    try:
        said = say("plan", *words)
    except Hangs:
        return "it hangs"
    finally:
        signal.alarm(0)
    if not untouched(Path.cwd()):
        return f"it leaves {os.listdir()}"
    return judged(said)


def judged(said: Said) -> str | None:
    if said.code not in (0, 2):
        return f"exit code {said.code}: {said.err[-300:]}"
    if "defect of lorabench" in said.err or "Traceback" in said.err + said.out:
        return said.err[-300:]
    if said.code == 2 and not (said.err + said.out).strip():
        return "it is refused without a word"
    return None


def wrong(seeds: range) -> dict[str, str]:
    lines = {seed: random_words.line(seed) for seed in seeds}
    found = {f"{seed} {words}": what_is_wrong(words) for seed, words in lines.items()}
    return {words: what for words, what in found.items() if what}


@pytest.mark.parametrize("words", [
    ["trainer=1e400"], ["experiment=null"], ["head=true"], ["~head=3"], ["-m", "head=lora,null"],
    ["data=[1,2]"], ["stages=[[1],[2]]"], ["+tracker@=1.5"], ["hydra/launcher=[null]"], ["=1"],
    ["sweep=" + "a" * 300], ["trainer=" + "a" * 300], ["k" * 300], ["data.metric=[[a]]"],
    ["data.labels=[null]"], ["-m", "seed=range(0)"], ["-m", "head=glob(x*)"], ["--cfg"],
    ["-m", "seed=range(1,2,0)"], ["-m", "hydra.sweeper.max_batch_size=0", "seed=0,1"],
    ["hydra.sweeper.params.seed=1"], ["hydra.sweeper=nan"], ["-m", "hydra=1"],
    ["--cfg", "job", "-m"],
    ["--cfg", "job", "--package", "nosuch"], ["--experimental-rerun", "x"], ["-cp", "conf"],
    ["-m", "-cn", "data.name=${run_id:}", "~seed=[", "lora.r=x"],
])  # fmt: skip
def test_what_was_once_a_defect(words: list[str]) -> None:
    assert what_is_wrong([*random_words.SMALL, *words]) is None


def test_six_random_lines() -> None:
    assert wrong(range(6)) == {}


def test_a_seed_is_the_same_line_for_ever() -> None:
    lines = [random_words.line(seed) for seed in range(2000)]
    assert lines == [random_words.line(seed) for seed in range(2000)]
    assert len({tuple(words) for words in lines}) > 1900
    keys = {word.lstrip("+~").partition("=")[0] for words in lines for word in words}
    assert set(random_words.KEYS) <= keys and set(random_words.HYDRA) <= keys


@pytest.mark.faults
@pytest.mark.parametrize("first", range(0, 2000, CHUNK))
def test_two_thousand_random_lines(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tenth part with Hydra's own loader, without the tests' memory of compositions."""
    if first % (10 * CHUNK) == 0:
        monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", compositions.inner)
    assert wrong(range(first, first + CHUNK)) == {}


@pytest.mark.faults
@pytest.mark.parametrize("first", range(0, 2000, 200))
def test_a_sample_in_processes_of_their_own(first: int, tmp_path: Path) -> None:
    """Nothing of the lines before is left in them, and the streams are real ones."""
    for seed in range(first, first + 200, 25):
        words = random_words.line(seed)
        done = start(tmp_path / str(seed), "plan", *words)
        code = done.wait(60)
        assert judged(Said(code, "", done.said)) is None, (seed, words, done.said)
