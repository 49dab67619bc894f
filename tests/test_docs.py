"""The commands of the pages for people with a model of their own: each composes, and runs where it can.

Real models are out of reach here. Their commands are composed as typed, and planned on a small
stand-in; those that serve a sweep's folder run on one that was trained by the page's own commands.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import test_readme
import yaml
from conftest import composed, say
from test_presets import PUBLISHED

from lorabench import cli, hub, nvidia, plan
from lorabench.cli import planning
from lorabench.config import ConfigErrors

ROOT = Path(__file__).parent.parent
NAMES = ("install", "first-sweep-on-your-model", "offline-and-gated")
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in NAMES}
COMPOSED = {"train", "plan", "fetch"}  # verbs that take KEY=VALUE; the others serve a folder
NEEDS_THE_HUB = "data=metamathqa"
STAND_IN = ["model=./qwen3-8b", "data.max_length=64", "tracker=none", "trainer.num_threads=1"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def commands(page: str) -> Iterator[list[str]]:
    """The words after `lorabench` of every command in a page, in its blocks and its sentences."""
    shell = "".join(blocks(page, "sh"))
    found = re.findall(r"^(?:[A-Z_]+=\S+ )*(?:srun )?lorabench (\w.*)$", shell, re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    found += re.findall(r"`(?:srun )?lorabench (\w[^`]*)`", prose.replace("\n", " "))
    for line in dict.fromkeys(found):
        yield shlex.split(line.replace("/scratch/$USER/", ""), comments=True)


COMMANDS = [words for page in NAMES for words in commands(page)]
WITH_CONFIG = [words for words in COMMANDS if words[0] in COMPOSED]
LINES = {" ".join(words): words for words in WITH_CONFIG}


@pytest.fixture(scope="module")
def desk(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]
) -> Iterator[Path]:
    """The folder that a reader works in: data, a stand-in of the model, what `init` writes."""
    from pyarrow import Table, parquet

    place = tmp_path_factory.mktemp("desk")
    rows = [{"question": f"{n}+{n % 7}?", "answer": str(n + n % 7)} for n in range(60)]
    (place / "gsm8k/main").mkdir(parents=True)
    for split in ("train", "test"):
        parquet.write_table(Table.from_pylist(rows), place / f"gsm8k/main/{split}-0.parquet")
    rows = [{"prompt": f"{n}+{n % 9}?", "completion": str(n + n % 9)} for n in range(60)]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(tiny_folder("llama"), place / "qwen3-8b")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        (line,) = (words for words in COMMANDS if words[0] == "init")
        said = say(*line)
        assert said.code == 0, said.err
        (experiment,) = blocks("first-sweep-on-your-model", "yaml")
        assert yaml.safe_load(experiment).keys() > yaml.safe_load(drafted()).keys() - {"hydra"}
        Path("conf/experiment/mine.yaml").write_text(experiment)
        yield place


def drafted() -> str:
    return Path("conf/experiment/mine.yaml").read_text()


def check(words: list[str]) -> list[str]:
    """Compose a command as typed; return what is wrong with its configs, Hub aside."""
    _, rest = planning.split(words[1:])
    from lorabench.config import typed

    composed = cli.compose(rest)
    return [error for one in composed.configs for error in plan.check(typed(one))]


def test_there_are_commands_to_try() -> None:
    assert {words[0] for words in COMMANDS} <= {*cli.VERBS}
    counts = {name: len(list(commands(name))) for name in NAMES}
    assert counts["install"] > 3 and counts["first-sweep-on-your-model"] > 12, counts
    assert counts["offline-and-gated"] > 4, counts


@pytest.mark.parametrize("line", LINES)
def test_a_command_composes_as_typed(line: str, desk: Path) -> None:
    """Fails for a key, a preset, an option or a value that does not exist."""
    assert check(LINES[line]) == []


@pytest.mark.parametrize(
    "line", ["plan trainer.stesp=1", "plan model=llama-8b", "plan lora.r=0", "plan --smok lora.r=2"]
)
def test_a_command_with_a_mistake_does_not(line: str, desk: Path) -> None:
    assert say(*line.split()).code == 2
    with pytest.raises((ConfigErrors, Exception)):
        assert check(line.split()) == []


@pytest.mark.parametrize("line", [line for line in LINES if NEEDS_THE_HUB not in line])
def test_a_command_plans_on_a_stand_in(line: str, desk: Path) -> None:
    words = ["plan", *LINES[line][1:], *(() if "trainer=smoke" in line else STAND_IN)]
    said = say(*(word for word in words if word != "--smoke"), "--json")
    assert said.code == 0, said.err
    runs = json.loads(said.out)["runs"]
    grid = re.findall(r"[\w.]+=([\w.-]+(?:,[\w.-]+)+)", line)
    expected = 6 if "-m experiment=mine" in line else 1
    for values in grid:
        expected *= len(values.split(","))
    assert len(runs) == expected
