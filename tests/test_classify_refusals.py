"""What task=seq_cls cannot do, refused before or at loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers as t
from conftest import composed, recorded_runs
from peft import LoraConfig, get_peft_model
from stock_classifier import words_of

from lorabench import cli, plan
from lorabench.config import ConfigErrors

# PEFT asks transformers by a name that 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["head=exclude"], ["head: must be full with task=seq_cls", "'exclude'", "use head=full"]),
        (["head=lora"], ["head: must be full", "use head=full"]),
        (
            ["data.metric=[nll,exact_match]"],
            ["data.metric: must be out of nll, accuracy", "use data.metric=[nll,accuracy]"],
        ),
        (
            ["task=causal_lm"],
            ["data.metric: must be out of nll, exact_match, nll_per_token, answer, answer_flexible",
                 "with task=causal_lm",
             "got 'accuracy'; use data.metric=[nll,exact_match]"],
        ),
        (
            ["task=causal_lm", "data.metric=[nll]", "data.labels=[a,b]"],
            ["data.labels: must be null with task=causal_lm", "use task=seq_cls"],
        ),
        (["data.labels=[a]"], ["data.labels: must be at least two different labels"]),
        (["data.chat_template=true"], ["data.chat_template: must be left out with task=seq_cls"]),
        (["data.add_eos=false"], ["data.add_eos: must be left out with task=seq_cls"]),
        (
            ["data.labels=[aa,b,c]"],
            ["data.train: every completion must be one of the 3 labels (aa, b, c); got 'a' (did "
             "you mean 'aa'?)", "more; fix the label or add it to data.labels"],
        ),
        (
            ["target_modules=custom", "target_modules.names=[query,classifier]"],
            ["target_modules.names: must leave out the head (classifier)"],
        ),
        (
            ["task=causal_lm", "data.metric=[nll]"],
            ["task: causal_lm must have a base that sees no later token", "use task=seq_cls"],
        ),
    ],
)  # fmt: skip
def test_what_the_task_cannot_do_is_refused(
    words: list[str], said: list[str], classifiers: dict[str, Path], texts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert cli.main(["plan", *words_of(classifiers["bert"], texts), *words]) == 2
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert not out and any(all(part in line for part in said) for line in lines), err
    assert len({line.partition(":")[0] for line in lines}) == len(lines), err  # one line a mistake


def test_labels_that_training_never_saw_are_refused(
    classifiers: dict[str, Path], tmp_path: Path
) -> None:
    rows = {
        "train": [("aa", "yes"), ("ba", "no")],
        "validation": [("ab", "yes")],
        "test": [("ab", "yes"), ("ca", "nope")],
    }
    words = words_of(classifiers["bert"], tmp_path / "train.jsonl")
    for split, pairs in rows.items():
        path = tmp_path / f"{split}.jsonl"
        lines = [json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in pairs]
        path.write_text("".join(lines))
        words.append(f"data.{split}.path={path}")
    with pytest.raises(ConfigErrors) as refused:
        plan.make(composed(*words))
    assert refused.value.errors == [
        "data.test: every completion must be one of the 2 labels (no, yes); got 'nope' (did you "
        "mean 'no'?) for the prompt 'ca'; fix the label or add it to data.labels"
    ]
    made = plan.make(composed(*words, "data.labels=[yes,nope,no]"))
    assert made.labels == ["yes", "nope", "no"]
    with pytest.raises(ConfigErrors, match=r"at least two; every example of data\.train has 'yes'"):
        shutil.copy(tmp_path / "validation.jsonl", tmp_path / "train.jsonl")
        plan.make(composed(*words))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("RobertaConfig", "'classifier', a RobertaClassificationHead; use another model"),
        ("BartConfig", "has none; use another model"),
        ("GraniteConfig", "which 'granite' of base model 'GraniteConfig' has none for"),
    ],
)
def test_architectures_without_a_head_to_train_are_refused(
    kind: str, said: str, texts: Path, tmp_path: Path
) -> None:
    config = getattr(t, kind)()
    for key in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
        if hasattr(config, key):
            setattr(config, key, 1)
    config.save_pretrained(tmp_path / kind)  # a skeleton needs no weights
    with pytest.raises(ConfigErrors) as refused:
        plan.make(composed(*words_of(tmp_path / kind, texts), "model.dtype=float32"))
    (error,) = refused.value.errors
    assert error.startswith("task: ") and said in error


def test_weights_that_would_be_random_are_refused(
    classifiers: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    words = [
        *words_of(classifiers["no-pooler"], texts),
        "trainer.steps=2",
        f"output_dir={tmp_path}",
    ]
    assert cli.main(["train", *words]) == 1
    ((_, record),) = recorded_runs(tmp_path)
    assert record["status"] == "failed"
    assert "'no-pooler' lacks bert.pooler.dense.bias, bert.pooler.dense.weight" in record["error"]
    assert "BertForSequenceClassification" in record["error"]


def test_an_encoder_made_a_decoder_is_a_language_model(tiny_folder: Callable[[str], Path]) -> None:
    made = plan.make(composed("tracker=none", "model=local", f"model.path={tiny_folder('bert')}"))
    assert made.head.module == "cls.predictions.decoder" and made.labels == []


def test_a_copy_that_nobody_asked_for_is_refused(
    classifiers: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT finds `classifier` at the end of DistilBERT's `pre_classifier` and would copy both."""
    tokenizer = t.AutoTokenizer.from_pretrained(classifiers["bert"])
    config = t.DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, hidden_dim=64, n_layers=2, n_heads=4
    )
    base = t.DistilBertForSequenceClassification(config)
    wrapped = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"]))
    assert any("pre_classifier.modules_to_save" in name for name, _ in wrapped.named_parameters())

    t.DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ["task=seq_cls", "head=full", "data=classes", "model=local", f"model.path={tmp_path}"]
    words += ["target_modules=custom", "target_modules.names=[q_lin]"]
    with pytest.raises(
        ConfigErrors, match="would also train pre_classifier, whose name ends alike"
    ):
        plan.make(composed(*words))
