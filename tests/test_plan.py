"""What a plan says, against PEFT's own wrapping and counting."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import composed
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from lorabench import adapters, cli, plan, sweep
from lorabench import model as base_model
from lorabench.config import ConfigErrors
from lorabench.pack.trace import trace
from lorabench.sweep.needs import Needs


def wrapped_by_peft(folder: Path, **settings: object) -> tuple[set[str], int]:
    """Modules and trainable parameters of stock PEFT on the loaded model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, **settings))
    return set(wrapped.targeted_module_names), wrapped.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("kind", ["gemma", "llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("select", ["auto", "all-linear"])
def test_modules_and_counts_are_pefts(
    kind: str, select: str, tiny_folder: Callable[[str], Path]
) -> None:
    folder = tiny_folder(kind)
    made = plan.make(composed("model=local", f"model.path={folder}", f"target_modules={select}"))
    targets = None if select == "auto" else "all-linear"
    modules, count = wrapped_by_peft(folder, target_modules=targets)
    assert set(made.lora_modules) == modules
    assert made.trainable_parameters == count


@pytest.mark.parametrize(
    ("kind", "select", "leaves"),
    [
        ("llama", "attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("llama", "mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("gpt2", "attention", {"c_attn", "c_proj"}),
        ("gpt2", "mlp", {"c_fc", "c_proj"}),
    ],
)
def test_attention_and_mlp_by_architecture(
    kind: str, select: str, leaves: set[str], tiny_folder: Callable[[str], Path]
) -> None:
    config = composed("model=local", f"model.path={tiny_folder(kind)}", f"target_modules={select}")
    modules = plan.make(config).lora_modules
    assert {name.rpartition(".")[2] for name in modules} == leaves
    assert len(modules) == 2 * len(leaves)  # two layers
    inside = {"attention": ("attn", "self_attn"), "mlp": ("mlp",)}[select]
    assert all(any(part in name.split(".") for part in inside) for name in modules)


def test_scales_are_pefts_where_patterns_give_modules_their_own(
    tiny_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_folder("llama")
    words = ["model=local", f"model.path={folder}", "lora.use_rslora=true", "tracker=none"]
    words += ["lora.alpha_pattern={q_proj:4}", "lora.rank_pattern={v_proj:9}"]
    made = plan.make(composed(*words))
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, use_rslora=True,
        alpha_pattern={"q_proj": 4}, rank_pattern={"v_proj": 9}, target_modules=made.lora_modules,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings)
    theirs = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in wrapped.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert {name: made.scales.get(name, made.scale) for name in made.lora_modules} == theirs
    assert len({*theirs.values()}) == 3
    assert cli.main(["plan", *words]) == 0
    assert "1 to 10.6667" in capsys.readouterr().out


def test_head_full_counts_a_copy_of_the_head(tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder("gemma")
    made = plan.make(composed("model=local", f"model.path={folder}", "head=full"))
    _, count = wrapped_by_peft(folder, target_modules="all-linear", modules_to_save=["lm_head"])
    assert made.trainable_parameters == count
    assert made.saved_modules == ["lm_head"]
    assert made.head.tied


def test_regex_list_and_exclude(tiny_folder: Callable[[str], Path]) -> None:
    model = ["model=local", f"model.path={tiny_folder('llama')}", "target_modules=custom"]
    regex = composed(*model, r"target_modules.names='.*layers\.1\..*(q|v)_proj'")
    assert plan.make(regex).lora_modules == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    listed = composed(
        *model,
        "target_modules.names=[q_proj,v_proj]",
        "target_modules.exclude=[layers.0.self_attn.q_proj]",
    )
    assert plan.make(listed).lora_modules == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["target_modules.names=[q_porj,v_proj]"], "unmatched: 'q_porj' (did you mean 'q_proj'?)"),
        (["target_modules.names=q_proj"], "matches none (did you mean '.*\\.q_proj', or a list"),
        (
            ["target_modules.names=[q_proj]", "target_modules.exclude=[v_proj]"],
            "unmatched: 'v_proj'",
        ),
        (
            ["target_modules.names=[q_proj]", "target_modules.exclude=[q_proj]"],
            "leave at least one",
        ),
        (["target_modules.names=[q_proj,lm_head]"], "use head=lora"),
        (["target_modules.names=[q_proj]", "lora.rank_pattern={v_proj:4}"], "lora.rank_pattern"),
        (["target_modules.names=[q_proj]", "lora.bias=all"], "lora.bias"),
    ],
)
def test_names_that_match_nothing_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigErrors) as refused:
        plan.make(composed("target_modules=custom", *overrides))
    assert message in str(refused.value)


def test_auto_without_a_default_names_what_is_worth_naming(
    tiny_folder: Callable[[str], Path],
) -> None:
    words = ["model=local", f"model.path={tiny_folder('phi3')}", "target_modules=auto"]
    with pytest.raises(ConfigErrors) as refused:
        plan.make(composed(*words))
    assert "qkv_proj" in str(refused.value) and "all-linear" in str(refused.value)


def test_run_id_follows_what_decides_the_result_and_nothing_else(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    same = [
        [],
        ["tracker=none"],
        ["output_dir=elsewhere"],
        ["sweep=other"],
        ["trainer.device=cpu"],
        ["trainer.checkpoint_every=7"],
        ["trainer.checkpoint_minutes=7"],
        ["trainer.num_threads=1"],
        ["lora.lora_alpha=32"],
        ["lora.alpha_ratio=2"],
        ["trainer.log_every=9"],
        ["model.name=nickname"],
        ["worker.stale_seconds=9"],
        # Spellings of the same training:
        ["trainer.micro_batch_size=8"],
        ["lora.use_rslora=true", "lora.lora_alpha=8"],
        [
            "target_modules=custom",
            "target_modules.names=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
        ],
        ["stages=none"],
        # Settings of the evaluation:
        ["data.metric=[nll,nll_per_token]"],
        ["data.num_test=17", "data.num_validation=5"],
        ["data.answer_pattern=x", "data.answer_stop=[y]", "data.answer_examples=3"],
        ["trainer.eval_batch_size=7", "trainer.eval_every=2", "trainer.eval_examples=3"],
        ["trainer.eval_base=false"],
        ["objective=test/nll"],
    ]  # fmt: skip
    other = [
        ["lora.r=17"],
        ["lora.lora_alpha=31"],
        ["head=lora"],
        ["seed=1"],
        ["seeds.dropout=1"],
        ["trainer.lr=2e-3"],
        ["trainer.micro_batch_size=4"],
        ["data.num_train=4095"],
        ["data.skills=[rot13]"],
        ["target_modules=mlp"],
        ["data.max_length=23"],
        ["model=local", f"model.path={tiny_folder('gemma')}"],
    ]
    ids = [plan.run_id(composed(*overrides)) for overrides in same]
    assert len(set(ids)) == 1
    different = [plan.run_id(composed(*overrides)) for overrides in other]
    assert len({ids[0], *different}) == 1 + len(other)


def test_run_id_of_a_folder_is_its_content_not_its_place(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(tiny_folder("llama"), moved)
    here, there = (
        plan.run_id(composed("model=local", f"model.path={p}"))
        for p in (tiny_folder("llama"), moved)
    )
    assert here == there
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert plan.run_id(composed("model=local", f"model.path={moved}")) != here


def test_the_evaluation_id_follows_what_decides_the_scores_and_nothing_else() -> None:
    def id_of(*overrides: str) -> str:
        return plan.make(composed(*overrides)).evaluation_id

    assert id_of() == id_of("lora.r=4", "seed=3", "trainer.steps=7", "sweep=other")
    assert id_of() == id_of("trainer.eval_base=false")
    different = [
        ["data.metric=[nll,nll_per_token]"],
        ["data.num_test=17"],
        ["data.num_validation=17"],
        ["trainer.eval_examples=3"],
        ["trainer.eval_batch_size=3"],
    ]
    assert len({id_of(), *(id_of(*words) for words in different)}) == 1 + len(different)


def test_another_test_file_is_another_evaluation_of_the_same_run(
    jsonl: Path, tmp_path: Path
) -> None:
    rows = jsonl.read_text().splitlines()
    words = ["data=jsonl", f"data.train.path={jsonl}", "data.max_length=64"]
    made = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(rows[:5] if name == "one" else rows[5:9]) + "\n")
        made.append(plan.make(composed(*words, f"data.test.path={path}")))
    assert made[0].run_id == made[1].run_id
    assert made[0].evaluation_id != made[1].evaluation_id
    # A test set that is taken out of the training file leaves another training set behind.
    assert plan.make(composed(*words)).run_id != made[0].run_id


def test_a_pinned_hub_model_is_known_without_network() -> None:
    found = base_model.identity(composed("model=gemma-2b").model)
    assert found["hub"] == "google/gemma-2b" and len(found["revision"]) == 40


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_memory_estimate_counts_what_torchs_optimizer_holds(dtype: str) -> None:
    """Weights, gradients and moments of a run, as torch.optim.AdamW allocates them."""
    words = ["head=full", "model.dtype=" + dtype]
    small, large = (composed(*words, f"lora.r={r}") for r in (4, 32))
    held = []
    for config in (small, large):
        base = base_model.load(config.model, "cpu")
        wrapped = adapters.attach(base, config, plan.make(config).lora_modules)
        parameters = list(adapters.trainable(wrapped).values())
        optimizer = torch.optim.AdamW(parameters, fused=True)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        held.append(
            sum(p.nbytes + p.grad.nbytes for p in parameters)  # type: ignore[union-attr]
            + sum(m.nbytes for state in optimizer.state.values() for m in state.values())
        )
    planner = plan.Planner()
    skeleton, peaks = planner.skeleton(small.model), []
    for config in (small, large):
        ranks = [planner.ranks(config)]
        found = trace(skeleton, [config], ranks, [(1, [(4, 2)])], "cpu", alone=True)
        peaks.append(found.peaks["update"])
    # What clipping and the kernel take beside them does not depend on r; their step counts neither.
    assert peaks[1] - peaks[0] == pytest.approx(held[1] - held[0], rel=0.01)


def test_a_large_vocabulary_does_not_keep_runs_apart(tmp_path: Path) -> None:
    """Of 16 x 512 tokens x 256,000 logits (8 GB in float32) a chunk exists at a time."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=256_000, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base_model.ZOO / "tiny-gemma").save_pretrained(tmp_path)
    batch = ["data.max_length=512", "trainer.batch_size=16", "seed=0,1,2,3"]
    words = ["model=local", f"model.path={tmp_path}", "lora.r=2"]
    planner = plan.Planner()
    jobs = sweep.plan_jobs(*cli.compose(["-m", *words, *batch])[:2], planner)
    needs = Needs(planner)
    # Two such runs of width 32 held 1.5 GB at their peak, four 1.3 GB.
    assert all(needs.memory([job]) < 2e9 for job in jobs)
    assert sweep.form_packs(jobs, 16, 4_000_000_000, needs) == [[0, 1, 2, 3]]
    # Nor do runs whose own logits are less than a chunk: twelve have 2.4 GB together.
    small = ["data.max_length=192", "trainer.batch_size=1", f"seed={','.join(map(str, range(12)))}"]
    jobs = sweep.plan_jobs(*cli.compose(["-m", *words, *small])[:2], planner)
    assert sweep.form_packs(jobs, 16, 4_000_000_000, needs) == [list(range(12))]
