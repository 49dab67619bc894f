"""plan --smoke: packs tried through the command line, and failures that a plan cannot see."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import composed

from lorabench import adapters, cli
from lorabench import model as base_model

TINY = ["tracker=none", "data.num_train=64", "data.num_validation=8", "data.num_test=8"]
GRID = ["head=exclude,lora,full", "lora.r=4,8"]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder and an empty folder for temporary files."""
    (tmp_path / "work").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


def nothing_is_left(places: Path) -> bool:
    return not [*(places / "work").iterdir(), *(places / "temporary").iterdir()]


@pytest.fixture(autouse=True)
def bases(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bases that a command loads."""
    loaded: list[Any] = []
    load = base_model.load_verified

    def remember(*arguments: Any) -> Any:
        loaded.append(load(*arguments))
        return loaded[-1]

    monkeypatch.setattr(base_model, "load_verified", remember)
    return loaded


def base_is_as_loaded(bases: list[Any], *words: str) -> bool:
    """The base that the command used, against a fresh one."""
    base = bases[-1]
    fresh = base_model.load(composed(*words).model, "cpu")
    return base_model.checksum(base) == base_model.checksum(fresh)


@pytest.mark.slow
def test_every_pack_trains_and_comes_back_and_nothing_is_left(
    places: Path, bases: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["plan", "-m", "--smoke", *TINY, *GRID, "trainer.warmup_steps=50"])
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("smoke")]
    assert code == 0 and "6 runs: 2 steps on 2 examples, adapters reloaded by plain PEFT" in line
    assert nothing_is_left(places) and base_is_as_loaded(bases)


@pytest.mark.slow
def test_smoke_as_json_has_one_entry_a_pack(
    places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["lora.use_dora=false,true", "lora.lora_dropout=0.1", "data.num_train=1"]
    code = cli.main(["plan", "-m", "--smoke", "--json", *TINY, *words])
    content = json.loads(capsys.readouterr().out)
    assert code == 0 and len(content["packs"]) == len(content["smoke"]) == 2  # DoRA trains alone
    assert [tried["runs"] for tried in content["smoke"]] == content["packs"]
    for tried in content["smoke"]:
        assert tried["error"] is None and tried["seconds"] > 0
        assert tried["logits_difference"] < 1e-4  # its own bound for float32
    assert nothing_is_left(places)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_init_that_changes_the_base_comes_back_too(init: str) -> None:
    assert cli.main(["plan", "--smoke", *TINY, f"lora.init={init}", "lora.r=4"]) == 0


@pytest.mark.slow
def test_trained_biases_come_back_and_leave_the_base(
    bases: list[Any], tiny_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["model=local", f"model.path={tiny_folder('gpt2')}"]
    assert cli.main(["plan", "-m", "--smoke", *TINY, *model, "lora.bias=all,lora_only"]) == 0
    assert "2 runs: 2 steps" in capsys.readouterr().out
    assert base_is_as_loaded(bases, *model)


@pytest.mark.parametrize("flags", [[], ["--smoke"]])
def test_examples_that_are_all_too_long_fail_before_the_day_of_gpu(
    flags: list[str], places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *flags, *TINY, "data.max_length=3"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("data.max_length: must let at least one of")
    assert nothing_is_left(places)


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["lora.r=4,8", "lora.init=olora"])  # a pack; alone
def test_every_stage_is_tried(
    lora: str, places: Path, bases: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second stage begins at step 100, and breaks the run in its first step."""
    shipped = Path(__file__).parent.parent / "conf" / "stages" / "last_layer_first.yaml"
    (places / "conf" / "stages").mkdir(parents=True)
    breaking = places / "conf" / "stages" / "breaking.yaml"
    breaking.write_text(shipped.read_text().replace("lr_scale: 0.5", "lr_scale: 1.0e30"))
    words = ["plan", "-m", "--smoke", *TINY, lora, f"hydra.searchpath=[file://{places / 'conf'}]"]
    assert cli.main([*words, "stages=last_layer_first"]) == 0
    assert "4 steps through every stage on 2 examples" in capsys.readouterr().out
    assert cli.main([*words, "stages=breaking"]) == 1
    assert "loss or gradient is not finite at step 4" in capsys.readouterr().out
    assert nothing_is_left(places) and base_is_as_loaded(bases)


@pytest.mark.slow
def test_broken_weights_fail_and_the_other_packs_are_tried(
    tiny_folder: Callable[[str], Path], places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = places / "base"
    shutil.copytree(tiny_folder("llama"), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    whole = tiny_folder("llama")
    words = ["model=local", f"model.path={broken},{whole}", "seed=0,1"]
    code = cli.main(["plan", "-m", "--smoke", *TINY, *words])
    lines = [one for one in capsys.readouterr().out.splitlines() if one.startswith("smoke")]
    assert code == 1 and len(lines) == 2
    assert sum("2 runs: failed: " in line for line in lines) == 1
    assert sum("2 runs: 2 steps on 2 examples" in line for line in lines) == 1
    assert nothing_is_left(places)


def double_alpha(tensors: Any, settings: Any) -> tuple[Any, Any]:
    settings.lora_alpha *= 2
    return tensors, settings


def flip_one(tensors: Any, settings: Any) -> tuple[Any, Any]:
    name = next(name for name in tensors if "lora_B" in name)
    return tensors | {name: tensors[name] * 1.001}, settings


def lose_one(tensors: Any, settings: Any) -> tuple[Any, Any]:
    settings.target_modules = sorted(settings.target_modules)[1:]
    return tensors, settings


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (double_alpha, "logits of the reloaded adapter are off by"),
        (flip_one, "comes back with other values"),
        (lose_one, "PEFT does not read what was saved"),
    ],
)
@pytest.mark.parametrize("head", ["exclude", "lora"])
def test_an_adapter_that_comes_back_different_is_seen(
    spoil: Callable[..., Any], said: str, head: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    save = adapters.save
    monkeypatch.setattr(
        adapters, "save", lambda tensors, settings, to: save(*spoil(tensors, settings), to)
    )
    assert cli.main(["plan", "--smoke", *TINY, f"head={head}"]) == 1
    assert said in capsys.readouterr().out
