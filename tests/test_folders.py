"""Where a command may write: in its output folder alone, and refused before if it cannot."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOKE, recorded_runs, say, untouched
from processes import start
from rights import forbid_writing, mode, mount_read_only, none_over_modes

from lorabench.files import obstacle


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


# --- Hydra's own settings --------------------------------------------------------------------

ELSEWHERE = [  # the words, and the keys that the lines must name
    ("hydra.run.dir=away", ["hydra.run.dir"]),
    ("-m hydra.sweep.dir=away seed=0,1", ["hydra.sweep.dir"]),
    ("-m hydra.sweep.subdir=../../away seed=0,1", ["hydra.sweep.subdir"]),
    ("hydra.output_subdir=../../away", ["hydra.output_subdir"]),
    ("hydra.job.chdir=true", ["hydra.job.chdir"]),
    ("-m hydra.job.chdir=true hydra.run.dir=away seed=0,1", ["hydra.run.dir", "hydra.job.chdir"]),
    ("hydra.sweep=null", ["hydra.sweep"]),
    ("hydra.sweeper=nan", ["hydra.sweeper"]),
    ("-m +hydra.sweeper.params={hydra.run.dir:'a,b'}", ["hydra.sweeper.params"]),
    ("output_dir=", ["output_dir"]),
    ("-m output_dir= seed=0,1", ["output_dir"]),
    ("-m sweep=..,. seed=0", ["sweep", "sweep"]),
    ("sweep=../away", ["sweep"]),
    ("sweep=/away", ["sweep"]),
]


@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize(("words", "keys"), ELSEWHERE, ids=[words for words, _ in ELSEWHERE])
def test_no_setting_puts_files_elsewhere(
    words: str, keys: list[str], verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    said = say(verb, *SMOKE, *words.split())
    assert said.code == 2 and said.out == ""
    assert [line.partition(":")[0] for line in said.lines] == keys
    assert tree(tmp_path) == {"a": b"", "a/b": b""}


def test_hydras_own_files_may_be_left_out(tmp_path: Path) -> None:
    said = say("plan", *SMOKE, "hydra.output_subdir=null", f"output_dir={tmp_path}")
    assert said.code == 0, said.err


REFUSED = {  # words, with {out}: a sweep folder in which a run has a record of a newer lorabench
    "a value": "trainer.lr=-1",
    "some runs of a sweep": "-m trainer.lr=1e-3,-1",
    "no run at all": "-m seed=range(0)",
    "a newer record": "head=exclude seed=0",
    "a newer record among others": "-m head=exclude,lora seed=0,1",
    "under Hydra's own sweeper": "-m hydra/sweeper=basic trainer.lr=-1 seed=0,1",
}


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_a_refused_command_leaves_nothing(words: str, output: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(output, out)
    for path in out.glob("*/*/record.json"):
        content = json.loads(path.read_text())
        if (content["config"]["head"]["policy"], content["config"]["seed"]) == ("exclude", 0):
            path.write_text(json.dumps(content | {"schema_version": 99}))
    before = tree(tmp_path)
    said = say("train", *SMOKE, f"output_dir={out}", *words.split())
    assert said.code == 2 and said.out == ""
    changed = {name for name, content in tree(tmp_path).items() if before.get(name) != content}
    own_sweeper = {"out/default/multirun.yaml"} if "basic" in words else set()
    assert changed <= own_sweeper, "Hydra's own sweeper writes before anybody can refuse"


# --- folders that cannot be written to -------------------------------------------------------

PLACES = {  # what is forbidden, below the output folder; the key that says where it is
    "the output folder": ("", "output_dir"),
    "the sweep folder": ("default", "sweep"),
    "the locks": ("default/.locks", "sweep"),
    "the folder of the run": ("default/{run}", "output_dir"),
}


@pytest.fixture(scope="module")
def run_id() -> str:
    """The id of the run of SMOKE."""
    return json.loads(say("plan", "--json", *SMOKE).out)["runs"][0]["run_id"]


@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize(("place", "key"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("bits", [0o555, 0o000])
def test_a_forbidden_folder_is_refused_before_the_base_loads(
    place: str,
    key: str,
    verb: str,
    bits: int,
    run_id: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lorabench import model as base_model

    def refuse(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(base_model, "load_verified", refuse)
    words = [*SMOKE, f"output_dir={tmp_path / 'out'}"]
    forbidden = tmp_path / "out" / place.replace("{run}", run_id)
    forbidden.mkdir(parents=True)
    before = tree(tmp_path)
    with mode(forbidden, bits):
        said = say(verb, *words)
    assert said.code == 2 and said.out == "" and len(said.lines) == 1
    assert said.err.startswith(f"{key}: must give a folder to write to; '{forbidden}")
    assert "Permission denied" in said.err and f"set another {key}=" in said.err
    assert tree(tmp_path) == before


def test_a_run_that_has_ended_may_be_read_only(output: Path, tmp_path: Path) -> None:
    """Repeating the command, with a further seed, neither needs nor changes it."""
    out = tmp_path / "out"
    shutil.copytree(output, out)
    run = next(out.glob("*/*/record.json")).parent
    before = tree(run)
    with mode(run, 0o555):
        said = say("train", "-m", *SMOKE, "head=exclude,lora", "seed=0,1", f"output_dir={out}")
    assert said.code == 0, said.err
    assert tree(run) == before


@pytest.mark.parametrize("bits", [0o555, 0o000])
def test_a_home_that_cannot_be_written_to_is_no_obstacle(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with mode(home, bits):
        said = say("train", *SMOKE, "trainer.steps=1", f"output_dir={tmp_path / 'out'}")
    assert said.code == 0, said.err
    assert untouched(home)


@pytest.mark.parametrize("what", ["data", "base"])
def test_what_may_not_be_read_is_named(
    what: str, tmp_path: Path, jsonl: Path, tiny_folder: Any
) -> None:
    words = ["tracker=none", f"output_dir={tmp_path / 'out'}"]
    place = jsonl
    if what == "base":
        place = tmp_path / "base"
        shutil.copytree(tiny_folder("llama"), place)
        words += ["model=local", f"model.path={place}"]
    else:
        words += ["data=jsonl", f"data.train.path={place}"]
    with mode(place, 0o000):
        said = say("plan", *words)
    assert said.code == 2 and "defect" not in said.err and str(place) in said.err


@pytest.mark.parametrize("mounted", [True, False])
def test_a_read_only_file_system_is_refused(mounted: bool, tmp_path: Path) -> None:
    """Mounted where this machine lets its user mount one, else the error of the system's calls."""
    place = tmp_path / "disk"
    place.mkdir()

    def before() -> None:
        try:
            assert mounted
            mount_read_only(place)
        except (AssertionError, OSError):
            forbid_writing(place)

    done = start(tmp_path / "said", "train", *SMOKE, f"output_dir={place / 'out'}", before=before)
    assert done.wait() == 2 and len(done.said.splitlines()) == 1
    assert done.said.startswith(f"output_dir: must give a folder to write to; '{place}' is not")
    assert "Read-only file system" in done.said


# --- names that no folder can have -----------------------------------------------------------


def make(kind: str, place: Path) -> Path:
    """What is given as a folder, made below `place` where it can be."""
    path = place / "given"
    if kind == "a dangling link":
        path.symlink_to(place / "nothing")
    elif kind == "a link in a circle":
        path.symlink_to(path)
    elif kind == "a file":
        path.write_text("mine")
    elif kind == "below a file":
        path.write_text("mine")
        path = path / "deep" / "er"
    elif kind == "a long name":
        path = place / ("a" * 300)
    elif kind == "a long name below others":
        path = place / "b" / "c" / ("ä" * 128)  # 256 bytes
    elif kind == "a long path":
        path = place.joinpath(*["a" * 200] * 20)
    elif kind == "not a path":
        path = place / "a\0b"
    return path


KINDS = {
    "a dangling link": "is a link to nothing",
    "a link in a circle": "Too many levels of symbolic links",
    "a file": "is a file",
    "below a file": "is a file",
    "a long name": "File name too long",
    "a long name below others": "File name too long",
    "a long path": "File name too long",
    "not a path": "null",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_keeps_a_folder_from_being_written_to(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path)
    before = tree(tmp_path) if kind != "a link in a circle" else {}
    found = obstacle(path)
    assert found is not None and KINDS[kind] in found[1]
    if before:
        assert tree(tmp_path) == before
    with pytest.raises((OSError, ValueError)):  # and the system says so too
        path.mkdir(parents=True, exist_ok=True)
        (path / "record.json").write_text("")
        (path / ("x" * 200)).write_text("")


@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize("key", ["output_dir", "sweep"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "path" not in kind])
def test_a_name_that_no_folder_can_have_is_refused(
    kind: str, key: str, verb: str, tmp_path: Path, no_model: None
) -> None:
    place = tmp_path / "out"
    place.mkdir()
    path = make(kind, place)
    if key == "sweep":  # has one part
        path = place / path.relative_to(place).parts[-1 if "name" in kind else 0]
    given = f"output_dir='{path}'" if key == "output_dir" else f"sweep='{path.name}'"
    said = say(verb, *SMOKE, f"output_dir={place}", given)
    assert said.code == 2 and len(said.lines) == 1
    assert said.err.startswith(f"{key}: must give a folder to write to; ")
    assert KINDS[kind] in said.err


def test_a_folder_that_can_be_written_to_has_no_obstacle(tmp_path: Path) -> None:
    assert obstacle(tmp_path) is None and obstacle(tmp_path / "a" / "b") is None
    assert untouched(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert obstacle(tmp_path / "link" / "c") is None
    assert obstacle(Path(os.devnull)) is not None


def test_a_folder_that_is_closed_in_mid_command_fails_its_run_alone(tmp_path: Path) -> None:
    """Nobody could refuse it before; its mates train in the same pack."""

    def before() -> None:
        from lorabench.worker import members

        begin, seen = members.begin, []
        drop = contextlib.ExitStack()

        def closed(member: Any) -> None:
            seen.append(member)
            if len(seen) == 2:
                member.folder.chmod(0o555)
                drop.enter_context(none_over_modes())
            begin(member)

        members.begin = closed

    words = ["train", "-m", *SMOKE, "seed=0,1,2", f"output_dir={tmp_path / 'out'}"]
    done = start(tmp_path / "said", *words, before=before)
    assert done.wait() == 1, done.said
    assert "Traceback" not in done.said and "defect" not in done.said
    assert "1 of 3 runs did not finish:" in done.said and "Permission denied" in done.said
    found = [entry["status"] for _, entry in recorded_runs(tmp_path / "out")]
    assert found == ["finished"] * 2


def test_a_record_of_a_newer_lorabench_is_left_alone_by_work(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "out")
    path = next((tmp_path / "out").glob("*/*/record.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    before = tree(tmp_path)
    said = say("work", tmp_path / "out" / "default")
    assert said.code == 2 and said.err.startswith("record.json: must have a schema version of at ")
    assert tree(tmp_path) == before
