"""Scores against transformers' own loss, its own greedy decoding, and stock PEFT."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from conftest import composed, predictions, scores
from processes import Elsewhere

from lorabench import cli, data, plan
from lorabench import model as base_model
from lorabench.config.choices import METRICS
from lorabench.evaluate import DEFINITIONS, evaluate, summarise
from lorabench.pack import Batch, ModulePack

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
    pack, tokens, table = scored(*skills, "data.num_test=20")
    generated = []
    for i in range(len(tokens)):
        start = tokens.completion_start[i]
        completion = tokens.input_ids[i][start:]
        out = pack.tree.eval().generate(
            torch.tensor([tokens.input_ids[i][:start]]),
            do_sample=False,
            max_new_tokens=len(completion),
            attention_mask=torch.ones(1, start, dtype=torch.long),
        )
        generated.append(int(out[0, start : start + len(completion)].tolist() == completion))
    assert table.exact_match.tolist() == generated


def test_nll_per_token_is_the_stock_loss_of_the_whole_split() -> None:
    """A mean over examples weighs short completions more, and is not comparable with train/loss."""
    _, tokens, table = scored()
    base = base_model.load(composed(*SMALL).model, "cpu")
    width = max(map(len, tokens.input_ids))
    ids = torch.zeros(len(tokens), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (one, start) in enumerate(zip(tokens.input_ids, tokens.completion_start, strict=True)):
        ids[row, : len(one)] = torch.tensor(one)
        labels[row, start : len(one)] = torch.tensor(one[start:])
    with torch.no_grad():
        expected = base(input_ids=ids, labels=labels).loss.item()
    summary = summarise(pa.Table.from_pandas(table), ["nll", "nll_per_token"])
    # Other batches: float32 rounding of a loss near 10.
    assert summary["nll_per_token"] == (pytest.approx(expected, rel=2e-5), 40)
    assert abs(summary["nll"][0] - expected) > 1e-3  # completions of several lengths
    assert table.num_tokens.tolist() == (labels != -100).sum(1).tolist()


def test_batch_size_is_an_argument_and_changes_no_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine short of memory halves it, and must get the same table."""
    pack, tokens, table = scored(*KNOWN)
    tokenizer = base_model.tokenizer(pack.configs[0].model)
    sizes: list[int] = []
    score = pack.score

    def counted(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(batch.input_ids[0]))
        return score(batch)

    monkeypatch.setattr(pack, "score", counted)
    (small,) = evaluate(
        pack, tokens, tokenizer, data.pad_id(tokenizer), ["nll", "exact_match"], batch_size=7
    )
    assert sizes == [7] * 5 + [5]
    assert small["example"].to_pylist() == table.example.tolist()
    assert small["exact_match"].to_pylist() == table.exact_match.tolist()
    # Other shapes of the products: float32 rounding.
    np.testing.assert_allclose(small["nll"].to_numpy(), table.nll, rtol=2e-5, atol=1e-6)


def test_every_metric_is_defined() -> None:
    assert set(DEFINITIONS) == set(METRICS)


def test_recorded_nll_is_what_plain_peft_gives_without_lorabench(
    elsewhere: Elsewhere, tmp_path: Path
) -> None:
    """The adapter folder, the base folder and the examples are all another person needs."""
    code = cli.main(["train", *SMALL, "trainer.steps=20", "head=lora", f"output_dir={tmp_path}"])
    assert code == 0
    (folder,) = (p.parent for p in tmp_path.glob("default/*/record.json"))
    config = composed(*SMALL, "trainer.steps=20", "head=lora")
    tokenizer = base_model.tokenizer(config.model)
    tokens = data.tokenise(data.load(config.data).test, tokenizer, config.data)
    length = max(map(len, tokens.input_ids))
    ids, labels = data.batch(tokens, range(len(tokens)), length, data.pad_id(tokenizer))
    np.savez(tmp_path / "batches.npz", ids=ids, labels=labels)
    script = textwrap.dedent("""
        import json, sys
        import numpy as np, torch
        sys.modules["lorabench"] = None  # importing it is an error
        from peft import AutoPeftModelForCausalLM
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
    values = json.loads(elsewhere.run(script, folder, tmp_path / "batches.npz").splitlines()[-1])
    recorded = scores(json.loads((folder / "record.json").read_text()))["test"]["nll"]
    # The bound: float32, the same batches, sums in another order.
    assert abs(recorded["value"] - sum(values) / len(values)) < 1e-6
    table = pd.read_parquet(predictions(folder)).query("split == 'test'")
    np.testing.assert_allclose(table.nll, values, rtol=1e-5)
    assert recorded["num_examples"] == len(values) == 40
