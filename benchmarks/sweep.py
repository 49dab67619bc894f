"""How fast a sweep is: packs against what people do today, interleaved on one machine.

    python benchmarks/sweep.py                       12 runs on the embedded base, whole processes
    python benchmarks/sweep.py --quick               2 runs of 20 steps: a check
    python benchmarks/sweep.py --device cuda         step times of known shapes, random weights

Contenders, each with the same examples in the same order, the same initial adapters, AdamW (fused),
schedule, clipping, precision, threads, allocator settings and evaluation:
    a      Hydra's basic launcher, HF Trainer and stock PEFT; one process, a base loaded per job
    stock  the same with a hand-written loop: shows how much of (a) is the Trainer
    b      one process per run: `lorabench train`
    c      the best solo loop of ours: one process, one base, torch.compile where it pays
    dN     `lorabench train -m` in packs of at most N
In favour of (a), stock and (c): they write no records, keep no adapters, and leave determinism off.
Start-up counts on the embedded base. On shapes only steps are timed, in this process, and (a) is
its hand-written loop, run after run.

Results: benchmarks/results/<device>-<name>.json, rewritten after every repeat.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

AXES = {"head": ["exclude", "lora"], "lora.r": [16, 32, 64], "seed": [0, 1]}
QUICK = {"head": ["exclude", "lora"], "lora.r": [16], "seed": [0]}
# glibc returns pages to the system after every step otherwise, which costs all contenders alike.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
SAME_STEPS = 10  # steps over which the losses of (a) and (d) must agree
# Of the loss. Rounding alone separates equal runs: where a step overshoots and the gradient turns
# fast, the float32 losses of (a) are up to 6e-3 off its own float64 ones (`rounding_of_a` in the
# result). A wrong scale, seed, batch or rate shows as 1e-2 in the first steps.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}

# Numbers of the published config.json files; weights are random.
GEMMA = {"model_type": "gemma", "head_dim": 256, "hidden_act": "gelu_pytorch_tanh"}
SHAPES: dict[str, dict[str, Any]] = {
    "gemma-2b": GEMMA | {
        "vocab_size": 256_000, "hidden_size": 2048, "intermediate_size": 16_384,
        "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        "max_position_embeddings": 40_960,
    },
    "tiny": GEMMA | {
        "vocab_size": 152, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
    },
}  # fmt: skip
# Runs of a pack of shapes, over and over with the next seed.
SETTINGS = [("exclude", 16), ("lora", 16), ("exclude", 64), ("lora", 64)]


# --- contenders with a process of their own: (a), stock and (c) -------------------------------


def contend(name: str, arguments: list[str]) -> None:
    """A Hydra app, as people write them: one job is one run of the contender."""
    import hydra

    from lorabench import cli, config, runner

    cli.register()
    sys.argv = ["sweep.py", *arguments]

    def job(cfg: Any) -> None:
        import torch
        from hydra.core.hydra_config import HydraConfig

        typed = config.typed(cfg)
        torch.set_num_threads(typed.trainer.num_threads)
        splits, _ = runner.SHARED.splits(typed)  # prepared once: in favour of (a)
        pad_id = runner.data.pad_id(runner.SHARED.tokenizer(typed))
        contenders: dict[str, Callable] = {
            "trainer": run_trainer, "stock": run_stock, "exact": run_exact, "solo": run_solo,
        }  # fmt: skip
        run = contenders[name.split("-")[0]]
        found = run(typed, splits, pad_id, "compiled" in name)
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

    base = AutoModelForCausalLM.from_pretrained(base_model.location(config.model))
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
    length = data.padded_length(tokens, config.data.max_length)
    for chosen in data.order(len(tokens), trainer.batch_size, config.seeds.data, trainer.steps):
        ids, labels = (torch.from_numpy(x) for x in data.batch(tokens, chosen, length, pad_id))
        yield {"input_ids": ids.to(device), "labels": labels.to(device)}


def stock_nll(model: Any, splits: Any, pad_id: int, config: Any) -> dict[str, float]:
    """Teacher-forced nll as lorabench defines it: mean over examples, nats a token."""
    import torch
    import torch.nn.functional as F

    from lorabench import data

    model.eval()
    found = {}
    for split in ("validation", "test"):
        tokens, means = splits[split], []
        length = data.padded_length(tokens, config.data.max_length)
        for start in range(0, len(tokens), config.trainer.eval_batch_size):
            chosen = range(start, min(start + config.trainer.eval_batch_size, len(tokens)))
            ids, labels = map(torch.from_numpy, data.batch(tokens, chosen, length, pad_id))
            with torch.inference_mode():
                logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
                nll = F.cross_entropy(logits, labels[:, 1:], reduction="none")
            means += (nll.sum(1) / (labels[:, 1:] != data.IGNORED).sum(1)).tolist()
        found[split] = statistics.fmean(means)
    return found


def run_trainer(config: Any, splits: Any, pad_id: int, _: bool) -> dict[str, Any]:
    """(a): the HF Trainer, silent and saving nothing."""
    import torch
    from transformers import Trainer, TrainingArguments

    losses = []

    class Recorded(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if len(losses) < SAME_STEPS:
                losses.append(float(loss))
            return loss

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    trainer = config.trainer
    rows = [
        dict(zip(batch, pair, strict=True))
        for batch in batches(splits["train"], config, pad_id, "cpu")
        for pair in zip(*batch.values(), strict=True)
    ]
    model = stock_model(config)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=trainer.steps, per_device_train_batch_size=trainer.batch_size,
            learning_rate=trainer.lr, lr_scheduler_type=trainer.schedule,
            warmup_steps=trainer.warmup_steps, weight_decay=trainer.weight_decay,
            max_grad_norm=trainer.max_grad_norm, optim="adamw_torch_fused", use_cpu=True,
            train_sampling_strategy="sequential", remove_unused_columns=False, report_to="none",
            logging_strategy="no", save_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        Recorded(model, settings, data_collator=collate, train_dataset=rows).train()
    return {"losses": losses, "nll": stock_nll(model, splits, pad_id, config)}


def run_stock(config: Any, splits: Any, pad_id: int, _: bool) -> dict[str, Any]:
    """The same without the Trainer."""
    model = stock_model(config)
    steps = stock_steps(model, batches(splits["train"], config, pad_id, "cpu"), config, "cpu")
    losses = [loss.tolist()[0] for loss in steps]
    return {"losses": losses[:SAME_STEPS], "nll": stock_nll(model, splits, pad_id, config)}


def run_exact(config: Any, splits: Any, pad_id: int, _: bool) -> dict[str, Any]:
    """The first steps of the same in float64: what rounding does to (a)."""
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


def run_solo(config: Any, splits: Any, pad_id: int, compiled: bool) -> dict[str, Any]:
    """(c): lorabench's own pack of one, bare."""
    from lorabench import runner
    from lorabench.evaluate import evaluate
    from lorabench.train import train

    base, _ = runner.SHARED.base(config, "cpu")
    pack = make_pack(base, [config], "cpu", alone=True, compiled=compiled)
    losses, ends = [], [time.perf_counter()]
    for step in train(pack, splits["train"], pad_id):
        losses.append(step.loss[0])
        ends.append(time.perf_counter())
    tokenizer, nll = runner.SHARED.tokenizer(config), {}
    for split in ("validation", "test"):
        (table,) = evaluate(pack, splits[split], tokenizer, pad_id, ["nll"])
        nll[split] = float(table["nll"].mean())
    late = [b - a for a, b in itertools.pairwise(ends)][len(losses) // 2 :]
    return {"losses": losses[:SAME_STEPS], "nll": nll, "step_seconds": statistics.median(late)}


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


# --- the embedded base: whole processes --------------------------------------------------------


class Processes:
    """Runs contenders as commands, timed from start to exit."""

    def __init__(self, threads: int, steps: int, axes: dict[str, list[Any]]):
        self.axes = axes
        self.common = [
            f"trainer.steps={steps}", "trainer.batch_size=8", "data.max_length=24",
            "data.metric=[nll]", "target_modules=attention", "model.dtype=float32",
            "trainer.device=cpu", f"trainer.num_threads={threads}", "tracker=none",
        ]  # fmt: skip
        count = str(threads)
        self.environment = os.environ | ALLOCATOR | {
            "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip

    def run(self, contender: str, axes: dict[str, list[Any]] | None = None) -> dict[str, Any]:
        """Seconds of the whole sweep, and what each run of it found."""
        axes = axes or self.axes
        grid = [f"{key}={','.join(map(str, values))}" for key, values in axes.items()]
        with tempfile.TemporaryDirectory() as folder:
            place = [f"output_dir={folder}", "sweep=bench"]
            commands = [["-m", "lorabench", "train", "-m", *grid]]
            if contender == "b":
                points = itertools.product(*axes.values())
                points = [[f"{k}={v}" for k, v in zip(axes, p, strict=True)] for p in points]
                commands = [["-m", "lorabench", "train", *point] for point in points]
            elif contender.startswith("d"):
                commands[0].append(f"hydra.launcher.pack_size={contender[1:]}")
            else:
                name = {"a": "trainer", "c": "solo", "c-compiled": "solo-compiled"}
                own = [__file__, "--contender", name.get(contender, contender), "-m", *grid]
                commands = [[*own, "hydra/launcher=basic", "hydra.sweep.subdir=${hydra.job.num}"]]
            begun = time.perf_counter()
            for command in commands:
                self._must_run([sys.executable, *command, *self.common, *place])
            seconds = time.perf_counter() - begun
            found = _lorabench_runs(folder) if contender[0] in "bd" else _own_runs(folder)
        assert len(found) == len(list(itertools.product(*axes.values()))), sorted(found)
        return {"seconds": seconds, "runs": found}

    def _must_run(self, command: list[str]) -> None:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")


def _own_runs(folder: str) -> dict[str, dict[str, Any]]:
    found = [json.loads(p.read_text()) for p in Path(folder).glob("bench/*/result.json")]
    return {one["run"]: one for one in found}


def _lorabench_runs(folder: str) -> dict[str, dict[str, Any]]:
    found = {}
    for path in Path(folder).glob("bench/*/record.json"):
        entry = json.loads(path.read_text())
        rows = map(json.loads, (path.parent / "metrics.jsonl").read_text().splitlines())
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        config = entry["config"]
        name = f"head={config['head']['policy']} lora.r={config['lora']['r']} seed={config['seed']}"
        found[name] = {
            "losses": losses[:SAME_STEPS],
            "nll": {split: scores["nll"]["value"] for split, scores in entry["metrics"].items()},
            "tokens": entry["cost"]["train_tokens"],
            "pack": entry["plan"]["pack"]["size"],
        }
    return found


def agreement(
    expected: dict[str, list[float]], found: dict[str, list[float]], dtype: str
) -> dict[str, Any]:
    """Whether every run has the reference's losses, step by step, within rounding.

    Differences are relative to the reference's loss.
    """
    gaps = [
        abs(x - y) / x
        for run, losses in expected.items()
        for x, y in itertools.zip_longest(losses, found.get(run, []), fillvalue=float("inf"))
    ]
    worst = max(gaps, default=float("inf"))
    agree = bool(gaps) and all(gap <= TOLERANCE[dtype] for gap in gaps)  # false for NaN
    return {"largest_difference": worst, "tolerance": TOLERANCE[dtype], "agree": agree}


def compile_pays(processes: Processes, steps: int) -> dict[str, Any]:
    """Try torch.compile on one run, and reckon what it would save and cost over the sweep."""
    axes = processes.axes
    one = {key: values[-1:] for key, values in axes.items()}
    try:
        eager, compiled = processes.run("c", one), processes.run("c-compiled", one)
    except SystemExit as error:
        return {"used": False, "why": str(error).strip().splitlines()[-1][:200]}
    (x,), (y,) = eager["runs"].values(), compiled["runs"].values()
    saved = steps * (x["step_seconds"] - y["step_seconds"])
    each = compiled["seconds"] - eager["seconds"] + saved
    total = len(list(itertools.product(*axes.values()))) * saved - len(axes["lora.r"]) * each
    return {
        "used": total > 0,
        "eager_step_seconds": x["step_seconds"],
        "compiled_step_seconds": y["step_seconds"],
        "compile_seconds_a_rank": each,
        "saves_seconds_over_the_sweep": total,
    }


def bench_sweep(options: argparse.Namespace, result: dict[str, Any], save: Callable) -> None:
    """Interleave the contenders on the embedded base."""
    from lorabench import model as base_model
    from lorabench.config import ModelConfig

    steps = 20 if options.quick else 200
    processes = Processes(options.threads, steps, QUICK if options.quick else AXES)
    base = base_model.load(ModelConfig(path="lorabench:tiny-gemma"), "cpu")
    parameters = base_model.num_parameters(base)
    result["steps"], result["runs"] = steps, processes.axes
    compiled = {"used": False, "why": "not tried"}
    result["compile"] = compile_pays(processes, steps) if options.compile else compiled
    names = ["a", "stock", "b", "c", *(f"d{n}" for n in options.packs)]
    table: dict[str, Any] = {name: {"seconds": []} for name in names}
    result["contenders"] = table
    result["load_average"] = []
    exact = processes.run("exact")["runs"]
    for _ in range(options.repeats):
        result["load_average"].append(os.getloadavg()[0])
        for name in names:
            actual = "c-compiled" if name == "c" and result["compile"]["used"] else name
            found = processes.run(actual)
            runs, row = found["runs"], table[name]
            row["seconds"].append(found["seconds"])
            row["mean_test_nll"] = statistics.fmean(r["nll"]["test"] for r in runs.values())
            losses = {run: one["losses"] for run, one in runs.items()}
            if name == "a":
                reference = losses
                doubles = {run: one["losses"] for run, one in exact.items()}
                result["rounding_of_a"] = agreement(doubles, losses, "float32")[
                    "largest_difference"
                ]
            row["losses_as_a"] = agreement(reference, losses, "float32")
            if "pack" in next(iter(runs.values())):
                row["pack_sizes"] = sorted({one["pack"] for one in runs.values()})
                result["tokens"] = sum(one["tokens"] for one in runs.values())
            print(f"{name}: {found['seconds']:.1f} s", file=sys.stderr, flush=True)
        for row in table.values():
            row["median_seconds"] = statistics.median(row["seconds"])
            for other in ("a", "b"):
                row[f"ratio_to_{other}"] = ratio(table[other]["seconds"], row["seconds"])
            rates(row, result["tokens"], row["median_seconds"], parameters, result)
        save()


def ratio(others: list[float], mine: list[float]) -> float:
    """Median over repeats of how many times faster than the other."""
    return statistics.median(x / y for x, y in zip(others, mine, strict=True))


def rates(row: dict, tokens: int, seconds: float, parameters: int, result: dict) -> None:
    """Non-pad tokens a second, and the share of the machine's peak at 4 x parameters a token."""
    row["tokens_per_second"] = tokens / seconds
    peak = result["peak_matmul_flops_per_second"]
    row["share_of_peak"] = 4 * parameters * tokens / seconds / peak


# --- shapes: step times in this process --------------------------------------------------------


def shape_config(name: str, folder: str, options: argparse.Namespace) -> Any:
    """The config of a run on a known architecture, whose weights are made here."""
    from transformers import AutoConfig

    from lorabench import cli, config

    numbers = dict(SHAPES[name])
    AutoConfig.for_model(numbers.pop("model_type"), **numbers).save_pretrained(folder)
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    (cfg,), _ = cli.compose([
        "model=local", f"model.path={folder}", f"model.name={name}", f"model.dtype={dtype}",
        "target_modules=attention", f"trainer.device={options.device}", "trainer.steps=1000",
    ])  # fmt: skip
    return config.typed(cfg)


def variants(config: Any, count: int) -> list[Any]:
    """The runs of a pack: SETTINGS over and over, with the next seeds."""
    import copy

    found = []
    for i in range(count):
        own = copy.deepcopy(config)
        own.head.policy, own.lora.r = SETTINGS[i % len(SETTINGS)]
        own.seeds.init = own.seeds.data = i // len(SETTINGS)
        found.append(own)
    return found


def random_tokens(config: Any, vocabulary: int) -> Any:
    """Examples of random ids, the first quarter the prompt; no padding."""
    import numpy as np

    from lorabench.data import Tokens

    length, count = config.data.max_length, 4 * config.trainer.batch_size
    ids = np.random.default_rng(0).integers(0, vocabulary, (count, length)).tolist()
    return Tokens(ids, [length // 4] * count, list(map(str, range(count))), [*range(count)], 0, 0)


def contenders_of(base: Any, config: Any, options: argparse.Namespace) -> dict[str, Callable]:
    """What to time, by name: each makes an iterator over steps. `solo0` is run 0 alone, ..."""
    from lorabench import adapters, plan
    from lorabench.train import train

    tokens, device = random_tokens(config, base.config.vocab_size), options.device
    found: dict[str, Callable] = {}

    def stock(own: Any) -> Iterator[Any]:
        modules = adapters.resolve_modules(plan.skeleton(own.model), own)
        model = adapters.attach(base, own, modules)
        return stock_steps(model, batches(tokens, own, 0, device), own, device)

    def ours(runs: list[Any], alone: bool, compiled: bool = False) -> Iterator[Any]:
        pack = make_pack(base, runs, device, alone, compiled)
        return (step.loss for step in train(pack, tokens, 0))

    for i, own in enumerate(variants(config, len(SETTINGS))):
        found[f"stock{i}"] = lambda own=own: stock(own)
        found[f"solo{i}"] = lambda own=own: ours([own], True)
        if options.compile:
            found[f"compiled{i}"] = lambda own=own: ours([own], True, True)
    for n in options.packs:
        found[f"d{n}"] = lambda n=n: ours(variants(config, n), False)
    return dict(sorted(found.items(), key=lambda item: item[0][0] == "d"))


def bench_case(base: Any, config: Any, options: argparse.Namespace, peak: dict) -> dict[str, Any]:
    """Step seconds of every contender at one shape and number of tokens, interleaved."""
    import torch

    from lorabench import machine
    from lorabench import model as base_model

    def sync() -> float:
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    case: dict[str, Any] = {"left_out": {}}
    live: dict[str, Iterator[Any]] = {}
    losses: dict[str, list[Any]] = {}
    seconds: dict[str, list[float]] = {}
    makers = contenders_of(base, config, options)
    for repeat in range(-1, options.repeats):  # the first is the warm-up
        if repeat > 0 and time.perf_counter() > options.deadline:
            break
        for name in list(makers):
            failed = ""
            try:
                if repeat < 0 and time.perf_counter() > options.deadline:
                    raise TimeoutError("no time left")
                if repeat < 0:
                    live[name] = makers[name]()
                begun = sync()
                rows = [next(live[name]) for _ in range(3)]
                elapsed = (sync() - begun) / len(rows)
            except Exception as error:
                first = [*str(error).strip().splitlines(), type(error).__name__][0][:200]
                failed = "out of memory" if machine.is_out_of_memory(error) else first
            if failed:  # out of the handler, whose traceback holds the contender's tensors
                case["left_out"][name] = failed
                for gone in (live, losses, makers):
                    gone.pop(name, None)
                release(options.device)
                continue
            losses.setdefault(name, []).extend([[float(x) for x in row] for row in rows])
            if repeat >= 0:
                seconds.setdefault(name, []).append(elapsed)
    tokens = config.trainer.batch_size * config.data.max_length
    parameters = base_model.num_parameters(base)
    medians = {k: statistics.median(v) for k, v in seconds.items() if k in makers}
    case["step_seconds"] = {k: seconds[k] for k in medians}
    kinds = {
        kind: [seconds[f"{kind}{i}"] for i in range(len(SETTINGS)) if f"{kind}{i}" in medians]
        for kind in ("stock", "solo", "compiled")
    }
    kinds = {kind: rows for kind, rows in kinds.items() if len(rows) == len(SETTINGS)}

    def one_by_one(kind: str, count: int) -> list[float]:
        """Seconds a step of `count` runs, one after the other, by repeat."""
        rows = list(itertools.islice(itertools.cycle(kinds[kind]), count))
        return [sum(column) for column in zip(*rows, strict=True)]

    tuned = min(kinds.keys() - {"stock"}, key=lambda k: sum(map(sum, kinds[k])), default=None)
    case["tuned"] = tuned
    case["packs"] = {}
    for n in options.packs:
        if f"d{n}" not in medians:
            continue
        row = case["packs"][f"d{n}"] = {"step_seconds": medians[f"d{n}"]}
        rates(row, n * tokens, medians[f"d{n}"], parameters, peak)
        for label, kind in (("a", "stock"), ("c", tuned)):
            if kind in kinds:
                row[f"ratio_to_{label}"] = ratio(one_by_one(kind, n), seconds[f"d{n}"])
        both = [i for i in range(min(n, len(SETTINGS))) if f"stock{i}" in losses]
        expected = {str(i): [row[0] for row in losses[f"stock{i}"][:SAME_STEPS]] for i in both}
        mine = {str(i): [row[i] for row in losses[f"d{n}"][:SAME_STEPS]] for i in both}
        row["losses_as_a"] = agreement(expected, mine, config.trainer.dtype)
    return case


def release(device: str) -> None:
    """Give back what nothing holds any more."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def bench_shapes(options: argparse.Namespace, result: dict[str, Any], save: Callable) -> None:
    """Known architectures with random weights, small steps first."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    result["cases"] = {}
    for tokens, name in itertools.product(options.tokens, options.shapes):
        with tempfile.TemporaryDirectory() as folder:
            config = shape_config(name, folder, options)
            config.data.max_length = min(512, tokens)
            config.trainer.batch_size = tokens // config.data.max_length
            case: dict[str, Any] = {"left_out": {"all": "no time left"}}
            if time.perf_counter() < options.deadline:
                torch._dynamo.reset()
                torch.manual_seed(0)
                with torch.device(options.device):
                    base = AutoModelForCausalLM.from_config(
                        AutoConfig.from_pretrained(folder), dtype=getattr(torch, config.model.dtype)
                    )
                base.requires_grad_(False).eval()
                case = bench_case(base, config, options, result)
                release(options.device)
                case["sizer"] = sizer(config, options.device)
                del base
                release(options.device)
            result["cases"][f"{name} {tokens}"] = case
        save()


def sizer(config: Any, device: str) -> int:
    """The pack size lorabench would choose for 16 such runs in the memory that is free now."""
    from lorabench import machine, plan, sweep

    jobs = [sweep.Job(own, str(i), plan.make(own)) for i, own in enumerate(variants(config, 16))]
    return len(sweep.form_packs(jobs, 16, machine.free_memory(device))[0])


# --- the command -------------------------------------------------------------------------------


def peak_matmul(device: str) -> float:
    """FLOPs a second of a large matrix product in the precision trained in: best of several."""
    import torch

    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        begun = time.perf_counter()
        float((x @ y)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def show(result: dict[str, Any]) -> None:
    """The result as tables."""
    from rich.console import Console
    from rich.table import Table

    def row(name: str, one: dict[str, Any], seconds: float) -> list[str]:
        same = one["losses_as_a"]
        return [
            name, f"{seconds:.4g}", *(f"{one[k]:.2f}" if k in one else "-" for k in keys),
            f"{one['tokens_per_second']:,.0f}", f"{one['share_of_peak']:.1%}",
            f"{'yes' if same['agree'] else 'NO'} ({same['largest_difference']:.1e})",
        ]  # fmt: skip

    sweep = "contenders" in result
    keys = ["ratio_to_a", "ratio_to_b" if sweep else "ratio_to_c"]
    heads = ["", "seconds", "x (a)", "x (b)" if sweep else "x (c)", "tokens/s", "of peak"]
    groups = {"the sweep, whole processes": result.get("contenders", {})}
    groups |= {name: case.get("packs", {}) for name, case in result.get("cases", {}).items()}
    for title, rows in groups.items():
        if not rows:
            continue
        table = Table(*heads, "first losses as (a)", title=title)
        for name, one in rows.items():
            table.add_row(*row(name, one, one.get("median_seconds") or one["step_seconds"]))
        Console(width=100).print(table)
        for name, why in result.get("cases", {}).get(title, {}).get("left_out", {}).items():
            print(f"{name}: {why}")
    if "rounding_of_a" in result:
        print(f"(a) itself is up to {result['rounding_of_a']:.1e} of a loss off its float64 run")
    print(f"torch.compile: {result.get('compile', 'in (c) where it was faster, see tuned')}")


def all_agree(result: dict[str, Any]) -> bool:
    """Whether every contender's first losses are those of (a)."""
    groups = [result.get("contenders", {})]
    groups += [case.get("packs", {}) for case in result.get("cases", {}).values()]
    return all(row["losses_as_a"]["agree"] for rows in groups for row in rows.values())


def main(arguments: list[str]) -> int:
    """Returns 1 where a contender's first losses are not those of (a)."""
    if arguments[:1] == ["--contender"]:
        contend(arguments[1], arguments[2:])
        return 0
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", default=None, help=f"out of {','.join(SHAPES)}")
    parser.add_argument("--tokens", default="1024,4096,16384", type=numbers, help="a run and step")
    parser.add_argument("--packs", default="2,4,8,16", type=numbers, help="pack sizes")
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--threads", default=os.cpu_count(), type=int)
    parser.add_argument("--budget", default=450, type=float, help="seconds for shapes")
    parser.add_argument("--compile", default=True, action=argparse.BooleanOptionalAction)
    parser.add_argument("--quick", action="store_true", help="2 runs of 20 steps")
    parser.add_argument("--out", default=Path(__file__).parent / "results", type=Path)
    options = parser.parse_args(arguments)
    if options.shapes is None and options.device == "cuda":
        options.shapes = "qwen3-0.6b,gemma-2b"
    options.shapes = options.shapes.split(",") if options.shapes else []
    options.deadline = time.perf_counter() + options.budget
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

    import torch

    from lorabench import record

    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/sweep.py", *arguments]),
        "machine": record.provenance(options.device),
        "started": record.now(),
        "threads": options.threads,
        "allocator": os.environ["PYTORCH_ALLOC_CONF"] if options.shapes else ALLOCATOR,
        "peak_matmul_flops_per_second": peak_matmul(options.device),
    }
    kind = "shapes" if options.shapes else "quick" if options.quick else "sweep"
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.device}-{kind}.json"

    def save() -> None:
        record.write_atomic(path, json.dumps(result, indent=1) + "\n")

    (bench_shapes if options.shapes else bench_sweep)(options, result, save)
    show(result)
    print(path)
    return 0 if all_agree(result) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
