"""A classification from the command line: tried, trained, exported, read by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from conftest import composed

from lorabench import cli, data

# PEFT asks transformers by a name that 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("model", ["tiny-bert", "tiny-gemma"])
def test_a_classifier_is_tried_trained_and_exported_with_its_labels(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merged folder, read by stock transformers, predicts what the run recorded."""
    words = [
        "task=seq_cls", "head=full", f"model={model}", "data=classes", "tracker=none",
        "data.skills=[is_sorted,most_frequent]", "data.num_train=64", "data.num_validation=8",
        "data.num_test=24", "trainer.steps=6", "trainer.num_threads=1", "lora.r=4",
        "target_modules=attention", f"output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    assert cli.main(["plan", "--smoke", *words]) == 0
    assert "adapters reloaded by plain PEFT" in capsys.readouterr().out
    assert cli.main(["train", *words]) == 0
    (run,) = (tmp_path / "out").glob("*/*/")
    place = tmp_path / "merged"
    assert cli.main(["export", str(run), "--to", "merged", str(place)]) == 0
    read = transformers.AutoModelForSequenceClassification.from_pretrained(place).eval()
    recorded = json.loads((run / "record.json").read_text())
    assert recorded["exports"]["merged"] == "yes" and "head" in recorded["exports"]["gguf"]
    assert list(read.config.id2label.values()) == recorded["plan"]["labels"]
    assert recorded["plan"]["labels"] == ["a", "b", "c", "d", "no", "yes"]

    config = composed(*words)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    table = pd.read_parquet(run / "predictions.parquet").query("split == 'test'")
    examples = {example.id: example.prompt for example in data.load(config.data).test}
    with torch.no_grad():
        for example, predicted in zip(table["example"], table["predicted"], strict=True):
            ids = tokenizer(examples[example], return_tensors="pt")["input_ids"]
            best = int(read(input_ids=ids).logits.argmax())
            assert read.config.id2label[best] == predicted


def test_a_checkpoint_that_classified_otherwise_and_data_that_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three labels on a base of two; a label renamed after the run: the export goes on without."""
    from lorabench.zoo import TINY_GEMMA

    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_GEMMA)
    shape = transformers.AutoConfig.from_pretrained(TINY_GEMMA, num_labels=2)
    base = transformers.AutoModelForSequenceClassification.from_config(shape)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"text {i}", "completion": "xyz"[i % 3]} for i in range(60)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "task=seq_cls", "head=full", "model=local", f"model.path={tmp_path / 'base'}", "data=jsonl",
        f"data.train.path={file}", "data.metric=[nll,accuracy]", "tracker=none", "trainer.steps=3",
        "trainer.num_threads=1", "lora.r=4", f"output_dir={tmp_path / 'out'}",
        "data.max_length=32",
    ]  # fmt: skip
    assert cli.main(["train", *words]) == 0
    (run,) = (tmp_path / "out").glob("*/*/")
    file.write_text(file.read_text().replace('"z"', '"new"'))
    capsys.readouterr()
    assert cli.main(["export", str(run), "--to", "merged", str(tmp_path / "merged")]) == 0
    assert "no test example (the data has changed since)" in capsys.readouterr().out
    read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert read.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert cli.main(["export", str(run), "--to", "gguf", str(tmp_path / "g")]) == 2
    assert "takes BERT's kind alone" in capsys.readouterr().err
