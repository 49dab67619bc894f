"""What a CUDA device could do otherwise: the same comparisons, on it. `pytest -m gpu`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMOKE, composed, recorded_runs, say, scores
from equality import compare_gradients, compare_training
from stock import Stock, copy_of, mixture, packed, train_pack

from lorabench import data
from lorabench.pack import Batch

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize("kind", ["gemma", "qwen2", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_float64_steps_equal_stock_peft(
    kind: str, dropout: float, tiny_folder: Callable[[str], Path]
) -> None:
    words = ("model.dtype=float64", "trainer.dtype=float64", "trainer.steps=20")
    loss, (weights, name) = compare_training(
        mixture(kind, tiny_folder(kind), dropout, *words), DEVICE
    )
    assert loss < 1e-10  # float64 sums in another order, as on a CPU
    assert weights < 1e-9, name


@pytest.mark.parametrize("kind", ["gemma", "llama", "gpt2"])
def test_float32_gradients_equal_stock_peft(kind: str, tiny_folder: Callable[[str], Path]) -> None:
    assert torch.get_float32_matmul_precision() == "highest", "no TF32"
    configs = mixture(kind, tiny_folder(kind), 0.1, "trainer.steps=11")
    worst, name = compare_gradients(configs, [0, 10], DEVICE)
    assert worst <= 1e-5, name  # a few hundred float32 roundings (6e-8) behind one another


def test_bfloat16_losses_are_stock_pefts(tiny_folder: Callable[[str], Path]) -> None:
    configs = mixture("llama", tiny_folder("llama"), 0.1, "trainer.dtype=bfloat16")
    for config in configs:
        config.trainer.steps = 12
    pack = packed(configs, DEVICE)
    train_pack(pack)
    stocks = [Stock(one, copy_of(pack.adapter_state(i)), DEVICE) for i, one in enumerate(configs)]
    pairs = [data.batch(s.tokens, s.order[11], s.length, s.pad_id) for s in stocks]
    slabs = [1] * len(pairs)
    batch = Batch.make([ids for ids, _ in pairs], [labels for _, labels in pairs], slabs)
    counts = [int((labels != data.IGNORED).sum()) for _, labels in pairs]
    losses = pack.forward_backward(11, 0, batch, counts).tolist()
    for loss, stock in zip(losses, stocks, strict=True):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert loss == pytest.approx(stock.loss(11), rel=5e-3)  # bfloat16: 2^-9 a rounding


def test_mates_do_not_change_a_runs_bits(tiny_folder: Callable[[str], Path]) -> None:
    def adapter_of_the_first(mate_seed: int) -> dict[str, torch.Tensor]:
        common = ("model=local", f"model.path={tiny_folder('llama')}", "trainer.steps=5")
        seeds = (0, mate_seed)
        one_batch = (*SMOKE, *common, "lora.r=8", "seeds.data=0")
        configs = [composed(*one_batch, f"seed={seed}") for seed in seeds]
        pack = packed(configs, DEVICE)
        train_pack(pack)
        return copy_of(pack.adapter_state(0))

    one, other = adapter_of_the_first(1), adapter_of_the_first(2)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sweep_by_the_command_line_repeats_itself(dtype: str, tmp_path: Path) -> None:
    """And its adapter, in plain PEFT on the CPU, has the recorded nll."""

    def sweep(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
        grid = ("head=exclude,lora", "lora.r=4,8")
        words = (f"trainer.device={DEVICE}", f"trainer.dtype={dtype}", f"output_dir={folder}")
        said = say("train", "-m", *SMOKE, *grid, *words, "trainer.steps=6")
        assert said.code == 0, said.err
        return recorded_runs(folder)

    first, second = sweep(tmp_path / "one"), sweep(tmp_path / "two")
    assert len(first) == 4
    for (folder, record), (_, again) in zip(first, second, strict=True):
        assert record["status"] == "finished"
        assert record["plan"]["pack"]["size"] == 4
        assert record["hashes"] == again["hashes"]
        # On the CPU the sums have another order; under autocast each product rounds by 2^-9.
        bound = 1e-4 if dtype == "float32" else 2e-2
        assert plain_nll(folder, record) == pytest.approx(
            scores(record)["test"]["nll"]["value"], rel=bound
        )


def plain_nll(folder: Path, record: dict[str, Any]) -> float:
    """Of the test examples, by transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lorabench import model as base_model

    config = composed(*SMOKE)
    tokenizer = base_model.tokenizer(config.model)
    test = data.tokenise(data.load(config.data).test, tokenizer, config.data)
    base = AutoModelForCausalLM.from_pretrained(base_model.location(config.model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied layers
        model = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    values = []
    count = scores(record)["test"]["nll"]["num_examples"]
    tokens = test.first(count)
    for ids, start in zip(tokens.input_ids, tokens.completion_start, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(ids)])).logits[0, :-1].double()
        targets = torch.tensor(list(ids))[1:]
        nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        values.append(float(nll[start - 1 :].mean()))
    return sum(values) / count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_go_to_the_device_without_a_copy_on_the_host(dtype: str, tmp_path: Path) -> None:
    """Also where they are cast: a copy in bfloat16 of all weights would be half of the file."""
    import threading

    from transformers import AutoModelForCausalLM, LlamaConfig

    from lorabench import model as base_model
    from lorabench.config import ModelConfig

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="200MB")
    torch.zeros(1, device=DEVICE)  # the context takes memory of its own
    before = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    base = base_model.load(ModelConfig(path=str(tmp_path), dtype=dtype), DEVICE)
    done.set()
    watcher.join()
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert {p.device.type for p in base.parameters()} == {"cuda"}
    assert not any(hasattr(module, "_hf_hook") for module in base.modules())
    # One tensor at a time per loading thread, the largest of 131 MB, beside the interpreter's own.
    assert peak - before < 0.4 * stored
