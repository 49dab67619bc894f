"""How much host memory loading a base takes: peak of RssAnon over the bytes of its weights.

    python benchmarks/loading.py [--layers 8]

Builds a random Llama of about 500 MB in shards, in float32 and in bfloat16, and loads each in a
process of its own. 1.0 is one copy; a second one would be 2.0. On a CPU the tensors are copied out
of the mapped file, one at a time, on purpose (model/loading.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def anonymous_bytes() -> int:
    """Return the memory of this process that is not a mapped file."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def make(folder: Path, dtype_name: str, layers: int) -> None:
    """Save a random checkpoint in shards of 200 MB."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = getattr(torch, dtype_name)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(
        folder, max_shard_size="200MB"
    )


def load(folder: Path, dtype_name: str) -> dict[str, Any]:
    """Load it as a worker does; return the peak over what the process held before."""
    import transformers.models.llama.modeling_llama  # noqa: F401 - not to be measured

    from lorabench.config import ModelConfig
    from lorabench.model import load as load_base

    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    base = load_base(ModelConfig(path=str(folder), dtype=dtype_name), "cpu")
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    return {"weight_bytes": weights, "peak_bytes": peak - before, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(Path(options.load[0]), options.load[1])))
        return
    with tempfile.TemporaryDirectory() as place:
        for stored, loaded in (
            ("float32", "float32"),
            ("bfloat16", "bfloat16"),
            ("float32", "bfloat16"),
            ("bfloat16", "float32"),
        ):
            folder = Path(place) / stored
            if not folder.is_dir():
                make(folder, stored, options.layers)
            words = [sys.executable, __file__, "--load", str(folder), loaded]
            ran = subprocess.run(words, check=True, capture_output=True)
            found = json.loads(ran.stdout.splitlines()[-1])
            print(
                f"{stored} as {loaded}: weights {found['weight_bytes'] / 1e6:.0f} MB, peak RssAnon "
                f"{found['peak_bytes'] / 1e6:.0f} MB, "
                f"{found['peak_bytes'] / found['weight_bytes']:.2f} of the weights, "
                f"{found['seconds']:.1f} s"
            )


if __name__ == "__main__":
    main()
