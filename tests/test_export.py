"""What an exported run is, against stock PEFT and transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import say
from exports import RUNS, base_of, loaded, stock
from safetensors.torch import load_file

from lorabench.export import agreement, write


def logits(model: Any) -> torch.Tensor:
    """On tokens of the test's own, not those the export compares on."""
    ids = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def gap(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float((other - reference).abs().max() / reference.abs().max())


def embeddings(folder: str | Path) -> torch.Tensor:
    """As they lie in the file, whatever transformers would make of them."""
    tensors = load_file(Path(folder) / "model.safetensors")
    endings = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
    (name,) = (name for name in tensors if name.endswith(endings))
    return tensors[name]


# --- merged ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", RUNS, ids=" ".join)
def test_a_merged_folder_has_the_adapters_logits(settings, trained, tmp_path):
    run = trained(*settings)
    said = say("export", run, "--to", "merged", tmp_path / "merged")
    assert said.code == 0, said.err
    # Float32: every merged weight is rounded once, 6e-8 of its size; 1e-7 to 2e-6 measured.
    merged = loaded(tmp_path / "merged")
    reference = logits(stock(run))
    assert gap(reference, logits(merged)) <= 1e-5
    base = loaded(Path(base_of(run)))
    assert gap(reference, logits(base)) > 0.05  # the adapter does something
    if not any("embed_tokens" in override for override in settings):
        assert torch.equal(embeddings(tmp_path / "merged"), embeddings(base_of(run)))
        assert "embeddings  unchanged, bit for bit" in said.out
    tied = settings[0] in ("gemma", "gpt2", "bert")
    untied = tied and any("head=" in word or "embed_tokens" in word for word in settings)
    stays = tied and not untied
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    if untied:
        assert config["tie_word_embeddings"] is False
        assert ("untied" in said.out) and not torch.equal(head.weight, embedding.weight)
    assert (head.weight is embedding.weight) == stays
    assert config["dtype"] == "float32"
    report = json.loads((tmp_path / "merged" / "export.json").read_text())
    assert report["run_id"] == run.name
    assert report["checks"]["merged"].keys() == {"float32"}
    assert max(report["checks"][what]["float32"] for what in ("merged", "reloaded")) <= 1e-5
    assert report["checks"]["on"] == "4 x 32 random tokens, 4 test examples"


@pytest.mark.parametrize("kind", ["gemma", "gpt2"])
def test_plain_merge_and_unload_on_a_tied_head_is_off_by_far(kind, trained):
    """Why export unties: PEFT adds the head's update to the embeddings too."""
    run = trained(kind, "head=lora", *(["lora.bias=all"] if kind == "gpt2" else []))
    wrapped = stock(run)
    reference = logits(wrapped)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        plain = wrapped.merge_and_unload()
    assert gap(reference, logits(plain)) > 0.01  # a thousand times what export allows
    kept = embeddings(base_of(run))
    assert not torch.allclose(plain.get_input_embeddings().weight, kept, atol=1e-3)


@pytest.mark.slow
def test_another_process_reads_the_same_from_disk(elsewhere, trained, tmp_path):
    run = trained("gemma", "head=lora")
    place = tmp_path / "merged"
    place.mkdir()  # an empty folder is as good as none
    assert say("export", run, "--to", "merged", place).code == 0
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = AutoTokenizer.from_pretrained(sys.argv[1])("reverse: stone", return_tensors="pt").input_ids
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save((ids, model(input_ids=ids).logits), sys.argv[2])
"""
    saved = tmp_path / "logits.pt"
    elsewhere.run(script, place, saved)
    ids, theirs = torch.load(saved)
    with torch.no_grad():
        reference = stock(run)(input_ids=ids).logits
    assert gap(reference, theirs) <= 1e-5  # as above
    assert not list(tmp_path.glob(".*"))  # no half-written folder beside


def test_float64_arithmetic_tells_the_weights_from_float32s_own(trained, tmp_path, monkeypatch):
    """A bound below float32's rounding stands for a base that float32 computes badly."""
    run = trained("gemma", "head=lora")
    assert say("export", run, "--to", "merged", tmp_path / "plain").code == 0
    found = json.loads((tmp_path / "plain/export.json").read_text())["checks"]["merged"]["float32"]
    monkeypatch.setattr(write, "MAX_DIFFERENCE", 0.9 * found)
    said = say("export", run, "--to", "merged", tmp_path / "merged")
    checks = json.loads((tmp_path / "merged/export.json").read_text())["checks"]
    assert checks["merged"]["float32"] == found
    assert checks["merged"] == checks["reloaded"]
    assert re.search(r"^merged +off by \S+ \(float32\), \S+ \(float64\) of the", said.out, re.M)
    model = stock(run).double()
    reference, merged = logits(model), logits(loaded(tmp_path / "merged").double())
    assert 0 < gap(reference, merged) < 0.9 * found  # weights rounded once, nothing else
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (
        tmp_path / "plain/model.safetensors"
    ).read_bytes()


# --- lower dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_lower_dtype_is_reported_and_is_rounding_alone(dtype, trained, tmp_path):
    run = trained("gemma", "head=lora")
    place = tmp_path / "merged"
    said = say("export", run, "--to", "merged", place, "--dtype", dtype, "--json")
    assert said.code == 0, said.err
    report = json.loads(said.out)
    config = json.loads((place / "config.json").read_text())
    assert config["dtype"] == dtype and config["tie_word_embeddings"] is False
    # The stock path: PEFT's merge on a really untied base, rounded by torch.
    wrapped = stock(run)
    tree = wrapped.get_base_model()
    own = tree.lm_head.base_layer.weight.detach().clone()
    tree.lm_head.base_layer.weight = torch.nn.Parameter(own)
    tree.config.tie_word_embeddings = False
    merged = wrapped.merge_and_unload().state_dict()
    written = load_file(place / "model.safetensors")
    assert written.keys() == merged.keys()
    for name, tensor in written.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, merged[name].to(tensor.dtype)), name
    assert torch.equal(embeddings(place), embeddings(base_of(run)).to(getattr(torch, dtype)))
    found = agreement.divergence([logits(stock(run))], [logits(loaded(place))])
    rounding = report["checks"]["rounding"]
    assert 0.2 < found.kl / rounding["kl"] < 5  # other tokens, the same order
    assert 0 < rounding["kl"] <= rounding["max_kl"] < report["checks"]["adapter_kl"] / 10
    assert 0.9 < rounding["top1"] <= 1


def test_the_default_dtype_is_the_bases_own(trained, tmp_path):
    run = trained("llama", "head=lora", "model.dtype=bfloat16", "trainer.dtype=bfloat16")
    said = say("export", run, "--to", "merged", tmp_path / "merged")
    assert said.code == 0, said.err
    assert re.search(r"^bfloat16 +reloaded: KL \S+ nats .* same best token at", said.out, re.M)
    kinds = {t.dtype for t in load_file(tmp_path / "merged/model.safetensors").values()}
    assert kinds == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(dtype):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(20000, generator=generator) * torch.logspace(-4, 1, 20000)
    numbers = torch.cat([numbers, torch.tensor([0.0, -0.0, 1.0, -2.5, 1e-9, -1e-9])])
    drawn = agreement.round_stochastically(numbers, dtype, generator)
    assert torch.equal(drawn.to(dtype).float(), drawn)  # values of the dtype
    held = numbers.to(dtype).float() == numbers
    assert torch.equal(drawn[held], numbers[held])  # what it holds stays
    # Neighbours: no value of the dtype lies between a number and its draw.
    nearest = numbers.to(dtype).float()
    step = torch.finfo(dtype).eps * numbers.abs() + torch.finfo(dtype).smallest_normal
    assert ((drawn - numbers).abs() <= step).all()
    # Uniform in the gap, nearest errs by u^2/12 and a draw by u^2/6: 20,000 numbers, within 5%.
    ratio = ((drawn - numbers) / step).square().mean() / (
        (nearest - numbers) / step
    ).square().mean()
    assert float(ratio) == pytest.approx(2, rel=0.05)
    many = torch.full((100_000,), 1 + 0.3 * torch.finfo(dtype).eps)
    mean = agreement.round_stochastically(many, dtype, generator).double().mean()
    # Standard error of the mean: sqrt(0.3 * 0.7 / 1e5) of a gap, 0.0015; four of them.
    assert float((mean - 1) / torch.finfo(dtype).eps) == pytest.approx(0.3, abs=0.006)


def test_divergence_is_torchs():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 5, 11, generator=generator) for _ in range(2))
    found = agreement.divergence([p[:1], p[1:]], [q[:1], q[1:]])
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / 10
    assert found.kl == pytest.approx(float(expected), rel=1e-12)
    assert found.top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    lead = p.max(-1).values - p.gather(-1, q.argmax(-1, keepdim=True))[..., 0]
    assert found.gap == pytest.approx(float(lead.max()))


# --- a merge that goes wrong leaves nothing --------------------------------------------------


def test_a_merge_that_is_off_is_refused(trained, tmp_path, monkeypatch):
    """With untying taken out, what is left is plain merge_and_unload."""
    monkeypatch.setattr(write, "_untie", lambda tree: None)
    run = trained("gemma", "head=lora")
    said = say("export", run, "--to", "merged", tmp_path / "merged")
    assert said.code == 2 and said.out == "" and len(said.lines) == 1
    assert said.err.startswith("export: the merged model's logits must be the adapter's to 1e-05")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "message"),
    [("float32", "export: the reloaded model's logits"), ("bfloat16", "by rounding alone")],
)
def test_what_is_written_wrongly_is_refused(dtype, message, trained, tmp_path, monkeypatch):
    save = transformers.PreTrainedModel.save_pretrained

    def off_by_five_percent(self, *args, **kwargs):
        self.get_output_embeddings().weight.data *= 1.05
        return save(self, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", off_by_five_percent)
    run = trained("gemma", "head=lora")
    said = say("export", run, "--to", "merged", tmp_path / "merged", "--dtype", dtype)
    assert said.code == 2 and len(said.lines) == 1
    assert message in said.err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_lacks_a_weight_is_refused(trained, tmp_path, monkeypatch):
    """The flag without a parameter of its own: transformers saves the embeddings alone."""
    monkeypatch.setattr(
        write, "_untie", lambda tree: setattr(tree.config, "tie_word_embeddings", False)
    )
    monkeypatch.setattr(write, "_must_agree", lambda *_: {})
    monkeypatch.setattr(write, "_must_keep", lambda *_: True)
    monkeypatch.setattr(transformers.utils.logging, "get_verbosity", lambda: 50)
    run = trained("gemma", "head=lora")
    said = say("export", run, "--to", "merged", tmp_path / "merged")
    assert said.code == 2
    assert "must load whole" in said.err and "lm_head.weight" in said.err
    assert not list(tmp_path.iterdir())


# --- adapter ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [("gemma", "head=lora"), ("gpt2", "head=lora", "lora.bias=all"), ("bert", "head=lora")],
    ids=" ".join,
)
def test_an_exported_adapter_is_the_runs_own(settings, trained, tmp_path):
    run = trained(*settings)
    said = say("export", run, "--to", "adapter", tmp_path / "adapter")
    assert said.code == 0, said.err
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {*names, "export.json"}
    for name in names:
        assert (tmp_path / "adapter" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    count = len(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert f"reloaded    by PEFT: {count} tensors" in said.out


def test_an_adapter_on_a_tied_head_holds_no_weight_of_the_base(trained):
    tensors = load_file(trained("gemma", "head=lora") / "adapter" / "adapter_model.safetensors")
    assert all(re.search(r"\.lora_[AB]\.weight$", name) for name in tensors)
