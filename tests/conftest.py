"""Fixtures: composed configs, tiny checkpoints of several architectures, small jsonl files."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_SILENT"] = "true"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from lorabench import cli, config

# One thread: as fast for models this small, and steady on a shared machine.
torch.set_num_threads(1)

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def composed(*overrides: str) -> config.Config:
    """The typed config of a command line."""
    (cfg,), _ = cli.compose(list(overrides))
    return config.typed(cfg)


class Said(NamedTuple):
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()


def say(*arguments: Any) -> Said:
    """The command line in this process, where torch is imported already."""
    out, err = io.StringIO(), io.StringIO()
    with as_it_was(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return Said(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """Put back what the command line changes in its process."""
    argv, handlers = sys.argv, logging.root.handlers[:]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        sys.argv = argv
        for number, handler in before.items():
            signal.signal(number, handler)
        for one in set(logging.root.handlers) - set(handlers):
            one.close()
        logging.root.handlers[:] = handlers


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    with as_it_was():
        yield


def stock_state(wrapped: Any) -> dict[str, torch.Tensor]:
    """What stock PEFT saves of a wrapped model; before 0.21 it left trained biases out."""
    import warnings

    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied layers
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    trained = {n: p.detach() for n, p in wrapped.named_parameters() if p.requires_grad}
    biases = {n: p for n, p in trained.items() if n.endswith(".base_layer.bias")}
    return biases | state


@pytest.fixture
def compose() -> Callable[..., config.Config]:
    return composed


def tiny_config(kind: str, vocab_size: int) -> Any:
    """A transformers config of a small model of that architecture."""
    import transformers as t

    common = SMALL | {"vocab_size": vocab_size}
    if kind == "gpt2":
        return t.GPT2Config(
            vocab_size=vocab_size,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=2,
            eos_token_id=1,
        )
    if kind == "bert":  # as a decoder: a head with a transform, LayerNorms and biases everywhere
        return t.BertConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            is_decoder=True,
        )
    if kind == "opt":
        return t.OPTConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        )
    if kind == "qwen3_moe":
        common |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    if kind in ("gemma2", "gemma3"):  # shorter than an example: some layers see less than others
        common |= {"sliding_window": 8}
    makers = {
        "gemma": t.GemmaConfig,
        "gemma2": t.Gemma2Config,
        "gemma3": t.Gemma3TextConfig,
        "llama": t.LlamaConfig,
        "qwen2": t.Qwen2Config,
        "qwen3": t.Qwen3Config,
        "qwen3_moe": t.Qwen3MoeConfig,
    }
    return makers[kind](**common)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a checkpoint folder of a tiny random model, with the embedded base's tokenizer."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            from lorabench import model as base_model

            folder = tmp_path_factory.mktemp("models") / kind
            tokenizer = AutoTokenizer.from_pretrained(base_model.ZOO / "tiny-gemma")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_config(kind, len(tokenizer)))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return make


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """Sixty prompt/completion lines."""
    path = tmp_path / "examples.jsonl"
    rows = [{"prompt": f"add {i} and {i + 1} = ", "completion": str(2 * i + 1)} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
