"""What the recipes of the embedded bases share: tokens, optimizer, files, where they were built.

A recipe is a seeded model and the loss of a batch. Same machine, stack and number of threads, same
weights.
"""

import argparse
import hashlib
import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lorabench.zoo.skills import CYRILLIC, GREEK

MAX_POSITIONS = 64  # the skills need 24
WEIGHT_DECAY = 0.01  # of matrices, not of norms and embeddings
MAX_GRAD_NORM = 1.0
IGNORED = -100  # label of tokens that carry no loss


def build_tokenizer(
    special_tokens: dict[str, str], single: str, pair: str, **options: Any
) -> PreTrainedTokenizerFast:
    """One token a character: printable ASCII, newline, Greek and Cyrillic letters of the skills.

    Args:
        special_tokens: role -> token (`pad_token`, `unk_token`, ...), by ids from 0.
        single: the tokens of a text `$A`; `pair`: those of `$A` and `$B`.
    """
    characters = [chr(code) for code in range(32, 127)] + ["\n"] + list(GREEK + CYRILLIC)
    tokens = [*special_tokens.values(), *characters]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special_tokens["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    added = [token for token in special_tokens.values() if token in single]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, vocabulary[token]) for token in added]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        **special_tokens,
        **options,
    )


def folder_to_write(description: str, default: Path) -> Path:
    """What `--out` says."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=default, help="folder to write")
    return parser.parse_args().out


def be_deterministic(num_threads: int) -> None:
    """The same sums every time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(num_threads)


def optimise(
    model: PreTrainedModel,
    loss_of: Callable[[int], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    warmup_steps: int,
) -> None:
    """Train in place with AdamW and a cosine, `loss_of(step)` being the loss of a step's batch."""
    embedding = cast(Any, model.get_input_embeddings()).weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim != 2] + [embedding]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )

    def share(step: int) -> float:
        """Of the peak learning rate: linear warm-up, then half a cosine to 0."""
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    model.train()
    for step in range(steps):
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)
    model.eval()


def write(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    scores: dict[str, Any],
    recipe: dict[str, Any],
    readme: Callable[[dict, PreTrainedModel], str],
) -> dict[str, Any]:
    """Save a base with its card: card.json for machines, README.md for people; returns the card."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.chmod(0o644)  # safetensors leaves it to its owner alone
    tokenizer.save_pretrained(folder)
    card = {
        "name": name,
        "licence": "Apache-2.0",
        "architecture": type(model).__name__,
        "num_parameters": model.num_parameters(),
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        **scores,
        "recipe": recipe,
        "built_with": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "machine": platform.machine(),
        },
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme(card, model), encoding="utf-8")
    print(f"{card['num_parameters']:,} parameters, {recipe['train_seconds']} s, {folder}")
    return card
