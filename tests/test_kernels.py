"""Names of attention implementations: what this machine has, and what repeats itself."""

from __future__ import annotations

import os

import pytest
from conftest import SMOKE, composed, say

from lorabench import machine, plan, versions
from lorabench.model import kernels

PINNED = "kernels-community/flash-attn3@v1"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["flash_attention_3"], ["needs a CUDA device; trainer.device=cpu has none"]),
        (["flex_attention"], ["flex_attention does not; use model.attn_implementation=sdpa, or"]),
        (["flex_attention", "trainer.deterministic=false"], []),
        (["kernels-community/flash-attn3"], ["must name its revision", "needs a CUDA device",
                                             "kernels is not installed", "does not; use"]),
        ([PINNED, "trainer.deterministic=false"], ["needs a CUDA device", "pip install kernels"]),
        (["somebody/one/two"], ["must be named ORG/NAME@REVISION; got somebody/one/two"]),
        (["sdpa_paged"], ["must be one of sdpa, eager, flex_attention, flash_attention_2"]),
    ],
)  # fmt: skip
def test_the_plan_says_what_cannot_be(
    words: list[str], told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = versions.installed
    monkeypatch.setattr(
        versions, "installed", lambda name: "3.0" if name == "flash-attn-3" else installed(name)
    )
    name, *others = words
    said = say("plan", f"model.attn_implementation={name}", "trainer.device=cpu", *others)
    assert said.code == (2 if told else 0), said
    for part in told:
        assert part in said.err
    if told:
        assert len(said.lines) == max(len(told), 2 if "somebody" in name else 1), said.err


def test_a_pinned_kernel_on_a_gpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_may_be_cuda", lambda device: True)
    monkeypatch.setattr(versions, "installed", lambda name: "1.0")
    words = (f"model.attn_implementation={PINNED}", "trainer.deterministic=false")
    assert kernels.errors(composed(*words)) == []
    assert kernels.errors(composed(words[0])) != []


def test_determinism_reaches_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads it from the environment (modeling_flash_attention_utils)."""
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    machine.configure_torch(composed("trainer.deterministic=false"))
    assert "FLASH_ATTENTION_DETERMINISTIC" not in os.environ
    machine.configure_torch(composed())
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"


def test_flex_attention_is_padded_and_said_so() -> None:
    words = ("model.attn_implementation=flex_attention", "trainer.deterministic=false")
    made = plan.make(composed(*SMOKE, *words))
    assert made.padded == (
        "model.attn_implementation=flex_attention is not called on parts of a batch"
    )
