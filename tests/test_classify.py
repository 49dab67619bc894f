"""task=seq_cls against stock PEFT: AutoModelForSequenceClassification, SEQ_CLS, torch's AdamW."""

from __future__ import annotations

import json
import math
import random
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers as t
from conftest import composed, stock_state, tiny_config
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from test_pack import DoubleTorch, copy_of, relative
from torch import Tensor, nn

from lorabench import adapters, cli, data, plan
from lorabench import model as base_model
from lorabench.config import Config, ConfigErrors, lora_alpha
from lorabench.pack import ModulePack, StackedPack
from lorabench.train import train

# PEFT asks transformers by a name that 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LABELS = ["a", "b", "c"]


def bert_config(vocab_size: int) -> Any:
    config = tiny_config("bert", vocab_size)
    config.is_decoder = False
    return config


@pytest.fixture(scope="session")
def folders(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Checkpoints: an encoder, as BERT's are saved, and two decoders."""
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
        config = bert_config(len(words))
        if name == "five":
            config.num_labels = 5
        found[name] = place / name
        maker(config).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found | {kind: tiny_folder(kind) for kind in ("gemma", "llama")}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of two to nine letters; the label is the first."""
    rng = random.Random(0)
    words = sorted({"".join(rng.choices("abc", k=rng.randint(2, 9))) for _ in range(160)})
    rows = [{"prompt": word, "completion": word[0]} for word in words]
    path = tmp_path_factory.mktemp("texts") / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_of(model: Path | str, texts: Path) -> list[str]:
    """The part of a command line that all runs here share."""
    return [
        "tracker=none", "task=seq_cls", "head=full", "data=jsonl", f"data.train.path={texts}",
        "data.metric=[nll,accuracy]", "data.max_length=24", "data.test_fraction=0.2",
        "model=local", f"model.path={model}",
    ]  # fmt: skip


@pytest.fixture
def float64_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift the casts to float32 in norms and rotary embeddings, for both sides."""
    from transformers.models.gemma import modeling_gemma
    from transformers.models.llama import modeling_llama

    for module in (modeling_gemma, modeling_llama):
        monkeypatch.setattr(module, "torch", DoubleTorch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


# --- theirs ----------------------------------------------------------------------------------


def stock_model(config: Config) -> Any:
    """What a user of transformers loads: the head is random, another one in every process."""
    torch.manual_seed(random.randrange(10**6))
    model = t.AutoModelForSequenceClassification.from_pretrained(
        base_model.location(config.model),
        num_labels=len(LABELS),
        dtype=getattr(torch, config.model.dtype),
    )
    tokenizer = t.AutoTokenizer.from_pretrained(base_model.location(config.model))
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


class Stock:
    """One run as a user of PEFT writes it by hand, with the tokenizer's own padding and mask."""

    def __init__(self, config: Config, initial: dict[str, Tensor]):
        self.config = config
        lora = config.lora
        settings = LoraConfig(
            task_type="SEQ_CLS",
            r=lora.r,
            lora_alpha=lora_alpha(lora),  # type: ignore[arg-type]
            lora_dropout=lora.lora_dropout,
            use_rslora=lora.use_rslora,
            target_modules=plan.make(config).lora_modules,
            bias=lora.bias,  # type: ignore[arg-type]
        )
        self.wrapped = get_peft_model(stock_model(config), settings)
        assert not set_peft_model_state_dict(self.wrapped, dict(initial)).unexpected_keys
        self.wrapped.eval()  # the base's own dropouts are off, as in lorabench
        self.clock = adapters.Clock(config.seeds.dropout, training=True)
        adapters.key_dropout(self.wrapped, self.clock)
        self.parameters = [p for p in self.wrapped.parameters() if p.requires_grad]
        self.tokenizer = t.AutoTokenizer.from_pretrained(base_model.location(config.model))
        self.examples = data.load(config.data).train

    def state(self) -> dict[str, Tensor]:
        return stock_state(self.wrapped)

    def train(self, length: int) -> list[float]:
        trainer = self.config.trainer
        optimizer = torch.optim.AdamW(
            self.parameters, lr=trainer.lr, weight_decay=trainer.weight_decay
        )
        scheduler = t.get_scheduler(trainer.schedule, optimizer, 0, trainer.steps)
        losses = []
        order = data.order(
            len(self.examples), trainer.batch_size, self.config.seeds.data, trainer.steps
        )
        micro = trainer.micro_batch_size or trainer.batch_size
        for self.clock.step, indices in enumerate(order):
            optimizer.zero_grad()
            total = 0.0
            for self.clock.micro_step, first in enumerate(range(0, len(indices), micro)):
                chosen = [self.examples[i] for i in indices[first : first + micro]]
                batch = self.tokenizer(
                    [example.prompt for example in chosen],
                    padding="max_length", max_length=length, return_tensors="pt",
                )  # fmt: skip
                assert not batch["attention_mask"].all(), "there is padding to get wrong"
                labels = torch.tensor([LABELS.index(example.completion) for example in chosen])
                loss = nn.functional.cross_entropy(
                    self.wrapped(**batch).logits, labels, reduction="sum"
                )
                (loss / len(indices)).backward()
                total += loss.item() / len(indices)
            losses.append(total)
            if trainer.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters, trainer.max_grad_norm)
            optimizer.step()
            scheduler.step()
        return losses


# --- ours ------------------------------------------------------------------------------------


def make_pack(configs: list[Config], solo: bool = False) -> ModulePack | StackedPack:
    plans = [plan.make(config) for config in configs]
    assert [one.alone for one in plans] == [None] * len(plans)
    assert [one.labels for one in plans] == [LABELS] * len(plans)
    base = base_model.load(configs[0].model, "cpu", len(LABELS))
    modules = [one.lora_modules for one in plans]
    if solo:
        return ModulePack(base, configs[0], modules[0], "cpu")
    skeleton = plan.skeleton(configs[0].model, len(LABELS))
    return StackedPack(base, skeleton, configs, modules, "cpu")


def compare_training(configs: list[Config], solo: bool = False) -> None:
    """Losses and trained weights of every run, against a run of its own by stock PEFT."""
    pack = make_pack(configs, solo)
    initial = [copy_of(pack.adapter_state(run)) for run in range(pack.size)]
    tokenizer = base_model.tokenizer(configs[0].model)
    tokens = data.classify(data.load(configs[0].data).train, tokenizer, configs[0].data, LABELS)
    length = data.padded_length(tokens, configs[0].data.max_length)
    steps = list(train(pack, tokens, data.pad_id(tokenizer)))
    worst_loss, worst = 0.0, (0.0, "")
    for run, config in enumerate(configs):
        stock = Stock(config, initial[run])
        for step, theirs in zip(steps, stock.train(length), strict=True):
            worst_loss = max(worst_loss, abs(step.loss[run] - theirs))
        mine, theirs = pack.adapter_state(run), stock.state()
        assert set(mine) == set(theirs)
        for name, tensor in mine.items():
            assert not torch.equal(tensor, initial[run][name]), f"run {run}: {name} did not train"
            worst = max(worst, (relative(tensor, theirs[name]), f"run {run}: {name}"))
    print(f"\nlargest differences: loss {worst_loss:.2e}, weights {worst[0]:.2e} ({worst[1]})")
    # Float64 rounding (1e-16) of sums in another order, grown by AdamW's steps.
    assert worst_loss < 1e-10
    assert worst[0] < 1e-9, worst[1]


MIXED = [
    ["lora.r=4", "target_modules=all-linear"],
    ["lora.r=16", "target_modules=attention", "lora.use_rslora=true", "trainer.lr=3e-3"],
    ["lora.r=8", "target_modules=mlp", "trainer.weight_decay=0.1", "trainer.max_grad_norm=null"],
]
# Not on attention: a key's bias has no gradient but rounding, which AdamW turns into steps.
BIASES = {"bert": ["none", "none", "lora_only"]}


def mixture(kind: str, folders: dict[str, Path], texts: Path, *common: str) -> list[Config]:
    biases = BIASES.get(kind, ["none"] * len(MIXED))
    return [
        composed(
            *words_of(folders[kind], texts), "model.dtype=float64", "trainer.steps=12",
            f"seeds.init={i}", f"lora.bias={bias}", *words, *common,
        )
        for i, (words, bias) in enumerate(zip(MIXED, biases, strict=True))
    ]  # fmt: skip


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["bert", "gemma", "llama"])
def test_packed_runs_equal_stock_peft(
    kind: str, shared: bool, folders: dict[str, Path], texts: Path
) -> None:
    """Without dropout all runs see the same batch; with it each has its own data."""
    configs = mixture(kind, folders, texts)
    if not shared:
        for i, config in enumerate(configs):
            config.seeds.data = config.seeds.dropout = i
            config.lora.lora_dropout = 0.1 * (i > 0)
            config.trainer.micro_batch_size = 4
    compare_training(configs)


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize("kind", ["bert", "gemma"])
def test_a_run_alone_equals_stock_peft(kind: str, folders: dict[str, Path], texts: Path) -> None:
    compare_training(mixture(kind, folders, texts, "lora.lora_dropout=0.1")[:1], solo=True)


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize(
    ("kind", "names"), [("bert", ".*layer[.]1[.].*dense"), ("llama", ".*[.]1[.].*_proj")]
)
def test_layers_below_the_first_adapted_one_run_once(
    kind: str, names: str, folders: dict[str, Path], texts: Path
) -> None:
    own = ["target_modules=custom", f"target_modules.names='{names}'"]
    words = [*words_of(folders[kind], texts), "model.dtype=float64", "trainer.steps=4", *own]
    configs = [composed(*words, f"lora.r={r}", f"seeds.init={r}") for r in (2, 5)]
    pack = make_pack(configs)
    assert isinstance(pack, StackedPack) and pack.repeats_inside
    compare_training(configs)


# --- the head --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "gemma"])
def test_the_head_is_zero_in_the_base_and_drawn_by_seeds_init_alone(
    kind: str, folders: dict[str, Path], texts: Path
) -> None:
    words = words_of(folders[kind], texts)
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
    kind: str, head: str, folders: dict[str, Path], texts: Path
) -> None:
    config = composed(*words_of(folders[kind], texts))
    made = plan.make(config)
    stock = get_peft_model(
        stock_model(config), LoraConfig(task_type="SEQ_CLS", r=16, target_modules="all-linear")
    )
    assert set(made.lora_modules) == set(stock.targeted_module_names)
    assert made.trainable_parameters == stock.get_nb_trainable_parameters()[0]
    assert head not in made.lora_modules and made.saved_modules == [head]


def test_the_head_of_a_classifier_is_replaced(folders: dict[str, Path], texts: Path) -> None:
    config = composed(*words_of(folders["five"], texts))
    assert any("BertForSequenceClassification" in said for said in plan.make(config).warnings)
    base = base_model.load(config.model, "cpu", len(LABELS))
    name, head = base_model.output_head(base) or ("", nn.Identity())
    assert name == "classifier" and not any(p.any() for p in head.parameters())
    assert head.weight.shape == (len(LABELS), 32)
    saved = t.BertModel.from_pretrained(folders["five"]).state_dict()
    for key, tensor in base.bert.state_dict().items():
        assert torch.equal(tensor, saved[key]), key


# --- a whole run -----------------------------------------------------------------------------


def found(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    paths = sorted(folder.glob("*/*/record.json"))
    return [(path.parent, json.loads(path.read_text())) for path in paths]


@pytest.mark.parametrize("kind", ["bert", "lorabench:tiny-gemma"])
def test_adapters_reload_in_plain_peft_to_the_recorded_scores(
    kind: str, folders: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    words = [*words_of(folders.get(kind, kind), texts), "trainer.steps=40", "trainer.lr=3e-3"]
    sweep = "lora.bias=none,all" if kind == "bert" else "lora.r=2,4"
    command = ["train", "-m", *words, sweep, f"output_dir={tmp_path}"]
    assert cli.main([*command, "trainer.num_threads=1"]) == 0
    config = composed(*words)
    tokenizer = t.AutoTokenizer.from_pretrained(base_model.location(config.model))
    examples = data.load(config.data).test
    batch = tokenizer([e.prompt for e in examples], padding=True, return_tensors="pt")
    targets = torch.tensor([LABELS.index(example.completion) for example in examples])
    runs = found(tmp_path)
    assert len(runs) == 2
    for folder, record in runs:
        assert record["plan"]["labels"] == LABELS and record["plan"]["pack"]["size"] == 2
        state = load_file(folder / "adapter" / "adapter_model.safetensors")
        (head,) = record["plan"]["saved_modules"]
        parts = ["weight", "bias"] if kind == "bert" else ["weight"]
        modules = record["plan"]["lora_modules"]
        keys = {f"base_model.model.{m}.lora_{x}.weight" for m in modules for x in "AB"}
        keys |= {f"base_model.model.{head}.{part}" for part in parts}
        if record["config"]["lora"]["bias"] == "all":
            owners = [n.removesuffix(".bias") for n, _ in stock_model(config).named_parameters()
                      if n.endswith(".bias") and not n.startswith(head)]  # fmt: skip
            keys |= {f"base_model.model.{m}.base_layer.bias" for m in owners if m in modules}
            keys |= {f"base_model.model.{m}.bias" for m in owners if m not in modules}
        assert set(state) == keys
        assert sum(p.numel() for p in state.values()) == record["plan"]["trainable_parameters"]

        model = PeftModel.from_pretrained(stock_model(config), folder / "adapter").eval()
        with torch.no_grad():
            logits = model(**batch).logits
        nll = nn.functional.cross_entropy(logits, targets, reduction="none").double()
        scores = record["metrics"]["test"]
        # The bound: float32, the same examples, GEMMs of other shapes.
        assert abs(scores["nll"]["value"] - nll.mean().item()) < 1e-6
        right = (logits.argmax(1) == targets).double()
        assert scores["accuracy"]["value"] == right.mean().item()
        assert scores["accuracy"]["num_examples"] == len(examples)
        assert scores["accuracy"]["definition"] == "accuracy/1"
        table = pd.read_parquet(folder / "predictions.parquet").query("split == 'test'")
        assert table.accuracy.tolist() == right.tolist()
        assert table.predicted.tolist() == [LABELS[i] for i in logits.argmax(1)]
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        first = json.loads(lines[0])["train/loss"]
        assert first == pytest.approx(math.log(len(LABELS)), abs=0.5)
        if kind != "bert":  # whose weights are random: nothing to tell letters by
            assert scores["nll"]["value"] < 0.8 * math.log(len(LABELS))


def test_a_run_that_cannot_pack_classifies_alone(
    folders: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    words = [*words_of(folders["bert"], texts), "trainer.steps=3", "lora.use_dora=true"]
    assert cli.main(["train", *words, f"output_dir={tmp_path}"]) == 0
    ((_, record),) = found(tmp_path)
    assert record["status"] == "finished" and "DoRA" in record["plan"]["pack"]["alone"]
    assert set(record["metrics"]["test"]) == {"nll", "accuracy"}


def test_texts_that_are_too_long_are_left_out_and_counted(
    folders: dict[str, Path], texts: Path
) -> None:
    config = composed(*words_of(folders["bert"], texts), "data.max_length=8")
    examples = data.load(config.data).train
    tokenizer = base_model.tokenizer(config.model)
    tokens = data.classify(examples, tokenizer, config.data, LABELS)
    short = [e for e in examples if len(e.prompt) <= 6]  # a token a letter, [CLS] and [SEP]
    assert 0 < len(short) < len(examples)
    assert tokens.input_ids == [tokenizer(e.prompt)["input_ids"] for e in short]
    assert [LABELS[i] for i in tokens.label_ids] == [e.completion for e in short]
    assert tokens.num_too_long == len(examples) - len(short)
    assert tokens.first(3).label_ids == tokens.label_ids[:3]


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["head=exclude"], ["head: must be full with task=seq_cls", "'exclude'", "use head=full"]),
        (["head=lora"], ["head: must be full", "use head=full"]),
        (
            ["data.metric=[nll,exact_match]"],
            ["data.metric: must be out of nll, accuracy", "use data.metric=[nll,accuracy]"],
        ),
        (
            ["task=causal_lm"],
            ["data.metric: must be out of nll, exact_match, answer with task=causal_lm",
             "got 'accuracy'; use data.metric=[nll,exact_match]"],
        ),
        (
            ["task=causal_lm", "data.metric=[nll]", "data.labels=[a,b]"],
            ["data.labels: must be null with task=causal_lm", "use task=seq_cls"],
        ),
        (["data.labels=[a]"], ["data.labels: must be at least two different labels"]),
        (["data.chat_template=true"], ["data.chat_template: must be left out with task=seq_cls"]),
        (["data.add_eos=false"], ["data.add_eos: must be left out with task=seq_cls"]),
        (
            ["data.labels=[aa,b,c]"],
            ["data.train: every completion must be one of the 3 labels (aa, b, c); got 'a' (did "
             "you mean 'aa'?)", "more; mend it, or name it in data.labels"],
        ),
        (
            ["target_modules=custom", "target_modules.names=[query,classifier]"],
            ["target_modules.names: must leave out the head (classifier)"],
        ),
        (
            ["task=causal_lm", "data.metric=[nll]"],
            ["task: causal_lm must have a base that sees no later token", "use task=seq_cls"],
        ),
    ],
)  # fmt: skip
def test_what_the_task_cannot_do_is_refused(
    words: list[str], said: list[str], folders: dict[str, Path], texts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert cli.main(["plan", *words_of(folders["bert"], texts), *words]) == 2
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert not out and any(all(part in line for part in said) for line in lines), err
    assert len({line.partition(":")[0] for line in lines}) == len(lines), err  # one line a mistake


def test_labels_that_training_never_saw_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    rows = {
        "train": [("aa", "yes"), ("ba", "no")],
        "validation": [("ab", "yes")],
        "test": [("ab", "yes"), ("ca", "nope")],
    }
    words = words_of(folders["bert"], tmp_path / "train.jsonl")
    for split, pairs in rows.items():
        path = tmp_path / f"{split}.jsonl"
        lines = [json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in pairs]
        path.write_text("".join(lines))
        words.append(f"data.{split}.path={path}")
    with pytest.raises(ConfigErrors) as refused:
        plan.make(composed(*words))
    assert refused.value.errors == [
        "data.test: every completion must be one of the 2 labels (no, yes); got 'nope' (did you "
        "mean 'no'?) for the prompt 'ca'; mend it, or name it in data.labels"
    ]
    made = plan.make(composed(*words, "data.labels=[yes,nope,no]"))
    assert made.labels == ["yes", "nope", "no"]
    with pytest.raises(ConfigErrors, match=r"at least two; every example of data\.train has 'yes'"):
        shutil.copy(tmp_path / "validation.jsonl", tmp_path / "train.jsonl")
        plan.make(composed(*words))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("RobertaConfig", "'classifier', a RobertaClassificationHead; use another model"),
        ("BartConfig", "has none; use another model"),
        ("GraniteConfig", "which 'granite' of base model 'GraniteConfig' has none for"),
    ],
)
def test_architectures_without_a_head_to_train_are_refused(
    kind: str, said: str, texts: Path, tmp_path: Path
) -> None:
    config = getattr(t, kind)()
    for key in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
        if hasattr(config, key):
            setattr(config, key, 1)
    config.save_pretrained(tmp_path / kind)  # a skeleton needs no weights
    with pytest.raises(ConfigErrors) as refused:
        plan.make(composed(*words_of(tmp_path / kind, texts)))
    (error,) = refused.value.errors
    assert error.startswith("task: ") and said in error


def test_weights_that_would_be_random_are_refused(
    folders: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    words = [*words_of(folders["no-pooler"], texts), "trainer.steps=2", f"output_dir={tmp_path}"]
    assert cli.main(["train", *words]) == 1
    ((_, record),) = found(tmp_path)
    assert record["status"] == "failed"
    assert "'no-pooler' lacks bert.pooler.dense.bias, bert.pooler.dense.weight" in record["error"]
    assert "BertForSequenceClassification" in record["error"]


def test_an_encoder_made_a_decoder_is_a_language_model(tiny_folder: Callable[[str], Path]) -> None:
    made = plan.make(composed("tracker=none", "model=local", f"model.path={tiny_folder('bert')}"))
    assert made.head.module == "cls.predictions.decoder" and made.labels == []


def test_a_copy_that_nobody_asked_for_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """PEFT finds `classifier` at the end of DistilBERT's `pre_classifier` and would copy both."""
    tokenizer = t.AutoTokenizer.from_pretrained(folders["bert"])
    config = t.DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, hidden_dim=64, n_layers=2, n_heads=4
    )
    base = t.DistilBertForSequenceClassification(config)
    wrapped = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"]))
    assert any("pre_classifier.modules_to_save" in name for name, _ in wrapped.named_parameters())

    t.DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ["task=seq_cls", "head=full", "data=classes", "model=local", f"model.path={tmp_path}"]
    words += ["target_modules=custom", "target_modules.names=[q_lin]"]
    with pytest.raises(
        ConfigErrors, match="would also train pre_classifier, whose name ends alike"
    ):
        plan.make(composed(*words))
