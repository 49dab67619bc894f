"""start_from: against stock PEFT's PeftModel.from_pretrained(..., is_trainable=True)."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed, recorded_runs, say
from equality import relative
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from stock import Stock, copy_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lorabench import adapters, data, plan, smoke, start
from lorabench import model as base_model
from lorabench.config import Config, ConfigErrors
from lorabench.pack import Batch
from lorabench.sweep import Job
from lorabench.train import learning_rate
from lorabench.worker import Shared, begin_from, make_pack

SHORT = [
    "trainer=smoke", "trainer.num_threads=1", "tracker=none", "lora.r=4", "trainer.steps=5",
    "target_modules=attention", "data.num_train=16", "data.num_validation=4", "data.num_test=4",
    "trainer.lr=0.003", "trainer.batch_size=2", "trainer.eval_base=false", "model.dtype=float64",
]  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def stock_base(config: Config) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        base_model.location(config.model), dtype=getattr(torch, config.model.dtype)
    )


def saved_by_peft(
    folder: Path, seed: int = 0, words: Sequence[str] = SHORT, **settings: Any
) -> Path:
    """An adapter that stock PEFT made: every tensor random, B too."""
    asked = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied layers
        wrapped = get_peft_model(stock_base(composed(*words)), LoraConfig(**(asked | settings)))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    size = 0.1 * parameter.abs().mean() if "magnitude" in name else 0.05
                    parameter.add_(size * noise)
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an adapter on the head."""
    out = tmp_path_factory.mktemp("first")
    assert say("train", *SHORT, "head=lora", f"output_dir={out}").code == 0
    ((folder, _),) = recorded_runs(out)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_by_peft(tmp_path_factory.mktemp("plain") / "adapter")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


class Continued(Stock):
    """Stock PEFT's own continuation of a saved adapter."""

    def __init__(self, config: Config, folder: Path):
        super().__init__(config, weights(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tied layers
            self.wrapped: Any = PeftModel.from_pretrained(
                stock_base(config), str(folder), is_trainable=True
            ).eval()
        self.parameters = {
            name.replace(".default", ""): p
            for name, p in self.wrapped.named_parameters()
            if p.requires_grad
        }

    def losses(self) -> list[float]:
        optimizer, found = self.optimizer(), []
        for step in range(self.config.trainer.num_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.config.trainer, step)
            found.append(self.loss(step))
            limit = self.config.trainer.max_grad_norm
            assert limit is not None
            nn.utils.clip_grad_norm_(list(self.parameters.values()), limit)
            optimizer.step()
        return found


def begun(planner: plan.Planner, *configs: Config) -> tuple[Any, list[Job]]:
    """The pack of these runs before its first step."""
    jobs = [Job(planner.resolved(one), "run", planner.make(one)) for one in configs]
    pack, *_ = make_pack(Shared(planner), jobs, "cpu")
    begin_from(pack, jobs)
    return pack, jobs


# --- against stock PEFT ----------------------------------------------------------------------


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize("kind", ["packed", "alone"])
def test_training_goes_on_as_stock_pefts(kind: str, run: Path, plain: Path, tmp_path: Path) -> None:
    """A pack of two runs with different starts, one of them a run; DoRA trains alone."""
    if kind == "packed":
        own = {str(plain): plain, str(run): run / "adapter"}
        words = [[*SHORT, "head=exclude", f"start_from={plain}"],
                 [*SHORT, "head=lora", f"start_from={run}"]]  # fmt: skip
    else:
        dora = saved_by_peft(tmp_path / "dora", use_dora=True)
        own, words = {str(dora): dora}, [[*SHORT, "lora.use_dora=true", f"start_from={dora}"]]
    out, planner = tmp_path / "out", plan.Planner()
    configs = [composed(*one, f"output_dir={out}") for one in words]
    pack, jobs = begun(planner, *configs)
    assert pack.size == len(configs)
    for slot, (config, folder) in enumerate(zip(configs, own.values(), strict=True)):
        stock = Continued(config, folder)
        tokens = stock.tokens.first(3)
        padded = data.batch(tokens, range(3), None, stock.pad_id)
        batch = Batch.make([padded[0]], [padded[1]], [pack.size])
        gap = smoke._difference(
            stock.wrapped, padded, pack.logits(batch)[slot], jobs[slot], stock.pad_id
        )
        assert gap < 1e-12, "float64 rounding of one forward"
        assert set(pack.adapter_state(slot)) == set(weights(folder))
        for name, tensor in pack.adapter_state(slot).items():
            assert torch.equal(tensor, weights(folder)[name])


@pytest.mark.usefixtures("float64_inside")
def test_a_sweep_over_starts_trains_as_stock_peft_does(plain: Path, tmp_path: Path) -> None:
    """Two runs of one pack that differ in their start alone."""
    other = saved_by_peft(tmp_path / "other", seed=1)
    out = tmp_path / "out"
    said = say("train", "-m", *SHORT, f"start_from={plain},{other}", f"output_dir={out}")
    assert said.code == 0, said.err
    found = recorded_runs(out)
    assert len(found) == 2
    for folder, one in found:
        assert one["plan"]["pack"]["size"] == 2
        began = Path(one["config"]["start_from"])
        assert one["hashes"]["initial_adapter"] == adapters.state_hash(weights(began))
        assert any("16 of 16 modules begin with" in note for note in one["notes"])
        stock = Continued(composed(*SHORT), began)
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        # Float64 rounding (1e-16) of sums in another order, grown by five AdamW steps.
        assert [r["train/loss"] for r in rows] == pytest.approx(stock.losses(), rel=1e-10)
        theirs = stock.state()
        for name, tensor in weights(folder / "adapter").items():
            assert relative(tensor, theirs[name]) < 1e-9, name


@pytest.mark.slow
def test_a_record_is_trained_again_while_its_start_is_what_it_was(tmp_path: Path) -> None:
    began = saved_by_peft(tmp_path / "it")
    out = tmp_path / "out"
    assert say("train", *SHORT, f"start_from={began}", f"output_dir={out}").code == 0
    ((folder, _),) = recorded_runs(out)
    said = say("replay", folder, "--verify", "--out", tmp_path / "again")
    assert said.code == 0, said.out + said.err
    saved_by_peft(began, seed=2)
    said = say("replay", folder, "--out", tmp_path / "third")
    assert said.code == 1 and "the adapter it starts from (start_from)" in said.out


@pytest.mark.parametrize("more", [[], ["lora.use_dora=true"]], ids=["packed", "alone"])
def test_modules_that_it_lacks_get_their_own_draw(more: list[str], tmp_path: Path) -> None:
    began = saved_by_peft(tmp_path / "part", use_dora=bool(more), target_modules=["q_proj"])
    words, planner = [*SHORT, *more], plan.Planner()
    pack, jobs = begun(planner, composed(*words, f"start_from={began}"))
    drawn, _ = begun(planner, composed(*words))
    mine, own, held = pack.adapter_state(0), copy_of(drawn.adapter_state(0)), weights(began)
    assert 0 < len(held) < len(mine)
    for name, tensor in mine.items():
        assert torch.equal(tensor, held[name] if name in held else own[name]), name
    (note,) = [text for text in jobs[0].plan.warnings if text.startswith("start_from")]
    assert "4 of 16 modules" in note and "drawn by seeds.init: " in note


def test_biases_begin_as_the_adapters_or_as_the_bases(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """GPT-2 has some, Gemma none: bias=all, which trains none there, is no difference."""
    words = [*SHORT, "model=local", f"model.path={tiny_folder('gpt2')}"]
    targets = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    without = saved_by_peft(tmp_path / "without", words=words, **targets)
    biased = saved_by_peft(tmp_path / "all", words=words, bias="all", **targets)
    planner = plan.Planner()
    for began in (without, biased):
        pack, _ = begun(planner, composed(*words, "lora.bias=all", f"start_from={began}"))
        drawn, _ = begun(planner, composed(*words, "lora.bias=all"))
        mine, own = pack.adapter_state(0), drawn.adapter_state(0)
        # A bias has another name where its module is adapted: c_proj's, by the run alone.
        held = {name.replace(".base_layer", ""): one for name, one in weights(began).items()}
        names = {name: name.replace(".base_layer", "") for name in mine}
        assert set(held) < set(names.values())
        assert ("base_model.model.transformer.h.0.attn.c_proj.bias" in held) == (began == biased)
        for name, tensor in mine.items():
            assert torch.equal(tensor, held.get(names[name], own[name])), name
    with pytest.raises(ConfigErrors, match=r"all; got none; set lora\.bias=all"):
        planner.make(composed(*words, f"start_from={biased}"))
    nothing = saved_by_peft(tmp_path / "nothing", bias="all")
    assert planner.make(composed(*SHORT, f"start_from={nothing}")).run_id


def test_a_classifier_begins_with_its_head(tmp_path: Path) -> None:
    words = [
        "experiment=classify", *[word for word in SHORT if "target_modules" not in word],
        f"output_dir={tmp_path}",
    ]  # fmt: skip
    assert say("train", *words).code == 0
    ((folder, _),) = recorded_runs(tmp_path)
    pack, _ = begun(plan.Planner(), composed(*words, f"start_from={folder}", "seed=5"))
    mine, held = pack.adapter_state(0), weights(folder / "adapter")
    assert set(mine) == set(held) and any("score" in name for name in held)
    assert all(torch.equal(tensor, held[name]) for name, tensor in mine.items())


# --- ids -------------------------------------------------------------------------------------


def test_an_id_has_the_adapter_not_its_place(
    run: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = plan.Planner()

    def run_id(*words: str) -> str:
        return planner.make(composed(*SHORT, *words)).run_id

    copied = shutil.copytree(plain, tmp_path / "copy")
    other = saved_by_peft(tmp_path / "other", seed=1)
    mine = run_id(f"start_from={plain}")
    assert mine == run_id(f"start_from={copied}")
    assert len({mine, run_id(), run_id(f"start_from={other}")}) == 3
    shutil.copytree(run, tmp_path / "outputs" / "sweep" / run.name)
    monkeypatch.chdir(tmp_path)
    spelled = {
        run_id("head=lora", f"start_from={word}") for word in (run, run / "adapter", run.name[:6])
    }
    assert len(spelled) == 1


def test_weights_written_after_the_plan_are_refused(plain: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(plain, tmp_path / "copy")
    found = start.find(str(copied))
    saved_by_peft(copied, seed=3)
    with pytest.raises(ConfigErrors, match="must still be the adapter that was planned"):
        start.weights(found)


# --- what cannot begin so --------------------------------------------------------------------


def refused(*words: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        plan.make(composed(*SHORT, *words))
    return caught.value.errors


def test_every_difference_is_told_at_once(tmp_path: Path) -> None:
    """By a command that leaves nothing behind."""
    began = saved_by_peft(
        tmp_path / "it", r=6, lora_alpha=6, bias="none", target_modules=[*ATTENTION, "up_proj"]
    )
    said = say("train", *SHORT, f"start_from={began}", f"output_dir={tmp_path / 'out'}")
    assert said.code == 2 and not (tmp_path / "out").exists()
    errors = [line.removeprefix("error: ") for line in said.lines if "start_from" in line]
    assert [error.split("must")[0].strip() for error in errors] == [
        "start_from: lora.r",
        "start_from: the scale of an update",
        "start_from: this run",
    ]
    assert "6 on " in errors[0] and "got 4; set lora.r=6" in errors[0]
    assert "1 on " in errors[1] and "got 2; set lora.lora_alpha=6" in errors[1]
    assert "up_proj" in errors[2] and "target_modules" in errors[2]


@pytest.mark.parametrize(
    ("settings", "words", "told"),
    [
        ({"use_dora": True}, [], "lora.use_dora must be that of"),
        ({}, ["lora.use_dora=true"], "got true; set lora.use_dora=false"),
        ({"modules_to_save": ["lm_head"]}, [], "start_from: head must be that of"),
        ({"modules_to_save": ["lm_head"]}, ["head=lora"], "full; got lora; set head=full"),
        ({"target_modules": [*ATTENTION, "lm_head"]}, ["head=full"], "lora; got full"),
        ({"use_rslora": True}, [], "got false; set lora.use_rslora=true"),
        ({"rank_pattern": {"q_proj": 2}}, [], "got 4; set lora.rank_pattern for them"),
        ({"alpha_pattern": {"q_proj": 2}}, [], "got 2; set lora.alpha_pattern for them"),
        ({"lora_bias": True}, [], "every tensor of"),
        ({}, ["model.dtype=float32"], "must not be rounded on loading"),
        ({}, ["lora.init=pissa"], "lora.init: must be one that leaves the base as it is"),
    ],
)
def test_a_difference_is_refused(
    settings: dict[str, Any], words: list[str], told: str, tmp_path: Path
) -> None:
    began = saved_by_peft(tmp_path / "it", **settings)
    assert any(told in error for error in refused(f"start_from={began}", *words))


def test_another_base_is_refused(
    run: Path, plain: Path, tiny_folder: Callable[[str], Path]
) -> None:
    """Of a run its files are known, of a plain adapter the shapes."""
    words = ["model=local", f"model.path={tiny_folder('gemma')}"]
    assert any(
        "the base must be the one that" in error
        for error in refused(*words, "head=lora", f"start_from={run}")
    )
    assert any(
        "it was trained on another base" in error
        for error in refused(*words, f"start_from={plain}")
    )


def test_what_is_no_adapter_is_refused(run: Path, plain: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(plain, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ia3 = get_peft_model(stock_base(composed(*SHORT)), IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]
        ))  # fmt: skip
        ia3.save_pretrained(str(tmp_path / "ia3"))
    half = shutil.copytree(plain, tmp_path / "half")
    left = {
        name: tensor
        for name, tensor in weights(plain).items()
        if "0.self_attn.q_proj.lora_B" not in name
    }
    save_file(left, half / "adapter_model.safetensors", metadata={"format": "pt"})
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / "adapter" / "adapter_config.json").write_text("{}")
    for folder, told in {
        tmp_path / "nowhere": "must be the folder of a run or the beginning of its id",
        pickled: "has no adapter_model.safetensors",
        tmp_path / "ia3": "it is an adapter of",
        half: "whole or not at all; it lacks",
        damaged: "must hold the adapter that was trained",
    }.items():
        (error,) = refused(
            "head=lora" if folder == damaged else "head=exclude", f"start_from={folder}"
        )
        assert error.startswith("start_from: ") and told in error, folder
