"""Names of attention implementations: what this machine has, and what repeats itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SMOKE, composed, say
from tiny import SMALL
from transformers import modeling_utils

from lorabench import machine, plan, versions
from lorabench.config import ConfigErrors, ModelConfig
from lorabench.model import kernels, loading
from lorabench.pack.probe import why_padded

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PINNED = f"kernels-community/flash-attn3@{COMMIT}"
FREE = ["trainer.deterministic=false", "trainer.dtype=bfloat16"]
CUDA = "trains on a CUDA device only; trainer.device=cpu is none; use model.attn_implementation=sdp"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["flash_attention_3", *FREE], [CUDA]),
        (["flash_attention_3"], [CUDA, "computes in bfloat16; got trainer.dtype=float32 and model",
                                 "flash_attention_3 varies even if told not to"]),
        (["flex_attention"], [CUDA, "torch promises nothing of flex_attention's kernels; use "]),
        (["flex_attention", "trainer.deterministic=false"], [CUDA]),
        ([PINNED], [CUDA, "computes in bfloat16", "pip install kernels", "allow_kernel_code=true",
                    f"nothing is known of {PINNED}; use"]),
        ([PINNED, *FREE], [CUDA, "pip install kernels", "with your rights; read it, then set"]),
        ([PINNED, *FREE, "model.allow_kernel_code=true"], [CUDA, "pip install kernels"]),
        (["sdpa_paged"], ["must be one of sdpa, eager, flex_attention, flash_attention_2"]),
    ],
)  # fmt: skip
def test_the_plan_says_what_cannot_be(
    words: list[str], told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_packages(monkeypatch, {"flash-attn-3": "3.0", "kernels": None})
    name, *others = words
    said = say("plan", f"model.attn_implementation={name}", "trainer.device=cpu", *others)
    assert said.code == 2, said
    for part in told:
        assert part in said.err
    assert len(said.err.splitlines()) == len(told), said.err


def with_packages(monkeypatch: pytest.MonkeyPatch, found: dict[str, str | None]) -> None:
    installed = versions.installed
    monkeypatch.setattr(
        versions, "installed", lambda name: found[name] if name in found else installed(name)
    )


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_may_be_cuda", lambda device: True)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("name", "is_pinned"),
    [
        (PINNED, True),
        (f"{PINNED}:flash_attn_func", True),
        ("kernels-community/flash-attn3", False),
        ("kernels-community/flash-attn3@v1", False),  # a tag, which its owner can move
        ("kernels-community/flash-attn3@main", False),
        (f"kernels-community/flash-attn3@{COMMIT[:12]}", False),
        (f"somebody/one/two@{COMMIT}", False),
    ],
)
def test_a_kernel_of_the_hub_is_taken_if_it_is_pinned_and_allowed(
    name: str, is_pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_packages(monkeypatch, {"kernels": "0.19"})
    words = [f"model.attn_implementation='{name}'", *FREE]
    allowed = kernels.errors(composed(*words, "model.allow_kernel_code=true"))
    assert [("40 hex digits" in line) for line in allowed] == [True] * (not is_pinned)
    (line,) = kernels.errors(composed(*words))[not is_pinned :]
    assert "model.allow_kernel_code=true" in line


@pytest.mark.usefixtures("on_a_gpu")
def test_flash_attention_2_repeats_itself_from_a_version_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = composed("model.attn_implementation=flash_attention_2", "trainer.dtype=bfloat16")
    with_packages(monkeypatch, {"flash-attn": "2.8.3"})
    assert kernels.errors(config) == []
    with_packages(monkeypatch, {"flash-attn": "2.4.0"})
    (line,) = kernels.errors(config)
    assert line.startswith("trainer.deterministic: ") and "2.4.1 has" in line


def test_permission_changes_no_run_id(tiny_folder: Callable[[str], Path]) -> None:
    words = ["model=local", f"model.path={tiny_folder('llama')}", "tracker=none"]
    ids = {
        plan.make(composed(*words, f"model.allow_kernel_code={word}")).run_id
        for word in ("true", "false")
    }
    assert len(ids) == 1


def test_a_plan_runs_no_kernel(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs names and shapes; transformers would fetch the kernel for those too."""

    def fetched(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("transformers loads a kernel")

    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", fetched)
    for name in (PINNED, "flash_attention_2", "flash_attention_3"):
        model = ModelConfig(path=str(tiny_folder("llama")), attn_implementation=name)
        built = loading.skeleton(model)
        assert why_padded(built) == (
            f"model.attn_implementation={name} is not called on parts of a batch"
        )


@pytest.mark.parametrize(
    ("config", "name", "told"),
    [
        (transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4),
         "flex_attention", "must be one that BloomForCausalLM has; got flex_attention; set "),
        (transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4),
         "flash_attention_2", "must be one that BloomForCausalLM has; got flash_attention_2; set"),
        (transformers.GptOssConfig(**SMALL, vocab_size=61, num_local_experts=2),
         "flash_attention_2", "transformers would run "),
    ],
)  # fmt: skip
def test_an_architecture_must_have_it(config: Any, name: str, told: str) -> None:
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert told in (kernels.misfit(built, name) or "")
    assert kernels.misfit(built, "eager") is None


def test_flash_attention_that_cannot_be_imported_is_no_kernel_of_the_hub(
    tiny_folder: Callable[[str], Path],
) -> None:
    """transformers would take one from there if the package kernels is installed."""
    model = ModelConfig(path=str(tiny_folder("llama")), attn_implementation="flash_attention_2")
    with pytest.raises(ConfigErrors, match="must be what transformers can import on this machine"):
        loading.load(model, "cpu")


def test_determinism_reaches_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads it from the environment (modeling_flash_attention_utils)."""
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    machine.configure_torch(composed("trainer.deterministic=false"))
    assert "FLASH_ATTENTION_DETERMINISTIC" not in os.environ
    machine.configure_torch(composed())
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
    machine.configure_torch(composed("trainer.deterministic=false"))  # the next run of a worker
    assert "FLASH_ATTENTION_DETERMINISTIC" not in os.environ


def test_which_attention_goes_end_to_end() -> None:
    words = ("model.attn_implementation=flex_attention", "trainer.deterministic=false")
    assert plan.make(composed(*SMOKE, *words)).padded is None
