"""What many training examples cost: seconds and memory of `lorabench plan`, which reads them all.

    python benchmarks/data_scale.py [--rows 400000] [--result benchmarks/results/data-scale.json]

A jsonl file of prompts and completions, and one of conversations, is written, planned twice with
an empty cache folder (the second time the tokens are there already), and compared with 1,000 rows.
Memory is the largest RssAnon of the command's own process, sampled every 10 ms: what it holds
beside mapped files, which the kernel may drop. The base is a Llama of random weights with the
embedded base's tokenizer: a token a character.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

FEW = 1000
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MIB = 1 << 20
COMMON = [
    "tracker=none", "data.max_length=400", "data.validation_fraction=0.01",
    "data.test_fraction=0.01", "data.metric=[nll]", "data.num_validation=500", "data.num_test=500",
]  # fmt: skip
FORMATS = {
    "prompt_completion": [],
    "messages": ["data.format=messages", "data.chat_template=chat.jinja"],
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + '=' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant={% endif %}"
)


def write(path: Path, rows: int, format: str) -> None:
    """Write examples of about 100 characters, which are as many tokens of the embedded base."""
    draw = random.Random(rows)
    known = ["".join(draw.choices(LETTERS, k=draw.randint(3, 8))) for _ in range(5000)]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            prompt = f"{number}={'='.join(draw.choices(known, k=9))}"
            completion = "=".join(draw.choices(known, k=6))
            row = {"prompt": prompt, "completion": completion}
            if format == "messages":
                turns = [("user", prompt), ("assistant", completion)]
                row = {"messages": [{"role": role, "content": text} for role, text in turns]}
            file.write(json.dumps(row) + "\n")


def measured(folder: Path, path: Path, format: str) -> dict[str, float]:
    """Run `lorabench plan` on a file; return its seconds and largest RssAnon in MiB."""
    words = [*COMMON, *FORMATS[format], "data=jsonl", f"data.train.path={path}"]
    words += ["model=local", "recipe=embedded", f"model.path={folder / 'base'}"]
    environment = os.environ | {"LORABENCH_CACHE": str(folder / "cache")}
    start, largest = time.perf_counter(), 0
    with open(folder / "out.txt", "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "lorabench", "plan", *words],
            cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while process.poll() is None:
            largest = max(largest, _rss_anon(process.pid))
            time.sleep(0.01)
    if process.returncode:
        raise SystemExit((folder / "out.txt").read_text())
    return {"seconds": round(time.perf_counter() - start, 1), "rss_anon_mib": round(largest / MIB)}


def make_base(folder: Path) -> None:
    """Write a small Llama with 1,024 positions and the embedded base's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lorabench.zoo import TINY_GEMMA

    tokenizer = AutoTokenizer.from_pretrained(TINY_GEMMA)
    tokenizer.model_max_length = 1024
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=1024, **shape, **heads, **ids
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _rss_anon(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    except OSError:  # it has ended
        pass
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--result", type=Path)
    options = parser.parse_args()
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "chat.jinja").write_text(TEMPLATE)
        make_base(folder / "base")
        for format in FORMATS:
            rows: dict[str, object] = {}
            for count in (FEW, options.rows):
                path = folder / f"{format}-{count}.jsonl"
                write(path, count, format)
                first, again = (measured(folder, path, format) for _ in range(2))
                rows[str(count)] = {"first": first, "again": again}
                print(f"{format:18} {count:8,} rows: {first}, again {again}", flush=True)
            few, many = rows[str(FEW)], rows[str(options.rows)]
            added = many["first"]["rss_anon_mib"] - few["first"]["rss_anon_mib"]  # type: ignore[index]
            print(f"{format:18} {added} MiB more than with {FEW:,} rows", flush=True)
            found[format] = rows | {"added_mib": added}
    if options.result:
        about = {
            name: version(name) for name in ("lorabench", "transformers", "tokenizers", "pyarrow")
        }
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        content = {"rows": found, "versions": about, "machine": machine}
        options.result.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
