"""The head on chosen rows and in chunks, against the model's own logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import SMALL

from lorabench import adapters
from lorabench.pack import head, target_rows
from lorabench.pack.batch import Batch


def models() -> dict[str, Any]:
    """Architectures that treat logits or bodies in their own way."""
    common = SMALL | {"vocab_size": 61}
    return {
        "gemma": transformers.GemmaConfig(**common),
        "gemma2 (soft-capping)": transformers.Gemma2Config(**common, final_logit_softcapping=2.0),
        "gemma3": transformers.Gemma3TextConfig(**common),
        "granite (scaled)": transformers.GraniteConfig(
            **{k: v for k, v in common.items() if k != "head_dim"}, logits_scaling=3.0
        ),
        "gpt2": transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4),
        "bloom (adds the residual itself)": transformers.BloomConfig(
            vocab_size=61, hidden_size=32, n_layer=2, n_head=4
        ),
        "opt (called past its body)": transformers.OPTConfig(
            vocab_size=61, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, max_position_embeddings=64,
        ),
    }  # fmt: skip


def examples() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 61, (4, 16))
    labels = ids.copy()
    for row, (start, end) in enumerate([(3, 9), (1, 16), (10, 12), (8, 15)]):
        labels[row, :start] = labels[row, end:] = -100
    return ids, labels


@pytest.mark.parametrize("chunk_rows", [1000, 7, 1])
@pytest.mark.parametrize("name", models())
def test_nll_and_gradients_are_the_models_own(
    name: str, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(models()[name]).double().eval()
    ids, labels = examples()
    logits = model(input_ids=torch.from_numpy(ids)).logits[:, :-1]
    target = torch.from_numpy(labels)[:, 1:]
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), target, reduction="none", ignore_index=-100
    )
    expected.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 61 * chunk_rows)
    rows = head.RowHead(model, [adapters.Clock(0)])
    batch = Batch.make([ids], [labels], 15, "cpu")
    nll = rows.nll(rows.hidden(batch.input_ids_SBT[0], batch), batch.targets_SN)
    nll.sum().backward()
    # Float64; the models cast to float32 inside norms, on both sides alike.
    assert nll.sum().item() == pytest.approx(expected.sum().item(), rel=1e-12)
    by_example = nll.detach().reshape(4, 15).sum(1)
    torch.testing.assert_close(by_example, expected.detach().sum(1), rtol=1e-12, atol=0)
    for parameter, gradient in gradients.items():
        mine = model.get_parameter(parameter).grad
        assert float((mine - gradient).norm()) <= 1e-6 * float(gradient.norm()) + 1e-12, parameter
    with torch.no_grad():
        hidden = rows.hidden(batch.input_ids_SBT[0], batch)
        again, best = rows.scored(hidden, batch.targets_SN)
    torch.testing.assert_close(again, nll.detach(), rtol=1e-12, atol=1e-12)
    there = (batch.targets_SN[0] != -100).numpy()
    chosen = logits.detach().argmax(-1)[target != -100]
    assert best[0][there].tolist() == chosen.tolist()


WITHOUT_MLP = {  # no block of that name, or one that needs more than its input
    "opt (called past its body)", "bloom (adds the residual itself)",
}  # fmt: skip


@pytest.mark.parametrize("name", models())
def test_rows_nobody_reads_skip_the_last_feed_forward_block(name: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(models()[name]).double().eval()
    ids, labels = examples()
    for row, start in enumerate([6, 12, 8, 10]):  # two to four tokens each, some rows repeated
        labels[row, :start] = labels[row, start + 2 + row % 3 :] = -100
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in parameter_name)
    target = torch.from_numpy(labels)[:, 1:]

    def gradients() -> dict[str, torch.Tensor]:
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    logits = model(input_ids=torch.from_numpy(ids)).logits[:, :-1].transpose(1, 2)
    expected = torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
    expected.backward()
    theirs = gradients()
    rows = head.RowHead(model, [adapters.Clock(0)])
    assert (rows.last is None) == (name in WITHOUT_MLP)
    seen: list[int] = []
    if rows.last is not None:
        rows.last.block.register_forward_hook(lambda m, args, out: seen.append(args[0].numel()))
    batch = Batch.make([ids], [labels], 4, "cpu")
    nll = rows.nll(rows.hidden(batch.input_ids_SBT[0], batch), batch.targets_SN).sum()
    nll.backward()
    width = model.config.get_text_config().hidden_size
    assert seen == ([] if rows.last is None else [4 * 4 * width]), "16 of 64 rows"
    assert nll.item() == pytest.approx(expected.item(), rel=1e-12)
    for parameter_name, mine in gradients().items():
        parameter_name = parameter_name.replace("mlp.block.", "mlp.")
        gap = float((mine - theirs[parameter_name]).norm())
        assert gap <= 1e-6 * float(theirs[parameter_name].norm()) + 1e-12, parameter_name
    # Outside of a batch every row is read.
    whole = model(input_ids=torch.from_numpy(ids)).logits[:, :-1].transpose(1, 2)
    torch.testing.assert_close(whole, logits, rtol=1e-12, atol=1e-12)


def test_rows_are_those_that_predict_a_label() -> None:
    ids, labels = examples()
    rows, targets = target_rows(labels, 15)
    kept = targets != -100
    assert kept.sum() == (labels != -100).sum()
    # The token after each row, in the flattened ids, is the row's target.
    assert (ids.reshape(-1)[rows[kept] + 1] == targets[kept]).all()
    assert len(rows) == 4 * 15 and rows.min() >= 0 and rows.max() < ids.size
