"""task=seq_cls: packed, alone and its head, against stock PEFT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from conftest import composed
from peft import LoraConfig, get_peft_model
from stock_classifier import LABELS, compare_training, make_pack, stock_model, words_of
from torch import nn

from lorabench import adapters, data, plan
from lorabench import model as base_model
from lorabench.config import Config
from lorabench.pack import Batch, StackedPack

# PEFT asks transformers by a name that 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

MIXED = [
    # Weight decay reaches no bias, the copied head's included.
    ["lora.r=4", "target_modules=all-linear", "trainer.weight_decay=0.3"],
    ["lora.r=16", "target_modules=attention", "lora.use_rslora=true", "trainer.lr=3e-3"],
    ["lora.r=8", "target_modules=mlp", "trainer.weight_decay=0.1", "trainer.max_grad_norm=null"],
]
# Not on attention: a key's bias has no gradient but rounding, which AdamW turns into steps.
BIASES = {"bert": ["none", "none", "lora_only"]}


def mixture(kind: str, classifiers: dict[str, Path], texts: Path, *common: str) -> list[Config]:
    biases = BIASES.get(kind, ["none"] * len(MIXED))
    return [
        composed(
            *words_of(classifiers[kind], texts), "model.dtype=float64", "trainer.steps=12",
            f"seeds.init={i}", f"lora.bias={bias}", *words, *common,
        )
        for i, (words, bias) in enumerate(zip(MIXED, biases, strict=True))
    ]  # fmt: skip


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["bert", "gemma", "llama"])
def test_packed_runs_equal_stock_peft(
    kind: str, shared: bool, classifiers: dict[str, Path], texts: Path
) -> None:
    """Without dropout all runs see the same batch; with it each has its own data."""
    configs = mixture(kind, classifiers, texts)
    if not shared:
        for i, config in enumerate(configs):
            config.seeds.data = config.seeds.dropout = i
            config.lora.lora_dropout = 0.1 * (i > 0)
            config.trainer.micro_batch_size = 4
    compare_training(configs)


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize("kind", ["gemma", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_decoder_may_have_been_padded_on_the_left(
    kind: str, classifiers: dict[str, Path], texts: Path
) -> None:
    """Stock decoders see left-padded texts at later positions: rotary embeddings are relative."""
    configs = mixture(kind, classifiers, texts)[:2]
    for i, config in enumerate(configs):
        config.seeds.data = i
        config.lora.lora_dropout = 0.1
    compare_training(configs, padding_side="left")


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize("kind", ["bert", "gemma"])
def test_a_run_alone_equals_stock_peft(
    kind: str, classifiers: dict[str, Path], texts: Path
) -> None:
    compare_training(mixture(kind, classifiers, texts, "lora.lora_dropout=0.1")[:1], solo=True)


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize(
    ("kind", "names"), [("bert", ".*layer[.]1[.].*dense"), ("llama", ".*[.]1[.].*_proj")]
)
def test_layers_below_the_first_adapted_one_run_once(
    kind: str, names: str, classifiers: dict[str, Path], texts: Path
) -> None:
    own = ["target_modules=custom", f"target_modules.names='{names}'"]
    words = [*words_of(classifiers[kind], texts), "model.dtype=float64", "trainer.steps=4", *own]
    configs = [composed(*words, f"lora.r={r}", f"seeds.init={r}") for r in (2, 5)]
    pack = make_pack(configs)
    assert isinstance(pack, StackedPack)
    rows = []
    for layer in (m for m in pack.tree.modules() if type(m).__name__.endswith("Layer")):
        layer.register_forward_hook(lambda _, args, out: rows.append(args[0][..., 0].numel()))
    tokens = base_model.tokenizer(configs[0].model)(["ab", "ba", "abc"], padding=True)["input_ids"]
    labels = np.full((3, len(tokens[0])), data.IGNORED)
    labels[:, 2] = 0
    pack.score(Batch.make([np.array(tokens)], [labels], [2], classes=True))
    assert rows == [3 * 3, 2 * 3 * 3]  # the layer below the first adapted one, once for both runs
    compare_training(configs)


def test_texts_that_are_too_long_are_left_out_and_counted(
    classifiers: dict[str, Path], texts: Path
) -> None:
    config = composed(*words_of(classifiers["bert"], texts), "data.max_length=8")
    examples = data.load(config.data).train
    tokenizer = base_model.tokenizer(config.model)
    tokens = data.classify(examples, tokenizer, config.data, LABELS)
    short = [e for e in examples if len(e.prompt) <= 6]  # a token a letter, [CLS] and [SEP]
    assert 0 < len(short) < len(examples)
    assert tokens.input_ids == [tokenizer(e.prompt)["input_ids"] for e in short]
    assert [LABELS[i] for i in tokens.label_ids] == [e.completion for e in short]
    assert tokens.num_too_long == len(examples) - len(short)
    assert tokens.first(3).label_ids == tokens.label_ids[:3]


# --- the head --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "gemma"])
def test_the_head_is_zero_in_the_base_and_drawn_by_seeds_init_alone(
    kind: str, classifiers: dict[str, Path], texts: Path
) -> None:
    words = words_of(classifiers[kind], texts)
    configs = [composed(*words, *more) for more in (
        ["lora.r=2"], ["lora.r=8", "seeds.data=5"], ["lora.r=2", "seeds.init=1"]
    )]  # fmt: skip
    checksums = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        checksums.add(base_model.checksum(base_model.load(configs[0].model, "cpu", len(LABELS))))
    assert len(checksums) == 1
    pack = make_pack(configs)
    assert isinstance(pack, StackedPack)
    (name,) = plan.make(configs[0]).saved_modules
    key = f"base_model.model.{name}.weight"
    heads = [pack.adapter_state(run)[key] for run in range(3)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    # N(0, initializer_range^2): 96 draws, so their deviation is within 30% of it by far.
    assert float(heads[0].std()) == pytest.approx(0.02, rel=0.3)
    for run, config in enumerate(configs):
        alone = make_pack([config], solo=True).adapter_state(0)
        packed = pack.adapter_state(run)
        assert adapters.state_hash(alone) == adapters.state_hash(packed)
        if kind == "bert":
            assert not packed[f"base_model.model.{name}.bias"].any()


@pytest.mark.parametrize(("kind", "head"), [("bert", "classifier"), ("gemma", "score")])
def test_all_linear_leaves_the_head_to_peft(
    kind: str, head: str, classifiers: dict[str, Path], texts: Path
) -> None:
    config = composed(*words_of(classifiers[kind], texts))
    made = plan.make(config)
    stock = get_peft_model(
        stock_model(config), LoraConfig(task_type="SEQ_CLS", r=16, target_modules="all-linear")
    )
    assert set(made.lora_modules) == set(stock.targeted_module_names)
    assert made.trainable_parameters == stock.get_nb_trainable_parameters()[0]
    assert head not in made.lora_modules and made.saved_modules == [head]


def test_the_head_of_a_classifier_is_replaced(classifiers: dict[str, Path], texts: Path) -> None:
    config = composed(*words_of(classifiers["five"], texts))
    assert any("BertForSequenceClassification" in said for said in plan.make(config).warnings)
    base = base_model.load(config.model, "cpu", len(LABELS))
    name, head = base_model.output_head(base) or ("", nn.Identity())
    assert name == "classifier" and not any(p.any() for p in head.parameters())
    assert head.weight.shape == (len(LABELS), 32)
    saved = t.BertModel.from_pretrained(classifiers["five"]).state_dict()
    for key, tensor in base.bert.state_dict().items():
        assert torch.equal(tensor, saved[key]), key
