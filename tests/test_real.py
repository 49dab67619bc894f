"""`make real`: a pack's gradients on its model against stock PEFT's, and what its page says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import stock
from conftest import composed, predictions, records, say
from equality import compare_gradients

from lorabench import model as base_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODEL = Path(__file__).parents[1] / "outputs" / "smollm2-135m-instruct-q4_1"


@pytest.mark.real
def test_gradients_on_a_real_model_equal_stock_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty layers, nine heads over three keys, a tied head of 49,152 tokens: no toy shapes."""
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
    # Three times the bound of the tiny models (1e-5), which have 2 layers in place of 30: more
    # float32 roundings (6e-8) behind one another. Measured: 5.5e-6.
    assert worst <= 3e-5, name


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import real

    return real


def test_settings_are_compared_with_the_base_example_by_example(real: Any, tmp_path: Path) -> None:
    words = ["data.num_train=16", "data.num_validation=4", "data.num_test=12", "trainer.steps=4"]
    words += ["trainer.batch_size=2", "lora.r=2", "tracker=none", f"output_dir={tmp_path}"]
    assert say("train", "-m", *words, "head=exclude,lora", "seed=0,1", "trainer.lr=1e-3").code == 0
    folder = tmp_path / "default"
    (base,) = (pd.read_parquet(path) for path in (folder / "base").glob("*.parquet"))
    expected: dict[str, list[float]] = {}
    for run, record in records(tmp_path).items():
        scored = pd.read_parquet(predictions(folder / run)).merge(base, on=["split", "example"])
        scored = scored[scored.split == "test"]
        policy = record["config"]["head"]["policy"]
        expected.setdefault(policy, []).append((scored.nll_y - scored.nll_x).mean())
        assert len(scored) == 12
    verdicts = real.against_base(folder, "nll")
    assert len(verdicts) == 2 and len(expected) == 2
    for is_better, text in verdicts:
        policy = text.split(",")[0].removeprefix("head.policy=")
        mean = sum(expected[policy]) / 2
        gain = float(text.partition("untrained base by ")[2].split()[0])
        assert gain == pytest.approx(mean, abs=0.06), text  # rounded to what its interval tells
        assert is_better == (" beats " in text)
        assert text.endswith("2 seeds, 12 examples")


def test_the_page_keeps_its_other_sections(real: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Experiments\n\n## rank\n\ntext\n\n## real\n\nold\n")
    for _ in range(2):
        real.put_section(page, "\n## real\n\nnew\n".lstrip("\n"))
        assert page.read_text() == "# Experiments\n\n## rank\n\ntext\n\n## real\n\nnew\n"
