"""Small data of every source: rows, files, folders, and the configs that read them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from lorabench.config import DataConfig, SourceConfig

ROOT = Path(__file__).parents[1]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(num, **columns):
    return [{"prompt": f"p{i}", "completion": f"c{i}", **columns} for i in range(num)]


def jsonl(train, **kwargs):
    source = SourceConfig(path=str(train))
    return DataConfig(**{"name": "mine", "source": "jsonl", "train": source, **kwargs})


def skills_config(**kwargs):
    sizes = {"num_train": 50, "num_validation": 10, "num_test": 20}
    return DataConfig(**{"name": "s", "source": "skills", "skills": ["rot13"], **sizes, **kwargs})


def hub_folder(tmp_path):
    import pandas

    folder = tmp_path / "maths"
    (folder / "data").mkdir(parents=True)
    frame = pandas.DataFrame({"q": [f"q{i}" for i in range(60)], "n": range(60), "bad": None})
    frame[:50].to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    frame[50:].to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


def hub(path, **kwargs):
    sources = {
        "train": SourceConfig(path=str(path)),
        "test": SourceConfig(path=str(path), split="test"),
    }
    templates = {"prompt": "{q}=", "completion": "{n}"}
    return DataConfig(**{"name": "h", "source": "hub", **sources, **templates, **kwargs})


def texts(examples):
    return [(example.prompt, example.completion) for example in examples]


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
