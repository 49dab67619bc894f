"""The memory that a plan counts for a pack, against what torch allocates while it trains.

    python benchmarks/memory.py [--tokens 2048] [--only llama] [--device cpu]

Shapes of known architectures with few layers and random weights, large enough that activations
take more than 1 GB. Measured: on a CPU every allocation and release that torch's allocator reports
to its profiler (profile_memory), on CUDA torch.cuda.max_memory_allocated; above the base in both.
Results: benchmarks/results/<device>-memory.json, rewritten after every cell.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from written import begun, options_of, write

from lorabench import adapters
from lorabench.pack import ModulePack, StackedPack, trace
from lorabench.plan import Planner

WIDE = {
    "hidden_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 16,
    "max_position_embeddings": 4096,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama": WIDE | {"vocab_size": 32_000, "intermediate_size": 2816, "num_key_value_heads": 16},
    "qwen3": WIDE | {"vocab_size": 32_000, "intermediate_size": 3072, "num_key_value_heads": 8,
                     "head_dim": 128},
    "gemma": WIDE | {"vocab_size": 64_000, "intermediate_size": 4096, "num_key_value_heads": 1,
                     "head_dim": 128},
    "gemma2": WIDE | {"vocab_size": 64_000, "intermediate_size": 4096, "num_key_value_heads": 4,
                      "head_dim": 64, "num_hidden_layers": 4, "sliding_window": 256},
    "bert": WIDE | {"vocab_size": 30_522, "intermediate_size": 4096},
}  # fmt: skip
SETTINGS = {
    "plain": [],
    "lora_dropout": ["lora.lora_dropout=0.1"],
    "gradient_checkpointing": ["trainer.gradient_checkpointing=true"],
}
# Runs: of each its words; "alone" is one run on PEFT's own modules.
RUNS = {
    "alone": [["lora.r=16"]],
    "pack of 3": [["lora.r=8"], ["lora.r=16"], ["lora.r=64"]],
    "head": [["lora.r=16", "head=lora"]],
}
CLASSES = 4


def written(kind: str, folder: Path, **changed: Any) -> None:
    """Write the config of a shape."""
    from transformers import AutoConfig

    AutoConfig.for_model(kind, **(SHAPES[kind] | changed)).save_pretrained(folder)


def configs_of(kind: str, folder: Path, words: list[str], runs: list[list[str]]) -> list[Any]:
    """The configs of a pack."""
    from lorabench import cli, config

    own_words = {
        "bert": ["task=seq_cls", "head=full", "data.metric=[nll,accuracy]"],
        "gemma2": ["model.attn_implementation=eager"],
    }
    common = [
        "model=local", "recipe=embedded", f"model.path={folder}", f"model.name={kind}",
        "model.dtype=float32", "target_modules=all-linear", "trainer.deterministic=false",
        "tracker=none",
    ]  # fmt: skip
    found = []
    for own in runs:
        (cfg,), *_ = cli.compose([*common, *own_words.get(kind, []), *words, *own])
        found.append(config.typed(cfg))
    return found


def cell(
    kind: str, words: list[str], runs: str, lengths: list[int], device: str, **changed: Any
) -> dict[str, Any]:
    """Estimate and measure one pack's step.

    Args:
        lengths: tokens of each example of the micro-batch of each run.
        changed: numbers of the shape.
    """
    classes = CLASSES if kind == "bert" else 0
    alone = runs == "alone"
    with tempfile.TemporaryDirectory() as place:
        written(kind, Path(place), **changed)
        configs = configs_of(kind, Path(place), words, RUNS[runs])
        skeleton = Planner().skeleton(configs[0].model, classes)
    modules = [adapters.resolve_modules(skeleton, config) for config in configs]
    ranks = [dict.fromkeys(of_run, c.lora.r) for of_run, c in zip(modules, configs, strict=True)]
    batch = [(tokens, 1 if classes else tokens // 2) for tokens in lengths]
    slabs = [(len(configs), batch)]
    began = time.process_time()
    estimated = trace.trace(skeleton, configs, ranks, slabs, device, alone)
    seconds = time.process_time() - began
    found = measured(skeleton, configs, modules, slabs, device, alone)
    return {
        "shape": kind, "runs": runs, "estimated_bytes": estimated.peak, "measured_bytes": found,
        "ratio": round(estimated.peak / found, 3), "trace_cpu_seconds": round(seconds, 2),
    }  # fmt: skip


def measured(
    skeleton: Any,
    configs: list[Any],
    modules: list[list[str]],
    slabs: Any,
    device: str,
    alone: bool,
) -> int:
    """Bytes above the base that a real step takes, by torch's own accounting."""
    torch.manual_seed(0)
    base = type(skeleton)(skeleton.config).to(device).eval().requires_grad_(False)
    base.config.use_cache = False
    for parameter in base.parameters():
        parameter.data.normal_(0, 0.02)

    def make() -> Any:
        if alone:
            return ModulePack(base, configs[0], modules[0], device)
        return StackedPack(base, skeleton, configs, modules, device)

    targets = [sum(n for _, n in batch) for runs, batch in slabs for _ in range(runs)]

    batch = trace.batch_of(slabs, classes=configs[0].task == "seq_cls")

    def step(pack: Any) -> None:
        pack.forward_backward(0, 0, pack.lay(batch), targets)
        pack.update([1e-4] * pack.size)

    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        pack = make()
        torch.cuda.reset_peak_memory_stats()
        step(pack)
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        pack = make()
        with torch.profiler.record_function("the step"):
            step(pack)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begin = next(event.start_ns() for event in events if event.name() == "the step")
    live = peak = 0
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            if event.start_ns() >= begin:
                peak = max(peak, live)
    return peak


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of a run's micro-batch")
    parser.add_argument("--only", choices=SHAPES, nargs="*", default=list(SHAPES))
    options_of(parser)
    options = parser.parse_args(arguments)
    result = begun("memory", arguments, options) | {"shapes": SHAPES}
    cells: list[dict[str, Any]] = []
    result["cells"] = cells
    lengths = [options.tokens // 2, options.tokens // 4, options.tokens // 4]
    for (setting, words), runs, kind in itertools.product(SETTINGS.items(), RUNS, options.only):
        if kind == "bert" and runs == "head":
            continue  # a classifier's head is trained in full anyway
        found: dict[str, Any] = {"setting": setting}
        found |= cell(kind, words, runs, lengths, options.device)
        cells.append(found)
        estimated, real = found["estimated_bytes"] / 1e9, found["measured_bytes"] / 1e9
        print(
            f"{kind:8} {runs:10} {setting:24} {estimated:6.2f} GB of {real:6.2f}: "
            f"{found['ratio']:.3f}",
            flush=True,
        )
        path = write(result, "memory", options)
    ratios = [found["ratio"] for found in cells]
    print(f"estimate / measured: {min(ratios):.3f} to {max(ratios):.3f}")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
