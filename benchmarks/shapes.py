"""Step times on known shapes with random weights, in this process."""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import lengths
from agree import SAME_STEPS, agreement, rates, ratio
from contenders import batches, make_pack, stock_steps

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


def shape_config(name: str, folder: str, options: argparse.Namespace) -> Any:
    """The config of a run on a known architecture, whose weights are made here."""
    from transformers import AutoConfig

    from lorabench import cli, config

    numbers = dict(SHAPES[name])
    AutoConfig.for_model(numbers.pop("model_type"), **numbers).save_pretrained(folder)
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    (cfg,), *_ = cli.compose([
        "model=local", "recipe=embedded", f"model.path={folder}", f"model.name={name}",
        f"model.dtype={dtype}",
        "target_modules=attention", f"trainer.device={options.device}", "trainer.steps=1000",
        "trainer.deterministic=false",
    ])  # fmt: skip
    return config.typed(cfg)


def variants(config: Any, count: int) -> list[Any]:
    """The runs of a pack: SETTINGS over and over, with the next seeds."""

    found = []
    for i in range(count):
        own = copy.deepcopy(config)
        own.head.policy, own.lora.r = SETTINGS[i % len(SETTINGS)]
        own.seeds.init = own.seeds.data = i // len(SETTINGS)
        found.append(own)
    return found


def random_tokens(config: Any, vocabulary: int, alike: bool) -> Any:
    """Examples of random ids, the first quarter the prompt.

    Args:
        alike: all of the longest length; else of those of lengths.py.
    """
    import numpy as np

    from lorabench.data import Tokens

    longest, count = config.data.max_length, 8 * config.trainer.batch_size
    tokens = [longest] * count if alike else lengths.lengths(count, cap=longest)
    draw = np.random.default_rng(0)
    ids = [draw.integers(0, vocabulary, n).tolist() for n in tokens]
    return Tokens.of(ids, [n // 4 for n in tokens])


def contenders_of(
    base: Any, config: Any, tokens: Any, options: argparse.Namespace
) -> dict[str, Callable]:
    """What to time, by name: each makes an iterator over steps. `solo0` is run 0 alone, ..."""
    from lorabench import adapters, plan
    from lorabench.train import train

    device = options.device
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
    data = random_tokens(config, base.config.vocab_size, alike=not options.lengths)
    makers = contenders_of(base, config, data, options)
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
    tokens = config.trainer.batch_size * statistics.fmean(map(len, data.input_ids))
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

    from lorabench import machine

    result["cases"] = {}
    for tokens, name in itertools.product(options.tokens, options.shapes):
        with tempfile.TemporaryDirectory() as folder:
            config = shape_config(name, folder, options)
            config.data.max_length = min(512, tokens)
            longest = config.data.max_length
            config.trainer.batch_size = tokens // (128 if options.lengths else longest)
            case: dict[str, Any] = {"left_out": {"all": "no time left"}}
            if time.perf_counter() < options.deadline:
                torch._dynamo.reset()
                machine.configure_torch(config)
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
            kind = " lengths" if options.lengths else ""
            result["cases"][f"{name} {tokens}{kind}"] = case
        save()


def sizer(config: Any, device: str) -> int:
    """The pack size lorabench would choose for 16 such runs in the memory that is free now."""
    from lorabench import machine, plan, sweep
    from lorabench.sweep.needs import Needs

    planner = plan.Planner()
    jobs = [sweep.Job(c, str(i), planner.make(c)) for i, c in enumerate(variants(config, 16))]
    return len(sweep.form_packs(jobs, 16, machine.free_memory(device), Needs(planner))[0])
