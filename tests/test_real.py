"""A pack on a real pretrained model: its gradients against stock PEFT's. `pytest -m real`."""

from __future__ import annotations

from pathlib import Path

import pytest
import stock
from conftest import composed
from equality import compare_gradients

from lorabench import model as base_model

MODEL = Path(__file__).parents[1] / "outputs" / "smollm2-135m-instruct-q4_1"


@pytest.mark.real
def test_gradients_on_a_real_model_equal_stock_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty layers, three tokens per head group, a tied head of 49,152 tokens: no toy shapes."""
    assert MODEL.exists(), "build it: python benchmarks/real.py --build-only"
    words = [
        "experiment=real", f"model.path={MODEL}", "tracker=none", "data.num_train=16",
        "trainer.steps=3", "trainer.warmup_steps=0", "trainer.batch_size=2",
    ]  # fmt: skip
    configs = [
        composed(*words, "head=exclude", "lora.r=4", "seed=0"),
        composed(*words, "head=lora", "lora.r=16", "seed=1", "lora.use_rslora=true"),
    ]
    tokenizer = base_model.tokenizer(configs[0].model)
    monkeypatch.setattr(stock, "embedded_tokenizer", lambda: tokenizer)
    worst, name = compare_gradients(configs, [0, 2])
    # Ten times the bound of the tiny models, which have 2 layers in place of 30: float32 roundings
    # (6e-8) of as many more products behind one another.
    assert worst <= 1e-4, name
