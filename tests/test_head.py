"""The head on chosen rows and in chunks, against the model's own logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import SMALL

from lorabench import adapters
from lorabench.pack import head, probe
from lorabench.pack.batch import Batch, Laid
from lorabench.pack.rows import Spans


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


def layouts(model: Any) -> list[bool]:
    """Padded, and end to end where the model takes it so."""
    return [False, True] if probe.why_padded(model) is None else [False]


def row_head(model: Any) -> head.RowHead:
    return head.RowHead(model, adapters.Clock([0]), Spans(1))


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
    rows = row_head(model)
    there = target != -100
    for end_to_end in layouts(model):
        laid = Laid(Batch.make([ids], [labels], [1]), end_to_end, "input", "cpu")
        with laid.attention(model):
            hidden = rows.hidden(laid)
            summed = rows.loss(hidden, laid, [1])
            (0.5 * summed).sum().backward()
            with torch.no_grad():
                (nll,), (best,) = rows.scored(hidden, laid)
        # Float64; the models cast to float32 inside norms, on both sides alike.
        torch.testing.assert_close(nll[0], expected[there], rtol=1e-11, atol=0)
        assert summed.tolist() == pytest.approx([expected[there].sum().item()], rel=1e-11)
        for parameter, gradient in gradients.items():
            mine = 2 * model.get_parameter(parameter).grad
            gap = float((mine - gradient).norm())
            assert gap <= 1e-6 * float(gradient.norm()) + 1e-12, parameter
        model.zero_grad()
        assert best[0].tolist() == logits.detach().argmax(-1)[there].tolist()


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
    rows = row_head(model)
    assert (rows.last is None) == (name in WITHOUT_MLP)
    seen: list[int] = []
    if rows.last is not None:
        rows.last.block.register_forward_hook(lambda m, args, out: seen.append(args[0].numel()))
    width = model.config.get_text_config().hidden_size
    for end_to_end in layouts(model):
        seen.clear()
        laid = Laid(Batch.make([ids], [labels], [1]), end_to_end, "input", "cpu")
        with laid.attention(model):
            nll = rows.loss(rows.hidden(laid), laid, [1])
            nll.sum().backward()
        read = int((target != -100).sum())
        assert seen == ([] if rows.last is None else [read * width]), "of 64 rows"
        # Float64, but for a softmax in float32 (Gemma 2, Bloom): it rounds by 6e-8.
        assert nll.sum().item() == pytest.approx(expected.item(), rel=1e-9)
        for parameter_name, mine in gradients().items():
            parameter_name = parameter_name.replace("mlp.block.", "mlp.")
            gap = float((mine - theirs[parameter_name]).norm())
            assert gap <= 1e-6 * float(theirs[parameter_name].norm()) + 1e-12, parameter_name
    # Outside of a batch every row is read.
    whole = model(input_ids=torch.from_numpy(ids)).logits[:, :-1].transpose(1, 2)
    torch.testing.assert_close(whole, logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("end_to_end", [False, True])
@pytest.mark.parametrize("spread", ["input", "inside", "head"])
def test_rows_are_those_that_predict_a_label(end_to_end: bool, spread: str) -> None:
    """Whatever the model gives out, row by row: here the ids themselves, of a run and its mates."""
    ids, labels = examples()
    batch = Batch.make([ids, ids[:2]], [labels, labels[:2]], [2, 1])
    laid = Laid(batch, end_to_end, spread, "cpu")
    flat = laid.input_ids.flatten()
    if spread == "inside":
        flat = laid.rows.spread(list(flat.split(laid.at_input.counts)))
    kept = labels != -100
    predicted = [ids[kept], ids[:2][kept[:2]]]
    slabs = predicted if spread == "head" else [predicted[0], *predicted]
    # The token behind each row is what the row predicts.
    assert flat[laid.picked.index_N + 1].tolist() == np.concatenate(slabs).tolist()
    assert [one.tolist() for one in laid.targets] == [one.tolist() for one in predicted]
