"""Scores against transformers' own loss, its own greedy decoding, and stock PEFT."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from conftest import composed, predictions, scores

from lorabench import cli, data, plan
from lorabench import model as base_model
from lorabench.evaluate import answers, evaluate, extract, summarise
from lorabench.pack import ModulePack

SMALL = [
    "tracker=none",
    "data.num_train=64",
    "data.num_validation=8",
    "data.num_test=40",
    "trainer.eval_batch_size=16",
]
# Skills the base knows, of which it gets some examples wrong: both outcomes occur.
KNOWN = ["data.skills=[sort,double]"]


def scored(*overrides: str) -> tuple[ModulePack, data.Tokens, pd.DataFrame]:
    config = composed(*SMALL, *overrides)
    tokenizer = base_model.tokenizer(config.model)
    pack = ModulePack(
        base_model.load(config.model, "cpu"), config, plan.make(config).lora_modules, "cpu"
    )
    tokens = data.tokenise(data.load(config.data).test, tokenizer, config.data)
    (table,) = evaluate(pack, tokens, tokenizer, data.pad_id(tokenizer), ["nll", "exact_match"])
    return pack, tokens, table.to_pandas()


def test_nll_is_the_models_own_loss_example_by_example() -> None:
    _, tokens, table = scored()
    base = base_model.load(composed(*SMALL).model, "cpu")
    for i in range(len(tokens)):
        ids = torch.tensor([tokens.input_ids[i]])
        labels = ids.clone()
        labels[:, : tokens.completion_start[i]] = -100
        with torch.no_grad():
            expected = base(input_ids=ids, labels=labels).loss.item()
        # Another batch size and length: float32 rounding of a loss near 10.
        assert table.nll[i] == pytest.approx(expected, rel=2e-5)
    assert summarise(pa.Table.from_pandas(table), ["nll"])["nll"] == (table.nll.mean(), 40)


@pytest.mark.parametrize("skills", [KNOWN, ["data.skills=[rot13]"]])
def test_exact_match_is_greedy_decoding_writing_the_completion(skills: list[str]) -> None:
    pack, tokens, table = scored(*skills)
    generated = []
    for i in range(len(tokens)):
        start = tokens.completion_start[i]
        out = pack.tree.eval().generate(
            torch.tensor([tokens.input_ids[i][:start]]),
            do_sample=False,
            max_new_tokens=24,
            attention_mask=torch.ones(1, start, dtype=torch.long),
        )
        completion = tokens.input_ids[i][start:]
        generated.append(int(out[0, start : start + len(completion)].tolist() == completion))
    assert table.exact_match.tolist() == generated


def test_answers_match_generation_one_by_one() -> None:
    pack, tokens, _ = scored(*KNOWN)
    config = composed(
        *SMALL,
        *KNOWN,
        "data.metric=[answer]",
        "data.answer_pattern='[a-z]+'",
        "data.answer_examples=20",
        "data.answer_max_new_tokens=12",
    )
    tokenizer = base_model.tokenizer(config.model)
    (table,) = answers(pack, tokens, tokenizer, data.pad_id(tokenizer), config.data)
    assert len(table) == len(tokens) == 40
    assert table["answer"].null_count == table["generated"].null_count == 20
    asked = table.slice(0, 20).to_pandas()
    pack.tree.eval()
    for i, row in asked.iterrows():
        start = tokens.completion_start[i]
        out = pack.tree.generate(
            torch.tensor([tokens.input_ids[i][:start]]),
            do_sample=False,
            max_new_tokens=12,
            attention_mask=torch.ones(1, start, dtype=torch.long),
        )
        text = tokenizer.decode(out[0, start:], skip_special_tokens=True)
        assert row.generated == text  # padding on the left and the mask change nothing
        wanted = tokenizer.decode(tokens.input_ids[i][start:], skip_special_tokens=True)
        assert row.answer == int(text == wanted)
    assert 0 < asked.answer.mean() <= 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234.", "1234"),
        ("first #### 1 then #### $2,000", "2000"),
        ("The answer is: 42", "42"),
        ("no answer", None),
    ],
)
def test_answers_are_extracted_and_normalised(text: str, answer: str | None) -> None:
    pattern = composed("data=metamathqa").data.answer_pattern
    assert pattern is not None
    assert extract(pattern, text) == answer


def test_recorded_nll_is_what_plain_peft_gives_without_lorabench(tmp_path: Path) -> None:
    """The adapter folder, the base folder and the examples are all another person needs."""
    code = cli.main(["train", *SMALL, "trainer.steps=20", "head=lora", f"output_dir={tmp_path}"])
    assert code == 0
    (folder,) = (p.parent for p in tmp_path.glob("default/*/record.json"))
    config = composed(*SMALL, "trainer.steps=20", "head=lora")
    tokenizer = base_model.tokenizer(config.model)
    tokens = data.tokenise(data.load(config.data).test, tokenizer, config.data)
    length = data.padded_length(tokens, config.data.max_length)
    ids, labels = data.batch(tokens, range(len(tokens)), length, data.pad_id(tokenizer))
    np.savez(tmp_path / "batches.npz", ids=ids, labels=labels)
    script = textwrap.dedent("""
        import json, sys
        import numpy as np, torch
        sys.modules["lorabench"] = None  # importing it is an error
        from peft import AutoPeftModelForCausalLM
        torch.set_num_threads(1)
        folder, batches = sys.argv[1:]
        model = AutoPeftModelForCausalLM.from_pretrained(folder + "/adapter").eval()
        content = np.load(batches)
        ids, labels = torch.from_numpy(content["ids"]), torch.from_numpy(content["labels"])
        values = []
        for start in range(0, len(ids), 16):
            with torch.no_grad():
                logits = model(input_ids=ids[start:start + 16]).logits[:, :-1]
            target = labels[start:start + 16, 1:]
            nll = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), target, reduction="none", ignore_index=-100)
            values += (nll.double().sum(1) / (target != -100).sum(1)).tolist()
        print(json.dumps(values))
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(tmp_path / "batches.npz")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    import json

    values = json.loads(done.stdout.splitlines()[-1])
    recorded = scores(json.loads((folder / "record.json").read_text()))["test"]["nll"]
    # The bound: float32, the same batches, sums in another order.
    assert abs(recorded["value"] - sum(values) / len(values)) < 1e-6
    table = pd.read_parquet(predictions(folder)).query("split == 'test'")
    np.testing.assert_allclose(table.nll, values, rtol=1e-5)
    assert recorded["num_examples"] == len(values) == 40
