"""Code that comes with a model, a tokenizer or a dataset never runs, whatever the user answers.

Every planted file leaves a marker when it is executed; the command line gets a terminal where
somebody has typed `y`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT_RUN, records, say
from processes import running, start_call

from lorabench import model as base_model
from lorabench.config import ModelConfig

MARK = "import pathlib; pathlib.Path({!r}).write_text('ran')\n"
CLASSES = (
    "import transformers as t\n"
    "class Config(t.LlamaConfig): model_type = 'mine'\n"
    "class Model(t.LlamaForCausalLM): config_class = Config\n"
    "class Tokenizer(t.PreTrainedTokenizerFast): pass\n"
    "class Processor(t.ProcessorMixin): pass\n"
    "def generate(model, **_): raise SystemExit\n"
)
FILES = ("own.py", "custom_generate/generate.py", "sitecustomize.py", "conftest.py", "__init__.py")


def edit(path: Path, **entries: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (content | entries).items() if v is not None}))


@pytest.fixture
def base(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Llama with Python files beside it."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder("llama"), folder)
    plant(folder, tmp_path)
    edit(folder / "generation_config.json", custom_generate="own")
    return folder


def plant(folder: Path, tmp_path: Path) -> None:
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(MARK.format(str(tmp_path / "RAN")) + CLASSES)


def terminal() -> None:
    """In the child: stdin is a terminal with answers waiting."""
    ours, theirs = os.openpty()
    os.write(ours, b"y\ny\ny\ny\n")
    os.dup2(theirs, 0)
    sys.stdin = os.fdopen(0, closefd=False)
    assert sys.stdin.isatty()


def told(tmp_path: Path, *words: Any) -> tuple[int, str]:
    """How a command ends that could have been answered; nothing planted has run."""
    with running(tmp_path / "said", *words, before=terminal) as process:
        code = process.wait(100)
    said = process.said
    assert not (tmp_path / "RAN").exists(), said
    assert "[y/N]" not in said and "Traceback" not in said
    return code, said


def words_of(base: Path, tmp_path: Path, *more: str) -> list[str]:
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data=jsonl", f"data.train.path={tmp_path / 'rows.jsonl'}", "data.max_length=64"]
    return [*SHORT_RUN[:6], *data, "model=local", f"model.path={base}",
            f"output_dir={tmp_path / 'out'}", *more]  # fmt: skip


CONFIG = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
TOKENIZER = [None, "own.Tokenizer"]


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [
        ({"auto_map": CONFIG, "model_type": "mine"}, {}, "auto_map={'AutoConfig': 'own.Config'"),
        ({"auto_map": CONFIG, "model_type": None}, {}, "auto_map={'AutoConfig': 'own.Config'"),
        # A model type that transformers knows, and has no language model for.
        (
            {"auto_map": CONFIG, "model_type": "vit"},
            {},
            "config.json names own.Model, code of its own, which never runs",
        ),
        (
            {},
            {"auto_map": {"AutoTokenizer": TOKENIZER}, "tokenizer_class": "Tokenizer"},
            "auto_map={'AutoTokenizer': [None, 'own.Tokenizer']}, and transformers has no "
            "tokenizer_class 'Tokenizer'",
        ),
        ({}, {"auto_map": TOKENIZER, "tokenizer_class": None}, "no tokenizer_class 'None'"),
        ({"attn_implementation": "own/kernel"}, {}, "names 'own/kernel' as attn_implementation"),
    ],
)
def test_a_base_that_needs_its_own_code_is_refused_by_the_plan(
    config: dict[str, Any], tokenizer: dict[str, Any], expected: str, base: Path, tmp_path: Path
) -> None:
    edit(base / "config.json", **config)
    edit(base / "tokenizer_config.json", **tokenizer)
    code, said = told(tmp_path, "plan", *words_of(base, tmp_path))
    assert code == 2, said
    (line,) = said.splitlines()
    assert line.startswith(("model.path: ", "task: ")) and "'base'" in line.replace(
        str(base), "base"
    )
    assert expected in line and ("use " in line or "remove " in line)


@pytest.mark.faults
def test_a_base_that_transformers_has_classes_for_trains_with_those(
    base: Path, tmp_path: Path
) -> None:
    """Python files and auto_maps of every kind beside it; generation and export included."""
    edit(base / "config.json", auto_map=CONFIG)
    auto_map = {"AutoTokenizer": TOKENIZER, "AutoProcessor": "own.Processor"}
    edit(base / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="LlamaTokenizer")
    for name in ("processor_config.json", "preprocessor_config.json"):
        edit(base / name, auto_map={"AutoProcessor": "own.Processor"}, processor_class="Processor")
    words = words_of(base, tmp_path, "data.metric=[nll,answer]", "data.answer_max_new_tokens=4")
    words += ["data.answer_pattern='(.+)'", f"hydra.searchpath=[file://{base}]"]
    code, said = told(tmp_path, "train", *words)
    assert code == 0, said
    ((run, record),) = records(tmp_path / "out").items()
    assert record["evaluations"][-1]["splits"]["test"]["metrics"]["answer"]["num_examples"] > 0
    folder = tmp_path / "out" / "default" / run
    code, said = told(tmp_path, "export", folder, "--to", "merged", tmp_path / "merged")
    assert code == 0, said
    assert not list((tmp_path / "merged").rglob("*.py"))


@pytest.mark.faults
def test_a_dataset_script_never_runs(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    plant(folder, tmp_path)
    (folder / "rows.py").write_text((folder / "own.py").read_text())
    words = words_of(base, tmp_path, "data=hub", f"data.train.path={folder}")
    words.remove("data=jsonl")
    code, said = told(tmp_path, "train", *words)
    assert code == 2 and "data.train.path: must be a dataset that loads" in said


# --- pickles -----------------------------------------------------------------------------------


class Marks:
    """Leaves the marker when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


PICKLED = [
    ["pytorch_model.bin"],
    ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
    ["consolidated.00.pth"],
    ["model.pt"],
    ["model.ckpt"],
    ["tf_model.h5"],
    ["flax_model.msgpack"],
    ["pytorch_model.bin", "other.safetensors"],
]


@pytest.mark.parametrize("names", PICKLED, ids=lambda names: names[0])
def test_pickled_weights_are_refused(names: list[str], base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").unlink()
    for name in names:
        torch.save(Marks(tmp_path / "RAN"), base / name)
    (line,) = base_model.check(ModelConfig(name="local", path=str(base)))
    assert line.startswith("model.path: weights must be safetensors") and names[0] in line
    assert "save_pretrained" in line and not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("entry", ["index", "transformers_weights"])
def test_pickles_under_another_name_are_refused_by_the_plan(
    entry: str, base: Path, tmp_path: Path
) -> None:
    if entry == "index":
        (base / "model.safetensors").rename(base / "model-1.safetensors")
        index = {
            "metadata": {},
            "weight_map": {"a": "model-1.safetensors", "b": "adapter_model.bin"},
        }
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        edit(base / "config.json", transformers_weights="adapter_model.bin")
    torch.save(Marks(tmp_path / "RAN"), base / "adapter_model.bin")
    code, said = told(tmp_path, "plan", *words_of(base, tmp_path))
    assert code == 2 and "'base' has adapter_model.bin" in said.replace(str(base), "base")


@pytest.mark.faults
def test_pickles_beside_safetensors_are_not_read(base: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        torch.save(Marks(tmp_path / "RAN"), base / name)
    code, said = told(tmp_path, "train", *words_of(base, tmp_path))
    assert code == 0, said


def test_the_conversion_that_is_shown_makes_a_base_that_is_planned(
    base: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    edit(base / "generation_config.json", custom_generate=None)
    words = words_of(base, tmp_path)
    said = say("plan", *words)
    assert said.code == 2
    conversion = said.err.partition('python -c "')[2].rpartition('"')[0]
    assert start_call(tmp_path, lambda: exec(conversion) or 0).wait() == 0
    assert say("plan", *words).code == 0
    again = load_file(base / "model.safetensors")
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.faults
def test_a_pickled_adapter_is_never_loaded(base: Path, tmp_path: Path) -> None:
    """In the place of a run's adapter, for every verb that reads adapters."""
    words = words_of(base, tmp_path)
    assert say("train", *words).code == 0
    (run,) = records(tmp_path / "out")
    folder = tmp_path / "out" / "default" / run
    saved = folder / "adapter" / "adapter_model.safetensors"
    torch.save(Marks(tmp_path / "RAN"), folder / "adapter" / "adapter_model.bin")
    assert told(tmp_path, "evaluate", folder, "data.metric=[nll_per_token]")[0] == 0
    saved.unlink()
    for verb in (
        ["evaluate", folder, "data.metric=[exact_match]"],
        ["export", folder, "--to", "adapter", tmp_path / "to"],
        ["export", folder, "--to", "merged", tmp_path / "to"],
    ):
        code, said = told(tmp_path, *verb)
        assert code in (1, 2) and "adapter" in said, said
