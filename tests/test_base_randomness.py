"""Nothing random stays in the base: only lora_dropout acts in training."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from equality import differences
from stock import TINY, Stock, copy_of, train_pack

from lorabench import model as base_model
from lorabench import plan, versions
from lorabench.pack import ModulePack, StackedPack


def parts(config: Any) -> Iterator[Any]:
    from transformers import PreTrainedConfig

    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from parts(value)


def test_every_rate_of_transformers_configs_is_known_by_its_name() -> None:
    """Fails where transformers has a random setting under a name of another kind."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    built = {
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    seen = set()
    for name in sorted(built & set(CONFIG_MAPPING)):
        try:
            config = CONFIG_MAPPING[name]()
        except Exception:  # some have no default
            continue
        for part in parts(config):
            for key, value in list(vars(part).items()):
                random = re.search("drop|jitter|noise|stochastic|random", key)
                if random and (value is None or isinstance(value, float)):
                    vars(part)[key] = 0.5
                    known = {one.rpartition(".")[2] for one in base_model.random_settings(config)}
                    assert key in known, f"{name}: {key}"
                    seen.add(key)
    # Other words than dropout, some of them in a part of the config: the loop met them.
    assert seen >= {"layerdrop", "attn_pdrop", "router_jitter_noise", "moe_jitter_eps"}


def test_a_rate_in_a_part_of_the_config_is_switched_off(tmp_path: Path) -> None:
    from transformers import DbrxConfig

    config = DbrxConfig(ffn_config={"moe_jitter_eps": 0.1}, resid_pdrop=0.2)
    config.save_pretrained(tmp_path)
    assert base_model.random_settings(config) == {
        "ffn_config.moe_jitter_eps": 0.1, "resid_pdrop": 0.2
    }  # fmt: skip
    loaded = base_model.architecture(composed("model=local", f"model.path={tmp_path}").model)
    assert base_model.random_settings(loaded) == {}
    assert loaded.ffn_config.moe_jitter_eps == loaded.resid_pdrop == 0


def with_entries(folder: Path, to: Path, **entries: object) -> Path:
    shutil.copytree(folder, to)
    content = json.loads((to / "config.json").read_text()) | entries
    (to / "config.json").write_text(json.dumps(content))
    return to


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        ("opt", {"layerdrop": 0.5, "dropout": 0.1}),
        ("mixtral", {"router_jitter_noise": 0.1, "attention_dropout": 0.1}),
    ],
)
def test_random_settings_of_a_base_change_nothing(
    kind: str, entries: dict[str, Any], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same bits under other global seeds, and what stock PEFT trains with these at zero."""
    if kind == "mixtral" and versions.too_old_for_experts():
        return
    folder = with_entries(tiny_folder(kind), tmp_path / kind, **entries)
    words = [*TINY, "model=local", "target_modules=attention", "trainer.steps=6", "lora.r=4"]
    configs = [composed(*words, f"model.path={folder}", f"seeds.init={i}") for i in (0, 1)]
    plans = [plan.make(config) for config in configs]
    warned = [line for line in plans[0].warnings if "switched off" in line]
    assert len(warned) == len(entries), warned

    def trained(seed: int) -> tuple[Any, list[dict[str, torch.Tensor]], list[list[float]]]:
        torch.manual_seed(seed)
        base = base_model.load(configs[0].model, "cpu")
        if plans[0].alone:
            pack: Any = ModulePack(base, configs[0], plans[0].lora_modules, "cpu")
        else:
            modules = [one.lora_modules for one in plans]
            pack = StackedPack(base, plan.skeleton(configs[0].model), configs, modules, "cpu")
        initial = [copy_of(pack.adapter_state(run)) for run in range(pack.size)]
        return pack, initial, train_pack(pack)

    (pack, initial, losses), (again, _, same) = trained(1), trained(2)
    assert losses == same
    for run in range(pack.size):
        ours, other = pack.adapter_state(run), again.adapter_state(run)
        assert all(torch.equal(ours[name], other[name]) for name in ours)
    zero = tiny_folder(kind)
    content = json.loads((zero / "config.json").read_text())
    assert not content.get("layerdrop") and not content.get("router_jitter_noise")
    untouched = [composed(*words, f"model.path={zero}", f"seeds.init={i}") for i in (0, 1)]
    stocks = [Stock(*pair) for pair in zip(untouched, initial, strict=False)]
    worst_loss, (worst, name) = differences(
        pack, initial, losses, ((stock, stock.train()) for stock in stocks)
    )
    # Float32 rounding (6e-8) of GEMMs of other shapes, grown by six AdamW steps. A single layer
    # dropped, or noise of 0.1, is off by 1e-2.
    assert worst_loss < 1e-5 and worst < 1e-4, name
