"""The contenders of the benchmark: (a), its hand-written loop, (c), each as people write it.

As a command, one Hydra app: python benchmarks/contenders.py NAME OVERRIDES. Each job writes
result.json: the first losses, the scores, the real tokens trained on and those computed, padding
included, and the seconds of training and of evaluation.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agree import SAME_STEPS


def contend(name: str, arguments: list[str]) -> None:
    """A Hydra app, as people write them: one job is one run of the contender."""
    import hydra

    from lorabench import cli, config

    cli.register()
    sys.argv = ["contenders.py", *arguments]
    prepared: dict[str, Any] = {}  # once for all jobs: in favour of (a)

    def job(cfg: Any) -> None:
        import torch
        from hydra.core.hydra_config import HydraConfig

        typed = config.typed(cfg)
        torch.set_num_threads(typed.trainer.num_threads)
        prepared.update(prepared or prepare(typed, with_base=name.startswith("solo")))
        contenders: dict[str, Callable] = {
            "trainer": run_trainer, "grouped": run_grouped, "stock": run_stock,
            "exact": run_exact, "solo": run_solo,
        }  # fmt: skip
        run = contenders[name.split("-")[0]]
        found = run(typed, prepared, "compiled" in name)
        found["run"] = f"head={typed.head.policy} lora.r={typed.lora.r} seed={typed.seed}"
        folder = Path(HydraConfig.get().runtime.output_dir)
        (folder / "result.json").write_text(json.dumps(found))

    hydra.main(config_path=cli.conf_folder(), config_name="train", version_base="1.3")(job)()


def stock_model(config: Any) -> Any:
    """A freshly loaded base in stock PEFT, its initial A replaced by lorabench's draws."""
    import warnings

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lorabench import adapters
    from lorabench import model as base_model

    where = base_model.location(config.model)
    base = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=False)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    names += ["lm_head"] * (config.head.policy == "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tied head
        model = get_peft_model(
            base,
            LoraConfig(
                r=config.lora.r,
                lora_alpha=2 * config.lora.r,
                target_modules=names,
                task_type="CAUSAL_LM",
            ),
        )
    adapters.seed_weights(model, config)
    return model


def batches(tokens: Any, config: Any, pad_id: int, device: str) -> Iterator[dict[str, Any]]:
    """The batches lorabench would train on, with labels for the whole sequence."""
    import torch

    from lorabench import data

    trainer = config.trainer
    for chosen in data.order(len(tokens), trainer.batch_size, config.seeds.data, trainer.steps):
        ids, labels = (torch.from_numpy(x) for x in data.batch(tokens, chosen, None, pad_id))
        yield {"input_ids": ids.to(device), "labels": labels.to(device)}


def stock_nll(
    model: Any, splits: Any, pad_id: int, config: Any, by_length: bool
) -> dict[str, float]:
    """Return the teacher-forced nll as lorabench defines it: mean over examples, nats per token.

    Args:
        by_length: Score examples of similar length together, as the Trainer does with
            "group_by_length"; else in their order, as it does by default.
    """
    import torch
    import torch.nn.functional as F

    from lorabench import data

    model.eval()
    found = {}
    for split in ("validation", "test"):
        tokens, means = splits[split], []
        order = list(range(len(tokens)))
        if by_length:
            order.sort(key=lambda index: len(tokens.input_ids[index]))
        for start in range(0, len(tokens), config.trainer.eval_batch_size):
            chosen = order[start : start + config.trainer.eval_batch_size]
            ids, labels = map(torch.from_numpy, data.batch(tokens, chosen, None, pad_id))
            with torch.inference_mode():
                logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
                nll = F.cross_entropy(logits, labels[:, 1:], reduction="none")
            means += (nll.sum(1) / (labels[:, 1:] != data.IGNORED).sum(1)).tolist()
        found[split] = statistics.fmean(means)
    return found


def count_tokens(tokens: Any, config: Any) -> dict[str, int]:
    """Return the real tokens of a run's training, and the computed ones: batches are padded."""
    from lorabench import data

    trainer = config.trainer
    order = data.order(len(tokens), trainer.batch_size, config.seeds.data, trainer.steps)
    return sums([[len(tokens.input_ids[i]) for i in chosen] for chosen in order])


def sums(lengths: list[list[int]]) -> dict[str, int]:
    """Return real and computed tokens of batches that are padded to their longest example."""
    return {
        "tokens": sum(map(sum, lengths)),
        "computed_tokens": sum(len(batch) * max(batch) for batch in lengths),
    }


def score(
    model: Any, prepared: dict[str, Any], config: Any, begun: float, by_length: bool = False
) -> dict[str, Any]:
    """Return the nll of a model trained since `begun`, and the seconds of training and scoring."""
    trained = time.perf_counter()
    nll = stock_nll(model, prepared["splits"], prepared["pad_id"], config, by_length)
    seconds = time.perf_counter() - trained
    return {"nll": nll, "train_seconds": trained - begun, "evaluate_seconds": seconds}


def train_by_hf(
    model: Any, config: Any, rows: Any, collate: Callable, sampling: str
) -> tuple[list[float], float]:
    """Train by an HF Trainer, silent and saving nothing; return its first losses and its start."""
    from transformers import Trainer, TrainingArguments

    losses: list[float] = []

    class Recorded(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if len(losses) < SAME_STEPS:
                losses.append(float(loss))
            return loss

    trainer = config.trainer
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=trainer.steps, per_device_train_batch_size=trainer.batch_size,
            learning_rate=trainer.lr, lr_scheduler_type=trainer.schedule,
            warmup_steps=trainer.warmup_steps, weight_decay=trainer.weight_decay,
            max_grad_norm=trainer.max_grad_norm, optim="adamw_torch_fused", use_cpu=True,
            train_sampling_strategy=sampling, length_column_name="length",
            seed=config.seeds.data, remove_unused_columns=False, report_to="none",
            logging_strategy="no", save_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        made = Recorded(model, settings, data_collator=collate, train_dataset=rows)
        begun = time.perf_counter()
        made.train()
    return losses, begun


def run_trainer(config: Any, prepared: dict[str, Any], _: bool) -> dict[str, Any]:
    """(a): the HF Trainer, silent and saving nothing."""
    import torch

    tokens, pad_id = prepared["splits"]["train"], prepared["pad_id"]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    rows = [
        dict(zip(batch, pair, strict=True))
        for batch in batches(tokens, config, pad_id, "cpu")
        for pair in zip(*batch.values(), strict=True)
    ]
    model = stock_model(config)
    losses, begun = train_by_hf(model, config, rows, collate, "sequential")
    scored = score(model, prepared, config, begun)
    return {"losses": losses, **scored, **count_tokens(tokens, config)}


def run_grouped(config: Any, prepared: dict[str, Any], _: bool) -> dict[str, Any]:
    """(a) with batches of similar lengths, grouped by the Trainer itself: other batches."""
    import torch
    from datasets import Dataset

    from lorabench import data

    tokens, pad_id = prepared["splits"]["train"], prepared["pad_id"]
    if "rows" not in prepared:  # once for all jobs: in favour of (a)
        pairs = list(zip(tokens.input_ids, tokens.completion_start, strict=True))
        columns = {
            "input_ids": list(tokens.input_ids),
            "labels": [[data.IGNORED] * start + ids[start:] for ids, start in pairs],
            "length": [len(ids) for ids in tokens.input_ids],
        }
        prepared["rows"] = Dataset.from_dict(columns)
    lengths: list[list[int]] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad a batch to its longest example."""
        lengths.append([row["length"] for row in rows])
        width, fills = max(lengths[-1]), {"input_ids": pad_id, "labels": data.IGNORED}
        return {
            key: torch.tensor([row[key] + [fill] * (width - row["length"]) for row in rows])
            for key, fill in fills.items()
        }

    model = stock_model(config)
    rows = prepared["rows"]
    losses, begun = train_by_hf(model, config, rows, collate, "group_by_length")
    scored = score(model, prepared, config, begun, by_length=True)
    found = sums(lengths[: config.trainer.steps])  # the loader is a batch ahead
    plain = count_tokens(tokens, config)
    mine, random = (one["tokens"] / one["computed_tokens"] for one in (found, plain))
    assert mine > random, f"not grouped by length: {mine:.3f} real tokens, {random:.3f} without"
    return {"losses": losses, **scored, **found}


def run_stock(config: Any, prepared: dict[str, Any], _: bool) -> dict[str, Any]:
    """The same as (a) without the Trainer."""
    tokens, pad_id = prepared["splits"]["train"], prepared["pad_id"]
    model = stock_model(config)
    begun = time.perf_counter()
    steps = stock_steps(model, batches(tokens, config, pad_id, "cpu"), config, "cpu")
    losses = [loss.tolist()[0] for loss in steps]
    scored = score(model, prepared, config, begun)
    return {"losses": losses[:SAME_STEPS], **scored, **count_tokens(tokens, config)}


def run_exact(config: Any, prepared: dict[str, Any], _: bool) -> dict[str, Any]:
    """The first steps of the same in float64: what rounding does to (a)."""
    splits, pad_id = prepared["splits"], prepared["pad_id"]
    model = stock_model(config).double()
    steps = stock_steps(model, batches(splits["train"], config, pad_id, "cpu"), config, "cpu")
    return {"losses": [loss.item() for loss in itertools.islice(steps, SAME_STEPS)]}


def stock_steps(model: Any, source: Iterator[dict], config: Any, device: str) -> Iterator[Any]:
    """The training loop everybody writes; yields the loss of each step, (1,)."""
    import torch

    from lorabench.pack.solo import autocast
    from lorabench.train import learning_rate

    trainer = config.trainer
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=trainer.lr, weight_decay=trainer.weight_decay, fused=True
    )
    model.train()
    for step, batch in enumerate(source):
        with autocast(config, device):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, trainer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(trainer, step)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()[None]


def prepare(config: Any, with_base: bool) -> dict[str, Any]:
    """What all jobs of a contender share: the tokenised data, and for (c) the loaded base."""
    from lorabench import data
    from lorabench import model as base_model

    tokenizer, examples = base_model.tokenizer(config.model), data.load(config.data)
    splits = {
        split: data.tokenise(getattr(examples, split), tokenizer, config.data)
        for split in ("train", "validation", "test")
    }
    found = {"splits": splits, "tokenizer": tokenizer, "pad_id": data.pad_id(tokenizer)}
    return found | ({"base": base_model.load(config.model, "cpu")} if with_base else {})


def run_solo(config: Any, prepared: dict[str, Any], compiled: bool) -> dict[str, Any]:
    """(c): lorabench's own pack of one, bare."""
    from lorabench.evaluate import evaluate, summarise
    from lorabench.train import train

    splits, pad_id = prepared["splits"], prepared["pad_id"]
    pack = make_pack(prepared["base"], [config], "cpu", alone=True, compiled=compiled)
    losses, ends = [], [time.perf_counter()]
    for step in train(pack, splits["train"], pad_id):
        losses.append(step.loss[0])
        ends.append(time.perf_counter())
    nll = {}
    for split in ("validation", "test"):
        (table,) = evaluate(pack, splits[split], prepared["tokenizer"], pad_id, ["nll"])
        nll[split] = summarise(table, ["nll"])["nll"][0]
    evaluate_seconds = time.perf_counter() - ends[-1]
    late = [b - a for a, b in itertools.pairwise(ends)][len(losses) // 2 :]
    counts = count_tokens(splits["train"], config)
    if pack.end_to_end:
        counts["computed_tokens"] = counts["tokens"]
    return {
        "losses": losses[:SAME_STEPS], "nll": nll, "step_seconds": statistics.median(late),
        "train_seconds": ends[-1] - ends[0], "evaluate_seconds": evaluate_seconds, **counts,
    }  # fmt: skip


def make_pack(base: Any, configs: list[Any], device: str, alone: bool, compiled: bool) -> Any:
    """A pack of these runs; a compiled one has its decoder layers compiled, one graph for all."""
    import torch

    from lorabench import adapters, plan
    from lorabench.pack import ModulePack, StackedPack

    skeleton = plan.skeleton(configs[0].model)
    modules = [adapters.resolve_modules(skeleton, config) for config in configs]
    if not alone:
        return StackedPack(base, skeleton, configs, modules, device)
    pack = ModulePack(base, configs[0], modules[0], device)
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        for layer in pack.tree.base_model.layers:
            layer.compile(dynamic=False)
    return pack


if __name__ == "__main__":
    contend(sys.argv[1], sys.argv[2:])
