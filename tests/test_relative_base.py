"""A base by a relative path is found from any other folder."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT_RUN, recorded_runs, say


def by_auto_peft(adapter: Path | str) -> Any:
    """An adapter on the base that its config names, by PEFT alone."""
    from peft import AutoPeftModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers in deprecated words
        return AutoPeftModelForCausalLM.from_pretrained(adapter)


def test_records_and_adapters_name_a_relative_base_for_any_folder(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    base = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    said = say("train", "model=local", "model.path=base", *SHORT_RUN, "output_dir=out")
    assert said.code == 0, said.err
    ((run, record),) = recorded_runs(tmp_path / "out")
    assert record["config"]["model"]["path"] == str(base)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    by_auto_peft(run / "adapter")  # finds the base by its name
    assert say("export", run, "--to", "merged", "merged").code == 0

    # Moved, it is looked for where export is told to, and named so in what it writes.
    moved = base.rename(tmp_path / "moved")
    said = say("export", run, "--to", "adapter", "adapter")
    assert said.code == 2 and f"no folder '{base}', seen from {elsewhere}" in said.err
    assert said.err.endswith("give its place with model.path=FOLDER\n")
    said = say("export", run, "--to", "adapter", "adapter", "model.path=../moved")
    assert said.code == 0, said.err
    again = by_auto_peft("adapter")
    report = json.loads((elsewhere / "adapter" / "export.json").read_text())
    assert report["base"]["path"] == str(moved)
    ids = torch.arange(5, 15)[None]
    merged = AutoModelForCausalLM.from_pretrained("merged")
    with torch.no_grad():
        # Two ways to the same logits in float32: merged before, or added beside the layer.
        torch.testing.assert_close(
            again(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )


def test_another_base_in_the_new_place_is_refused(
    trained: Callable[..., Path], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    run = trained("llama")
    place = f"model.path={tiny_folder('qwen2')}"
    said = say("export", run, "--to", "merged", tmp_path / "m", place)
    assert said.code == 2 and "must be the base run" in said.err and not (tmp_path / "m").exists()


def test_a_relative_base_of_an_old_record_is_no_hub_id(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of before this version keep the path as it was typed."""
    from lorabench.config import ConfigErrors
    from lorabench.export.source import Run, check_base, open_run

    found = open_run(trained("llama"))
    base = Path(found.config.model.path)
    monkeypatch.chdir(tmp_path)
    found.config.model.path = base.name
    with pytest.raises(ConfigErrors, match=f"no folder '{base.name}', seen from {tmp_path}; give"):
        check_base(found)
    check_base(Run(found.folder, found.entry, found.config, str(base)))
