"""Fixtures: tiny checkpoints of several architectures, and data whose lengths differ."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import tiny_config


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a checkpoint folder of a tiny random model, with the embedded base's tokenizer."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            from lorabench import model as base_model

            folder = tmp_path_factory.mktemp("models") / kind
            tokenizer = AutoTokenizer.from_pretrained(base_model.ZOO / "tiny-gemma")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_config(kind, len(tokenizer)))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return make


@pytest.fixture(scope="session")
def classifiers(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Checkpoints to classify with: an encoder, as BERT's are saved, and two decoders."""
    import torch
    import transformers as t

    place = tmp_path_factory.mktemp("classifiers")
    characters = string.ascii_lowercase + string.digits
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    words += [f"##{c}" for c in characters]
    tokenizer = t.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    torch.manual_seed(0)
    makers = {
        "bert": t.BertForPreTraining,  # the architecture of bert-base-uncased, pooler included
        "no-pooler": t.BertForMaskedLM,
        "five": t.BertForSequenceClassification,
    }
    found = {}
    for name, maker in makers.items():
        shape = tiny_config("bert", len(words))
        shape.is_decoder = False
        if name == "five":
            shape.num_labels = 5
        found[name] = place / name
        maker(shape).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found | {kind: tiny_folder(kind) for kind in ("gemma", "llama")}


@pytest.fixture(scope="session")
def mixed_lengths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for examples of very different lengths: completions of 1 to 90 tokens."""
    import random

    draw, rows = random.Random(0), []
    for i in range(120):
        prompt = "".join(draw.choices(string.ascii_lowercase, k=draw.choice([1, 4, 20])))
        length = draw.choice([1, 1, 2, 5, 10, 30, 90])
        completion = "".join(draw.choices(string.ascii_lowercase, k=length))
        rows.append(json.dumps({"prompt": f"{i}{prompt}", "completion": completion}) + "\n")
    path = tmp_path_factory.mktemp("lengths") / "mixed.jsonl"
    path.write_text("".join(rows))
    # Without EOS a completion of one letter is a single token.
    return ["data=jsonl", f"data.train.path={path}", "data.add_eos=false", "data.max_length=128"]
