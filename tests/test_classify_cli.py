"""A classification from the command line: tried, trained, exported, read by others."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers as t
from conftest import composed, predictions, recorded_runs, scores
from peft import PeftModel
from stock_classifier import LABELS, stock_model, words_of
from torch import nn

from lorabench import cli, data
from lorabench import model as base_model

# PEFT asks transformers by a name that 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "lorabench:tiny-gemma"])
def test_adapters_reload_in_plain_peft_to_the_recorded_scores(
    kind: str, classifiers: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    words = [*words_of(classifiers.get(kind, kind), texts), "trainer.steps=40", "trainer.lr=3e-3"]
    sweep = "lora.bias=none,all" if kind == "bert" else "lora.r=2,4"
    command = ["train", "-m", *words, sweep, f"output_dir={tmp_path}"]
    assert cli.main([*command, "trainer.num_threads=1"]) == 0
    config = composed(*words)
    tokenizer = t.AutoTokenizer.from_pretrained(base_model.location(config.model))
    examples = data.load(config.data).test
    batch = tokenizer([e.prompt for e in examples], padding=True, return_tensors="pt")
    targets = torch.tensor([LABELS.index(example.completion) for example in examples])
    runs = recorded_runs(tmp_path)
    assert len(runs) == 2
    for folder, record in runs:
        assert record["plan"]["labels"] == LABELS and record["plan"]["pack"]["size"] == 2
        state = load_file(folder / "adapter" / "adapter_model.safetensors")
        (head,) = record["plan"]["saved_modules"]
        parts = ["weight", "bias"] if kind == "bert" else ["weight"]
        modules = record["plan"]["lora_modules"]
        keys = {f"base_model.model.{m}.lora_{x}.weight" for m in modules for x in "AB"}
        keys |= {f"base_model.model.{head}.{part}" for part in parts}
        if record["config"]["lora"]["bias"] == "all":
            owners = [n.removesuffix(".bias") for n, _ in stock_model(config).named_parameters()
                      if n.endswith(".bias") and not n.startswith(head)]  # fmt: skip
            keys |= {f"base_model.model.{m}.base_layer.bias" for m in owners if m in modules}
            keys |= {f"base_model.model.{m}.bias" for m in owners if m not in modules}
        assert set(state) == keys
        assert sum(p.numel() for p in state.values()) == record["plan"]["trainable_parameters"]

        model = PeftModel.from_pretrained(stock_model(config), folder / "adapter").eval()
        with torch.no_grad():
            logits = model(**batch).logits
        nll = nn.functional.cross_entropy(logits, targets, reduction="none").double()
        found = scores(record)["test"]
        # The bound: float32, the same examples, GEMMs of other shapes.
        assert abs(found["nll"]["value"] - nll.mean().item()) < 1e-6
        right = (logits.argmax(1) == targets).double()
        assert found["accuracy"]["value"] == right.mean().item()
        assert found["accuracy"]["num_examples"] == len(examples)
        assert found["accuracy"]["definition"] == "accuracy/1"
        table = pd.read_parquet(predictions(folder)).query("split == 'test'")
        assert table.accuracy.tolist() == right.tolist()
        assert table.predicted.tolist() == [LABELS[i] for i in logits.argmax(1)]
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        first = json.loads(lines[0])["train/loss"]
        assert first == pytest.approx(math.log(len(LABELS)), abs=0.5)
        if kind != "bert":  # whose weights are random: nothing to tell letters by
            assert found["nll"]["value"] < 0.8 * math.log(len(LABELS))


def test_a_run_that_cannot_pack_classifies_alone(
    classifiers: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    words = [*words_of(classifiers["bert"], texts), "trainer.steps=3", "lora.use_dora=true"]
    assert cli.main(["train", *words, f"output_dir={tmp_path}"]) == 0
    ((_, record),) = recorded_runs(tmp_path)
    assert record["status"] == "finished" and "DoRA" in record["plan"]["pack"]["alone"]
    assert set(scores(record)["test"]) == {"nll", "accuracy"}


# transformers 5.17's DeBERTa is scripted.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_deberta_classifies_alone(
    classifiers: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    """Its adapted layers project the relative positions too, once for the whole batch."""
    tokenizer = t.AutoTokenizer.from_pretrained(classifiers["bert"])
    shape = t.DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, relative_attention=True, pos_att_type=["p2c", "c2p"],
        max_position_embeddings=128,
    )  # fmt: skip
    base = tmp_path / "base"
    t.DebertaV2ForSequenceClassification(shape).save_pretrained(base)
    tokenizer.save_pretrained(base)
    words = [*words_of(base, texts), "model.attn_implementation=eager", "trainer.steps=3"]
    assert cli.main(["train", "-m", *words, "seed=0,1", f"output_dir={tmp_path / 'out'}"]) == 0
    found = [record for _, record in recorded_runs(tmp_path / "out")]
    assert [record["status"] for record in found] == ["finished"] * 2
    for record in found:
        assert "relative positions" in record["plan"]["pack"]["alone"]


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
    (run,) = (path.parent for path in (tmp_path / "out").glob("*/*/record.json"))
    place = tmp_path / "merged"
    assert cli.main(["export", str(run), "--to", "merged", str(place)]) == 0
    read = t.AutoModelForSequenceClassification.from_pretrained(place).eval()
    recorded = json.loads((run / "record.json").read_text())
    assert recorded["exports"]["merged"] == "yes" and "head" in recorded["exports"]["gguf"]
    assert list(read.config.id2label.values()) == recorded["plan"]["labels"]
    assert recorded["plan"]["labels"] == ["a", "b", "c", "d", "no", "yes"]

    config = composed(*words)
    tokenizer = t.AutoTokenizer.from_pretrained(place)
    table = pd.read_parquet(predictions(run)).query("split == 'test'")
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

    tokenizer = t.AutoTokenizer.from_pretrained(TINY_GEMMA)
    shape = t.AutoConfig.from_pretrained(TINY_GEMMA, num_labels=2)
    base = t.AutoModelForSequenceClassification.from_config(shape)
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
    (run,) = (path.parent for path in (tmp_path / "out").glob("*/*/record.json"))
    file.write_text(file.read_text().replace('"z"', '"new"'))
    capsys.readouterr()
    assert cli.main(["export", str(run), "--to", "merged", str(tmp_path / "merged")]) == 0
    assert "no test example (the data has changed since)" in capsys.readouterr().out
    read = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert read.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert cli.main(["export", str(run), "--to", "gguf", str(tmp_path / "g")]) == 2
    assert "takes BERT's kind alone" in capsys.readouterr().err
