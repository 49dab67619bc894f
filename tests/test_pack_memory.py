"""A pack dies when its last name goes: none of it waits for Python's garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from stock import TINY, tokens_of
from stock_classifier import LABELS, words_of

from lorabench import data, plan
from lorabench import model as base_model
from lorabench.pack import Batch, ModulePack, StackedPack, head
from lorabench.train import train

# PEFT asks transformers by a name that 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

# Adapters in the last layer alone: a shared batch is repeated by hooks on the layers.
LAST = ["target_modules=custom", "target_modules.names='.*[.]1[.].*(q_proj|c_attn|query)'"]
RUNS = (["lora.r=2"], ["lora.r=4"])


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "words", [[], ["trainer.gradient_checkpointing=true"]], ids=["plain", "recomputed"]
)
@pytest.mark.parametrize("alone", [False, True], ids=["packed", "alone"])
@pytest.mark.parametrize(
    "kind", ["gemma", *(pytest.param(k, marks=pytest.mark.slow) for k in ("gpt2", "opt", "bert"))]
)
def test_a_pack_dies_by_reference_counting(
    kind: str,
    alone: bool,
    words: list[str],
    tiny_folder: Callable[[str], Path],
    classifiers: dict[str, Path],
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cycle would keep the memory of every finished pack, gigabytes on a GPU, for a while.

    BERT is a classifier here.
    """
    monkeypatch.setattr(head, "CHUNK_BYTES", 1 << 14)  # the head in chunks, recomputed
    common = ["trainer.steps=3", "trainer.warmup_steps=0", "lora.lora_dropout=0.1", *words]
    classes = 0
    if kind == "bert":
        common += words_of(classifiers["bert"], texts)
        classes = len(LABELS)
    else:
        common += [*TINY, "model=local", f"model.path={tiny_folder(kind)}", "head=lora"]
    configs = [composed(*common, *LAST, *own) for own in RUNS]
    modules = [plan.make(config).lora_modules for config in configs]
    model = configs[0].model
    base = base_model.load(model, "cpu", classes)
    gc.collect()  # what composing and loading leave behind is not the pack's
    if alone:
        pack: Any = ModulePack(base, configs[0], modules[0], "cpu")
    else:
        pack = StackedPack(base, plan.skeleton(model, classes), configs, modules, "cpu")
    if classes:
        tokenizer = base_model.tokenizer(model)
        examples = data.load(configs[0].data).train
        tokens = data.classify(examples, tokenizer, configs[0].data, LABELS)
        pad_id = data.pad_id(tokenizer)
    else:
        tokens, pad_id = tokens_of(configs[0])
    assert len(list(train(pack, tokens, pad_id))) == 3
    ids, labels = data.batch(tokens, [0, 1, 2], None, pad_id)
    batch = Batch.make([ids], [labels], [pack.size], bool(classes))
    pack.score(batch)
    pack.logits(batch)
    if not classes:
        prompts = torch.from_numpy(ids[:, :5])
        pack.generate(prompts, torch.ones_like(prompts), max_new_tokens=2, do_sample=False)
    trained = (
        next(iter(pack.parameters.values())) if alone else next(iter(pack.stacked.values())).value
    )
    parts = {
        "pack": pack, "optimizer": pack.optimizer, "tree": pack.tree, "head": pack.head,
        "trained": trained, "layer": next(m for m in pack.tree.modules() if hasattr(m, "lora_A")
                                          or hasattr(m, "lora_a")),
    }  # fmt: skip
    watched = {name: weakref.ref(part) for name, part in parts.items()}
    del pack, trained, parts
    assert [name for name, part in watched.items() if part() is not None] == []
    held = {"base": weakref.ref(base), "weight": weakref.ref(next(base.parameters()))}
    del base
    assert [name for name, part in held.items() if part() is not None] == []
