"""What an exported run is, against stock PEFT and transformers; and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from conftest import say
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from lorabench import formats, record
from lorabench.config import LoraSettings
from lorabench.export import agreement, source, write

TINY = [
    "trainer=smoke",
    "trainer.num_threads=1",
    "trainer.lr=0.05",
    "tracker=none",
    "lora.r=4",
    "data.num_train=64",
    "data.num_validation=4",
    "data.num_test=4",
    "trainer.eval_examples=2",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable) -> Callable[..., Path]:
    """The folder of a short run on a tiny base, made once."""
    made: dict[tuple[str, ...], Path] = {}
    outputs = tmp_path_factory.mktemp("outputs")

    def make(kind: str, *overrides: str) -> Path:
        key = (kind, *overrides)
        if key not in made:
            out = outputs / str(len(made))
            base = ["model=local", f"model.path={tiny_folder(kind)}", f"output_dir={out}"]
            said = say("train", *TINY, *base, *overrides)
            assert said.code == 0, said.err
            (made[key],) = (path.parent for path in out.glob("*/*/record.json"))
        return made[key]

    return make


def base_of(run: Path) -> str:
    return json.loads((run / "record.json").read_text())["config"]["model"]["path"]


def stock(run: Path) -> Any:
    """The base with the run's adapter, by transformers and PEFT alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base_of(run), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tied layers and renamed calls
        return PeftModel.from_pretrained(model, str(run / "adapter")).eval()


def logits(model: Any) -> torch.Tensor:
    """On tokens of the test's own, not those the export compares on."""
    ids = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def gap(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float((other - reference).abs().max() / reference.abs().max())


def loaded(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def embeddings(folder: str | Path) -> torch.Tensor:
    """As they lie in the file, whatever transformers would make of them."""
    tensors = load_file(Path(folder) / "model.safetensors")
    endings = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
    (name,) = (name for name in tensors if name.endswith(endings))
    return tensors[name]


# --- merged ----------------------------------------------------------------------------------

PATTERNS = ["lora.rank_pattern={q_proj:2}", "lora.alpha_pattern={v_proj:3}"]
RUNS = [  # base, overrides; gemma, gpt2 and bert are tied
    ("gemma", "head=lora"),
    ("gemma", "lora.use_dora=true"),
    ("gemma", "head=lora", "lora.use_rslora=true", *PATTERNS),
    ("gemma", "head=full"),
    ("gemma", "target_modules=custom", "target_modules.names=[embed_tokens,q_proj]"),
    ("gpt2", "head=lora", "lora.bias=all"),
    ("gpt2", "lora.init=pissa"),
    ("bert", "head=lora"),
    ("bert", "head=full"),
    ("llama", "head=lora", "lora.use_dora=true", *PATTERNS),
    ("llama", "head=full", "lora.use_rslora=true"),
    ("llama", "lora.init=olora", "lora.use_rslora=true"),
    ("qwen2", "head=lora", "lora.bias=lora_only"),
]


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
    stays = settings in (RUNS[1], RUNS[6])  # tied, and neither head nor embeddings are trained
    untied = settings[0] in ("gemma", "gpt2", "bert") and not stays
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


def test_a_fresh_process_reads_the_same_from_disk(trained, tmp_path):
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
    subprocess.run([sys.executable, "-c", script, str(place), str(saved)], check=True, timeout=120)
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


@pytest.mark.parametrize("settings", [RUNS[0], RUNS[5], RUNS[7]], ids=" ".join)
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


# --- refusals --------------------------------------------------------------------------------


def refused(*arguments: Any) -> str:
    said = say("export", *arguments)
    assert said.code == 2 and said.out == "" and len(said.lines) == 1, said
    return said.lines[0]


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A run that a test may damage."""
    run = tmp_path / "sweep" / "0123456789ab"
    shutil.copytree(trained("llama", "head=lora"), run)
    return run


def change(run: Path, **changes: Any) -> None:
    path = run / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "megred"], "--to: must be one of adapter, merged, gguf; got 'megred' (did you"),
        (["--to", "merged", "--dtype", "bf16"], "--dtype: must be one of float32, bfloat16, flo"),
        (["--to", "adapter", "--dtype", "float16"], "--dtype: must go with --to merged"),
    ],
)
def test_words_that_are_none(options, message, copied, tmp_path):
    assert refused(copied, *options, tmp_path / "x").startswith(message)


def test_a_run_that_is_not_there_names_the_nearest(copied, tmp_path):
    line = refused(copied.with_name("0123456789ac"), "--to", "merged", tmp_path / "x")
    assert line.startswith("RUN: must be the folder of a run (with record.json); ")
    assert "0123456789ac' does not exist" in line and "finished in" in line
    assert line.endswith(": 0123456789ab")
    line = refused(copied.parent, "--to", "merged", tmp_path / "x")
    assert "has none; finished in" in line and line.endswith(": 0123456789ab")


def test_a_run_that_has_not_finished(copied, tmp_path):
    change(copied, status="failed", error="RuntimeError: boom")
    line = refused(copied, "--to", "merged", tmp_path / "x")
    assert line.startswith("RUN: must have finished; ") and "is failed (RuntimeError: boom)" in line


def test_nothing_is_overwritten(copied, tmp_path):
    place = tmp_path / "there"
    place.mkdir()
    (place / "mine").write_text("precious")
    assert refused(copied, "--to", "merged", place).startswith(
        "PATH: must not exist or be an empty"
    )
    assert refused(copied, "--to", "adapter", place / "mine").endswith("is a file; give another")
    assert [path.name for path in place.iterdir()] == ["mine"]
    assert (place / "mine").read_text() == "precious"


def test_another_base_is_refused_with_both_hashes(copied, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(base_of(copied), base)
    config = json.loads((copied / "record.json").read_text())["config"]
    config["model"]["path"] = str(base)
    change(copied, config=config)
    then = json.loads((copied / "record.json").read_text())["provenance"]["weights"]
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    line = refused(copied, "--to", "merged", tmp_path / "x")
    assert line.startswith("model.path: must be the base run ") and then in line
    assert len(set(re.findall("[0-9a-f]{64}", line))) == 2
    shutil.rmtree(base)
    assert refused(copied, "--to", "adapter", tmp_path / "x").startswith("model.path: ")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_another_adapter_is_refused(kind, copied, tmp_path):
    file = copied / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    line = refused(copied, "--to", kind, tmp_path / "x")
    assert line.startswith("RUN: its adapter must be the one it trained, hash ")
    file.unlink()
    assert "has none" in refused(copied, "--to", kind, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_adapter_config_that_leaves_modules_out_is_refused(copied, tmp_path):
    """PEFT loads what it finds a module for, and says nothing of the rest."""
    file = copied / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    settings["target_modules"] = ["q_proj"]
    file.write_text(json.dumps(settings))
    line = refused(copied, "--to", "adapter", tmp_path / "x")
    assert line.startswith("export: PEFT must load the adapter's ")
    assert not (tmp_path / "x").exists()


# --- gguf: a prediction ----------------------------------------------------------------------

Q, HEAD = "model.layers.0.self_attn.q_proj", "lm_head"
TIED = "becomes output.weight.lora_a"
NO_OUTPUT = "has no output tensor"


def base_config(kind: str, **more: Any) -> Any:
    config = transformers.AutoConfig.for_model(kind, **more)
    config.architectures = ["SomethingForCausalLM"]
    return config


def predicted(kind: str, modules=(Q,), saved=(), tied=False, base=None, **lora: Any) -> str:
    config = base or base_config(kind)
    return formats.gguf(config, modules, saved, LoraSettings(**lora), HEAD, tied)


@pytest.mark.parametrize(
    ("kind", "arguments", "answer"),
    [
        ("llama", {}, formats.YES),
        ("mistral", {}, formats.YES),
        ("gemma", {"tied": True}, formats.YES),
        ("gemma3_text", {"tied": True}, formats.YES),
        ("qwen3", {"modules": [Q, HEAD]}, formats.YES),
        ("phi3", {"modules": ["model.layers.0.self_attn.qkv_proj"]}, formats.YES),
        ("gpt_neox", {"modules": ["gpt_neox.layers.1.attention.query_key_value"]}, formats.YES),
        # a head of its own, in an architecture whose GGUF has none
        ("gemma", {"modules": [Q, HEAD], "tied": True}, NO_OUTPUT),
        ("gemma", {"saved": [HEAD], "tied": True}, NO_OUTPUT),
        ("gemma", {"modules": ["model.embed_tokens"], "tied": True}, NO_OUTPUT),
        ("gemma2", {"modules": [HEAD], "tied": True}, NO_OUTPUT),
        ("cohere", {"modules": [HEAD], "tied": True}, NO_OUTPUT),
        ("cohere2", {"modules": [HEAD], "tied": True}, NO_OUTPUT),
        ("lfm2_moe", {"modules": [HEAD], "tied": True}, NO_OUTPUT),
        # a tied head where the GGUF could have one
        ("gemma3_text", {"modules": [HEAD], "tied": True}, TIED),
        ("llama", {"modules": [HEAD], "tied": True}, TIED),
        ("qwen2", {"modules": [HEAD], "tied": True}, TIED),
        ("gpt2", {"modules": [HEAD], "tied": True}, TIED),
        ("llama", {"modules": ["model.embed_tokens"], "tied": True}, "on the tied head as well"),
        ("llama", {"modules": ["model.embed_tokens"]}, formats.YES),
        # keys the converter does not take
        ("llama", {"use_dora": True}, "refuses DoRA's magnitudes"),
        ("qwen2", {"bias": "lora_only"}, "refuses trained biases"),
        ("gpt2", {"modules": ["lm_head"], "bias": "all"}, "refuses trained biases"),
        ("llama", {"saved": [HEAD]}, "refuses modules trained in full (lm_head)"),
        ("gemma", {"saved": ["score"], "tied": True}, "refuses modules trained in full (score)"),
        ("llama", {"modules": ["model.layers.0.zzz", Q]}, "has no tensor for model.layers.0.zzz"),
        ("gpt2", {"modules": ["transformer.h.0.attn.c_attn"]}, "transposes GPT-2's"),
        # scales: one alpha, over each module's rank
        ("llama", {"r": 4, "rank_pattern": {"q_proj": 2}}, formats.YES),
        ("llama", {"r": 4, "alpha_pattern": {"q_proj": 8}}, formats.YES),  # 8 is 2 r
        ("llama", {"r": 4, "alpha_pattern": {"q_proj": 3}}, "holds one alpha"),
        ("llama", {"use_rslora": True}, "an alpha of alpha * sqrt(r) would be right"),
        ("llama", {"use_rslora": True, "rank_pattern": {"q": 2}}, "rsLoRA by alpha / sqrt(r)"),
        # architectures
        ("opt", {}, "knows no causal model of the type 'opt'"),
        ("bert", {}, "knows no causal model of the type 'bert'"),
    ],
)  # fmt: skip
def test_gguf_predictions(kind, arguments, answer):
    found = predicted(kind, **arguments)
    if answer == formats.YES:
        assert found == formats.YES
    else:
        assert answer in found and "\n" not in found


def test_every_name_given_to_an_architecture_is_ggufs():
    assert set(formats.RENAMED.values()) <= set(gguf.MODEL_ARCH_NAMES.values())
    assert set(formats.RENAMED) <= set(transformers.CONFIG_MAPPING.keys())


def test_gguf_tells_every_reason_and_needs_an_architecture():
    found = predicted("gemma", modules=[HEAD], tied=True, use_dora=True, bias="all")
    assert [NO_OUTPUT in found, "DoRA" in found, "biases" in found] == [True] * 3
    config = base_config("llama")
    config.architectures = None
    assert "config.json names no architectures" in predicted("llama", base=config)


def test_scale_with_two_ranks_has_no_single_alpha():
    assert "sqrt(r) would" not in predicted("llama", use_rslora=True, rank_pattern={"q": 2})


CONVERTED = [settings for settings in RUNS if settings[0] != "bert"]


@pytest.mark.parametrize("settings", CONVERTED, ids=" ".join)
def test_what_the_converter_refuses_is_what_peft_saved(settings, trained):
    """It takes pairs of A and B, and nothing else."""
    run = trained(*settings)
    taken = re.compile(r"\.lora_[AB]\.weight$|\.lora_embedding_[AB]$")
    keys = load_file(run / "adapter" / "adapter_model.safetensors")
    others = any(not taken.search(key) for key in keys)
    reason = record.read(run).exports.gguf
    # Gemma's full head is one of them too, but nothing could be done with it anyway.
    assert others == ("refuses" in reason or settings == ("gemma", "head=full"))


@pytest.mark.parametrize("settings", CONVERTED, ids=" ".join)
def test_scales_that_come_out_wrong_are_those_that_are_not_alpha_over_r(settings, trained):
    run = trained(*settings)
    alpha = json.loads((run / "adapter" / "adapter_config.json").read_text())["lora_alpha"]
    layers = [layer for layer in stock(run).modules() if isinstance(layer, LoraLayer)]
    right = [
        layer.scaling["default"] == pytest.approx(alpha / layer.r["default"]) for layer in layers
    ]
    reason = record.read(run).exports.gguf
    assert len(right) > 2 and all(right) == ("scales" not in reason and "alpha" not in reason)


def test_gguf_is_answered_with_the_reason_and_the_way_out(trained, tmp_path):
    run, place = trained("gemma", "head=lora"), tmp_path / "x"
    line = refused(run, "--to", "gguf", place)
    assert line.startswith("--to gguf: a GGUF of gemma has no output tensor")
    assert "the way out: train with head=exclude" in line
    run = trained("llama", "head=lora", "lora.use_dora=true", *PATTERNS)
    line = refused(run, "--to", "gguf", place)
    assert "refuses DoRA" in line and "holds one alpha" in line
    assert f"lorabench export {run} --to merged PATH, then llama.cpp's convert_hf_to_gguf" in line
    line = refused(trained("llama", "head=lora"), "--to", "gguf", place)
    assert line.startswith("--to gguf: not written yet; ")
    assert not place.exists()


# --- plan and record -------------------------------------------------------------------------


def test_plan_says_what_a_run_cannot_be_exported_to(trained, tmp_path):
    said = say("plan", "-m", *TINY, f"output_dir={tmp_path}", "head=exclude,lora,full", "seed=0,1")
    assert said.code == 0, said.err
    lines = [line for line in said.out.splitlines() if line.startswith("export ")]
    reason = formats.HEADLESS
    assert len(lines) == 1 and reason in lines[0]
    assert lines[0].startswith("export    4 runs, no gguf: a GGUF of gemma has no output tensor")
    said = say("plan", *TINY, f"output_dir={tmp_path}", "head=exclude")
    assert "\nexport " not in said.out


def test_a_record_carries_its_exports(trained):
    run = trained("gemma", "head=lora")
    found = json.loads((run / "record.json").read_text())
    assert found["exports"] == {"adapter": "yes", "merged": "yes"} | {
        "gguf": found["plan"]["exports"]["gguf"]
    }
    assert formats.HEADLESS in found["exports"]["gguf"]


def test_a_run_that_stopped_has_nothing_to_export(tiny_folder, tmp_path):
    base = ["model=local", f"model.path={tiny_folder('llama')}", f"output_dir={tmp_path}"]
    say("train", *TINY, *base, "trainer.lr=1e30")
    (path,) = tmp_path.glob("*/*")
    found = json.loads((path / "record.json").read_text())
    assert found["status"] == "stopped"
    assert set(found["exports"].values()) == {"the run has not finished"}


def test_a_record_of_before_reads_without_exports(copied):
    path = copied / "record.json"
    old = json.loads(path.read_text())
    del old["exports"]
    path.write_text(json.dumps(old))
    assert record.read(copied).exports is None
    assert refused(copied, "--to", "gguf", "x").startswith("--to gguf: not written yet")


def test_hub_data_are_left_alone(trained, tmp_path):
    """No network for a check: random tokens are enough."""
    run = source.open_run(trained("llama", "head=lora"))
    run.config.data.source, run.config.data.train.path = "hub", "org/name"
    model = loaded(Path(run.model.path))
    batches, said = write._batches(run, model, None)
    assert len(batches) == 1 and said.endswith("no test example (org/name lies on the hub)")
