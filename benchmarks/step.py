"""What one optimizer step of a pack is made of, on known shapes with random weights.

    python benchmarks/step.py                       narrow shapes of two and four layers: the counts
    python benchmarks/step.py --device cuda         whole shapes
    python benchmarks/step.py --runs 1,12 --tokens 512 --shapes qwen3-0.6b
    python benchmarks/step.py --lengths             examples of the lengths of an instruction set

Rows: runs of a pack that share a batch and a rank ("alike"), with dropout, and of ranks 16, 32, 64
with and without the head on two batches ("mixed"); all linear layers. `stock` is one run by a loop
over PEFT's own modules, which does not pack.

Columns:
    ops a layer      calls of aten operators that are no views, forward, backward and optimizer:
                     half the difference between a model of four layers and one of two
    ops a step       the same of the whole step, of four layers
    kernels a layer  CUDA kernels, likewise (CUDA alone)
    syncs            times the host waits for the device: what torch's sync debug mode reports on
                     CUDA; on a CPU the calls that would (item, tolist, a tensor as a condition)
    optimizer        host milliseconds of the update with one learning rate, and with one a run
    saved            bytes that the forward keeps for the backward, above weights and inputs
    real             share of the rows that a query projection of the last layer is given in the
                     steps timed that are tokens of examples; of packs
    of peak          4 FLOPs per parameter in linear layers and token, and those of the adapters, by
                     the step's time, as a share of what a large matrix product reaches
    ms a step        median

Results: benchmarks/results/<device>-step.json, with --lengths <device>-step-lengths.json.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import lengths
import torch
from contenders import batches, stock_steps
from shapes import SHAPES, random_tokens
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from written import begun, options_of, write

# What a count does not depend on, and what would take minutes on a CPU.
NARROW = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
LAYERS = (2, 4)
WAITS = (
    "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero",
)  # fmt: skip


class Ops(TorchDispatchMode):
    """Counts calls of operators that make or change numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Waits(TorchFunctionMode):
    """Counts calls that wait for a GPU, were the tensors there."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in WAITS:
            self.count += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def waits(device: str) -> Iterator[Callable[[], int]]:
    """Count the times the host waits for the device."""
    if device == "cpu":
        with Waits() as mode:
            yield lambda: mode.count
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchroniz" in str(one.message) for one in seen)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def saved_bytes(held: set[int]) -> Iterator[Callable[[], int]]:
    """Count the bytes of storages that are saved for the backward.

    Args:
        held: addresses of storages that are there anyway.
    """
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(found.values())


def base_of(shape: str, layers: int | None, options: argparse.Namespace) -> tuple[Any, Any]:
    """A model of a known shape with random weights, and the config of a run on it.

    Args:
        layers: None: as many as it has.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from lorabench import cli, config, machine

    numbers = dict(SHAPES[shape])
    if options.device == "cpu":
        numbers |= NARROW
    if layers is not None:
        numbers["num_hidden_layers"] = layers
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(numbers.pop("model_type"), **numbers).save_pretrained(folder)
        (cfg,), *_ = cli.compose([
            "model=local", "recipe=embedded", f"model.path={folder}", f"model.name={shape}",
            f"model.dtype={dtype}", "target_modules=all-linear", "trainer.steps=100000",
            f"trainer.device={options.device}", f"data.max_length={min(512, options.tokens)}",
        ])  # fmt: skip
        typed = config.typed(cfg)
        each = lengths.MEAN if options.lengths else typed.data.max_length
        typed.trainer.batch_size = max(1, options.tokens // each)
        machine.configure_torch(typed)
        torch.manual_seed(0)
        with torch.device(options.device):
            base = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder), dtype=getattr(torch, dtype)
            )
        base.requires_grad_(False).eval()
        # The skeleton is built, and kept, while the folder is there.
        from lorabench import plan

        plan_of[shape, layers] = plan.skeleton(typed.model)
    return base, typed


plan_of: dict[tuple[str, int | None], Any] = {}


def runs_of(config: Any, kind: str, count: int) -> list[Any]:
    """The runs of a pack, in the order in which lorabench packs them."""
    found = []
    for i in range(count):
        own = copy.deepcopy(config)
        own.seeds.init = i
        if kind == "dropout":
            own.lora.lora_dropout = 0.05
        if kind == "mixed":
            own.lora.r = (16, 32, 64)[i % 3]
            own.head.policy = ("exclude", "lora")[i // 3 % 2]
            own.seeds.data = i // 6 % 2
        found.append(own)
    return sorted(found, key=lambda one: (one.seeds.data, one.lora.r))


def stepping(base: Any, configs: list[Any], skeleton: Any, kind: str, options: Any) -> Any:
    """A pack of these runs, or one run in a stock loop; and an iterator over its steps."""
    device = options.device
    from lorabench import adapters
    from lorabench.pack import StackedPack
    from lorabench.train import train

    tokens = random_tokens(configs[0], base.config.vocab_size, alike=not options.lengths)
    modules = [adapters.resolve_modules(skeleton, config) for config in configs]
    if kind == "stock":
        model = adapters.attach(base, configs[0], modules[0])
        return None, stock_steps(model, batches(tokens, configs[0], 0, device), configs[0], device)
    pack = StackedPack(base, skeleton, configs, modules, device)
    return pack, train(pack, tokens, 0)


def counted(shape: str, kind: str, count: int, layers: int, options: Any) -> dict[str, Any]:
    """Operations, waits and kernels of a step of a model of so many layers."""
    base, config = base_of(shape, layers, options)
    skeleton = plan_of[shape, layers]
    _, steps = stepping(base, runs_of(config, kind, count), skeleton, kind, options)
    for _ in range(2):
        next(steps)
    with Ops() as ops:
        next(steps)
    with waits(options.device) as waited:
        next(steps)
        found: dict[str, Any] = {"ops": ops.calls, "waits": waited()}
    if options.device == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            next(steps)
            torch.cuda.synchronize()
        found["kernels"] = sum(
            event.count for event in seen.key_averages() if "Memcpy" not in event.key
        )
    return found


def update_milliseconds(pack: Any, rates: list[float], repeats: int) -> float:
    """Host milliseconds of the optimizer, the device left alone."""
    found = []
    for _ in range(repeats):
        for one in pack.stacked.values():
            one.value.grad = torch.full_like(one.value, 1e-3, memory_format=torch.contiguous_format)
        if pack.device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        pack.update(rates)
        found.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(found)


def measured(shape: str, kind: str, count: int, peak: float, options: Any) -> dict[str, Any]:
    """Times and bytes of a step."""
    layers = LAYERS[1] if options.device == "cpu" else None
    base, config = base_of(shape, layers, options)
    configs = runs_of(config, kind, count)
    pack, steps = stepping(base, configs, plan_of[shape, layers], kind, options)
    held = {p.untyped_storage().data_ptr() for p in base.parameters()}
    next(steps)
    if pack is not None:
        held |= {store.values.untyped_storage().data_ptr() for store in pack.stores}
        held |= {s.shadow.untyped_storage().data_ptr() for s in pack.stores if s.shadow is not None}
    with saved_bytes(held) as saved:
        next(steps)
    seconds, real, rows = [], 0, [0]
    if pack is not None:
        queries = [m for name, m in pack.tree.named_modules() if name.endswith("q_proj")]
        queries[-1].register_forward_pre_hook(
            lambda module, given: rows.append(given[0].numel() // given[0].shape[-1])
        )
    for _ in range(options.repeats):
        start = time.perf_counter()
        step = next(steps)
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        real += sum(step.tokens) if pack is not None else 0
    tokens = count * config.trainer.batch_size * config.data.max_length
    if pack is not None:
        tokens = real // options.repeats
    row: dict[str, Any] = {
        "milliseconds": 1e3 * statistics.median(seconds), "saved_bytes": saved(), "tokens": tokens,
    }  # fmt: skip
    linear = [m for m in base.modules() if isinstance(m, torch.nn.Linear)]
    flops = 4.0 * tokens * sum(m.weight.numel() for m in linear)
    if pack is not None:
        adapters_of = sum(
            one.numel() for run in range(count) for one in pack.adapter_state(run).values()
        )
        flops += 6.0 * tokens / count * adapters_of
        alike, apart = [1e-3] * count, [1e-3 * (1 + i) for i in range(count)]
        row["optimizer_milliseconds"] = update_milliseconds(pack, alike, 3 * options.repeats)
        row["optimizer_milliseconds_rates"] = update_milliseconds(pack, apart, 3 * options.repeats)
        row["real_share"] = real / sum(rows)
    if pack is not None or not options.lengths:  # else the stock loop's padding would count
        row["share_of_peak"] = flops / statistics.median(seconds) / peak
    return row


def bench(options: argparse.Namespace, peak: float) -> dict[str, Any]:
    """Every row."""
    found = {}
    cases = [("stock", 1), *(("alike", n) for n in options.runs)]
    cases += [(kind, max(options.runs)) for kind in ("dropout", "mixed")]
    for shape in options.shapes:
        for kind, count in cases:
            few, many = (counted(shape, kind, count, n, options) for n in LAYERS)
            row = measured(shape, kind, count, peak, options)
            span = LAYERS[1] - LAYERS[0]
            difference = {
                name: (calls - few["ops"][name]) / span for name, calls in many["ops"].items()
            }
            row["operations"] = {n: x for n, x in sorted(difference.items()) if x}
            row["operations_a_layer"] = sum(difference.values())
            row["operations_a_step"] = sum(many["ops"].values())
            row["waits"] = many["waits"]
            if "kernels" in many:
                row["kernels_a_layer"] = (many["kernels"] - few["kernels"]) / span
            found[f"{shape} {kind} {count}"] = row
    return found


def show(rows: dict[str, Any]) -> None:
    """Print the rows as a table."""
    from rich.console import Console
    from rich.table import Table

    def cell(row: dict[str, Any], key: str, form: str, scale: float = 1) -> str:
        return "-" if row.get(key) is None else format(row[key] * scale, form)

    columns = [
        ("ops a layer", "operations_a_layer", ",.0f", 1),
        ("ops a step", "operations_a_step", ",", 1),
        ("kernels a layer", "kernels_a_layer", ",.0f", 1), ("syncs", "waits", "d", 1),
        ("optimizer ms, one rate", "optimizer_milliseconds", ".2f", 1),
        ("one a run", "optimizer_milliseconds_rates", ".2f", 1),
        ("saved MB", "saved_bytes", ",.1f", 1e-6), ("real", "real_share", ".0%", 1),
        ("of peak", "share_of_peak", ".1%", 1), ("ms a step", "milliseconds", ".1f", 1),
    ]  # fmt: skip
    table = Table("", *(head for head, *_ in columns), title="a step")
    for name, row in rows.items():
        table.add_row(name, *(cell(row, *how) for _, *how in columns))
    Console(width=150).print(table)


def main(arguments: list[str]) -> int:
    """Run the benchmark."""
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options_of(parser)
    parser.add_argument("--shapes", default="qwen3-0.6b,gemma-2b", type=lambda t: t.split(","))
    parser.add_argument("--runs", default="1,12", type=numbers, help="sizes of packs")
    parser.add_argument("--lengths", action="store_true", help="examples of different lengths")
    parser.add_argument("--tokens", default=1024, type=int, help="of a run and step")
    parser.add_argument("--repeats", default=5, type=int)
    options = parser.parse_args(arguments)

    from sweep import peak_matmul

    result = begun("step", arguments, options)
    peak = result["peak_matmul_flops_per_second"] = peak_matmul(options.device)
    result["rows"] = bench(options, peak)
    show(result["rows"])
    print(write(result, "step-lengths" if options.lengths else "step", options))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
