"""The commands of the pages for people with a model of their own, as typed.

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
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from test_presets import PUBLISHED

from lorabench import cli, hub, nvidia, plan, sweep
from lorabench.cli import planning
from lorabench.config import ConfigErrors, typed
from lorabench.sweep.needs import Needs

ROOT = Path(__file__).parent.parent
NAMES = ("first-sweep-on-your-model", "install", "offline-and-gated")
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
COMPOSABLE = {
    " ".join(one for one in words if not one.startswith(("sweep=", "output_dir="))): words
    for words in COMMANDS
    if words[0] in COMPOSED
}
# What plans on a stand-in; the page's own sweep is trained below.
PLANNED = [
    line
    for line, (verb, *words) in COMPOSABLE.items()
    if NEEDS_THE_HUB not in words and (verb == "plan" or "trainer=smoke" in words)
]
# Where the stand-in takes the place of a preset, the command is composed with the preset too.
PRESETS = [line for line in COMPOSABLE if "model=" in line or line == "train -m experiment=mine"]


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
    """Compose a command, of a grid the first point; return what is wrong, the Hub aside."""
    _, rest = planning.split(words[1:])
    first = [re.sub(r"^([\w./]+=[\w.-]+)(,[\w.-]+)+$", r"\1", one) for one in rest if one != "-m"]
    (found,) = cli.compose(first).configs
    return plan.check(typed(found))


def test_there_are_commands_to_try() -> None:
    assert {words[0] for words in COMMANDS} <= {*cli.VERBS}
    counts = {name: len(list(commands(name))) for name in NAMES}
    assert counts["install"] > 3 and counts["first-sweep-on-your-model"] > 12, counts
    assert counts["offline-and-gated"] > 4, counts


@pytest.mark.parametrize("line", PRESETS)
def test_a_command_composes_as_typed(line: str, desk: Path) -> None:
    """Fails for a key, a preset, an option or a value that does not exist."""
    assert check(COMPOSABLE[line]) == []


@pytest.mark.parametrize(
    "line", ["plan trainer.stesp=1", "plan model=llama-8b", "plan lora.r=0", "plan --smok lora.r=2"]
)
def test_a_mistake_does_not_compose(line: str, desk: Path) -> None:
    """The test above must not pass whatever a page says."""
    try:
        assert check(line.split()) != []
    except (ConfigErrors, HydraException, OmegaConfBaseException):
        pass
    except SystemExit as ended:  # Hydra's parser of options
        assert ended.code == 2


@pytest.mark.slow
@pytest.mark.parametrize("line", PLANNED)
def test_a_command_plans_on_a_stand_in(line: str, desk: Path) -> None:
    words = [one for one in COMPOSABLE[line][1:] if one != "--smoke"]
    said = say("plan", *words, *(() if "trainer=smoke" in words else STAND_IN), "--json")
    assert said.code == 0, said.err
    assert len(json.loads(said.out)["runs"]) == (6 if "-m" in words else 1)


def run(sweep: list[list[str]], fewer: list[str]) -> set[str]:
    """Run commands as written, on a stand-in of the model for one step; return the verbs."""
    short = [*STAND_IN, "trainer.epochs=null", "trainer.steps=1", "trainer.batch_size=2"]
    short += ["data.num_validation=2", "data.num_test=4", *fewer]
    for verb, *words in sweep:
        runs = sorted(Path("outputs/mine").glob("*/record.json"))
        words = [re.sub("/ID$", f"/{runs[0].parent.name}", one) if runs else one for one in words]
        words = ["outputs/mine" if one == "DIR" else one for one in words]
        said = say(verb, *words, *(short if verb in COMPOSED else ()))
        assert said.code == 0, (verb, words, said.err)
    return {verb for verb, *_ in sweep}


SERVING = [one for one in COMMANDS if one[0] not in (*COMPOSED, "init") and len(one) > 1]
OF_RATES = [one for one in SERVING if "outputs/mine_lr" in one]


@pytest.mark.slow
def test_the_first_sweep_runs_as_written(desk: Path) -> None:
    """The verbs that serve a folder, on what the page's own `train` made."""
    train = ["train", "-m", "experiment=mine"]
    assert train in COMMANDS
    ran = run([train, *(one for one in SERVING if one not in OF_RATES)], ["seed=0,1"])
    assert ran == {"train", "runs", "compare", "generate", "settle", "export", "work"}


@pytest.mark.slow
def test_the_sweep_over_learning_rates_runs_as_written(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # what fetch needs is a folder here
    fetch = ["fetch", "-m", "experiment=mine"]
    (train,) = (one for one in COMMANDS if "sweep=mine_lr" in one)
    assert fetch in COMMANDS
    assert run([fetch, train, *OF_RATES], ["seed=0,1"]) == {"fetch", "train", "compare"}


def test_the_table_of_wheels_is_the_one_that_refusals_use() -> None:
    rows = re.findall(r"^\| ([\d.]+) \| `(\S+)` \| ", PAGES["install"], re.MULTILINE)
    table = [(nvidia.INDEX + name, ".".join(map(str, least))) for name, least in nvidia.WHEELS]
    assert [(index, driver) for driver, index in rows] == table
    assert f"driver {table[0][1]} or newer" in PAGES["install"]
    assert f"older than {table[-1][1]} runs none" in PAGES["install"]


def test_gated_presets_are_all_named_and_the_commit_is_the_presets() -> None:
    presets = {path.stem: path.read_text() for path in (ROOT / "conf/model").glob("*.yaml")}
    page = PAGES["offline-and-gated"]
    listed = re.findall(r"^- (`gemma.*|`llama(?:.|\n  )*)", page, re.MULTILINE)
    named = set(re.findall(r"`([\w.-]+)`", " ".join(listed)))
    assert named == {name for name, text in presets.items() if "gated" in text.splitlines()[0]}
    commits = set(re.findall(r"\b[0-9a-f]{40}\b", page))
    assert commits == {yaml.safe_load(presets["qwen3-8b"])["revision"]}


def test_the_refusal_of_a_gated_model_is_told_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in hub.TOKENS:
        monkeypatch.delenv(name, raising=False)
    told = hub.hub_failure("model.path", "google/gemma-2-9b-it", OSError("gated"))
    (shown,) = re.findall(
        r"^    (model\.path: .*?) \.\.\.$", PAGES["offline-and-gated"], re.M | re.S
    )
    assert told.startswith(" ".join(shown.split()))


@pytest.mark.slow
def test_the_memory_of_an_8b_model_is_what_the_plan_estimates(tmp_path: Path) -> None:
    import transformers

    kind, shape, _ = PUBLISHED["llama-3.1-8b"]
    getattr(transformers, kind)(**shape).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # a plan reads shapes from the config
    words = ["model=llama-3.1-8b-instruct", f"model.path={tmp_path}", "model.dtype=bfloat16"]
    words += ["lora.r=32", "trainer.batch_size=16", "data.max_length=2048", "tracker=none"]
    pattern = r"^\| (null|\d+)[^|]* \| (true|false) \| (\d+) GB \|$"
    rows = re.findall(pattern, PAGES["first-sweep-on-your-model"], re.MULTILINE)
    assert len(rows) == 3
    planner = plan.Planner()
    for micro, again, shown in rows:
        memory = [f"trainer.micro_batch_size={micro}", f"trainer.gradient_checkpointing={again}"]
        config = composed(*words, *memory)
        job = sweep.Job(planner.resolved(config), "", planner.make(config))
        assert f"{Needs(planner).memory([job]) / 1e9:.0f}" == shown


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    test_readme.test_links_lead_somewhere(f"docs/{page}")


@pytest.mark.parametrize("page", NAMES)
def test_files_of_the_repository_are_there(page: str) -> None:
    named = re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:txt|toml))`", PAGES[page])
    assert all((ROOT / name).is_file() for name in named), named
    assert named or page != "install"
    assert len(PAGES[page].splitlines()) <= 150
