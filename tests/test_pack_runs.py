"""Packs from the command line: saved adapters, runs that train alone, resuming, memory."""

from __future__ import annotations

import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed, recorded_runs, scores
from processes import running, slowly, wait_for
from stock import TINY
from torch import Tensor, nn

from lorabench import checkpoint, cli, data, plan, versions
from lorabench import model as base_model
from lorabench.config import ConfigErrors
from lorabench.pack import StackedPack

FAST = [*TINY, "trainer.num_threads=1", "trainer.batch_size=2", "target_modules=attention"]


# --- the saved adapters ----------------------------------------------------------------------


def test_each_adapter_holds_its_own_keys_and_reloads_to_the_recorded_nll(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from safetensors.torch import load_file

    words = ["lora.r=4,8", "head=exclude,lora,full", "trainer.steps=20", "data.num_test=40"]
    assert cli.main(["train", "-m", *FAST, *words, f"output_dir={tmp_path}"]) == 0
    config = composed(*FAST, "data.num_test=40")
    tokenizer = base_model.tokenizer(config.model)
    tokens = data.tokenise(data.load(config.data).test, tokenizer, config.data)
    length = max(map(len, tokens.input_ids))
    ids, labels = map(
        torch.from_numpy, data.batch(tokens, range(40), length, data.pad_id(tokenizer))
    )
    found = recorded_runs(tmp_path)
    assert len(found) == 6
    for folder, record in found:
        assert record["plan"]["pack"]["size"] == 6
        state = load_file(folder / "adapter" / "adapter_model.safetensors")
        # From the plan alone: two tensors a module, one a saved module; no mate's.
        modules, r = record["plan"]["lora_modules"], record["config"]["lora"]["r"]
        saved = record["plan"]["saved_modules"]
        assert ("lm_head" in modules, saved == ["lm_head"]) == (
            record["config"]["head"]["policy"] == "lora",
            record["config"]["head"]["policy"] == "full",
        )
        keys = {f"base_model.model.{m}.lora_{x}.weight" for m in modules for x in "AB"}
        keys |= {f"base_model.model.{m}.weight" for m in saved}
        assert set(state) == keys
        assert all(t.shape[0] == r for name, t in state.items() if ".lora_A." in name)
        assert sum(t.numel() for t in state.values()) == record["plan"]["trainable_parameters"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tied layers
            model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
        with torch.no_grad():
            logits = torch.cat([model(input_ids=part).logits[:, :-1] for part in ids.split(32)])
        nll = nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
        )
        value = float((nll.double().sum(1) / (labels[:, 1:] != -100).sum(1)).mean())
        # The bound: float32, the same examples, GEMMs of other shapes.
        assert abs(scores(record)["test"]["nll"]["value"] - value) < 1e-6


# --- what does not pack ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["lora.use_dora=true"], "DoRA"),
        (["lora.init=pissa"], "pissa"),
        (["target_modules=custom", "target_modules.names=[embed_tokens,q_proj]"], "Embedding"),
        (["model=local", "model.path=MOE", "target_modules=attention"], "experts"),
        (["model=local", "model.path=BERT", "head=full", "lora.bias=all"], "saves untrained"),
        (["model=local", "model.path=NEMOTRON", "lora.bias=all"], "LayerNorm1P"),  # scales by w + 1
    ],
)
def test_what_does_not_pack_trains_alone_and_says_why(
    words: list[str],
    reason: str,
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    kinds = {"MOE": "mixtral", "BERT": "bert", "NEMOTRON": "nemotron"}
    pattern = "|".join(kinds)
    words = [re.sub(pattern, lambda found: str(tiny_folder(kinds[found[0]])), w) for w in words]
    arguments = [*FAST, *words, "trainer.steps=3", "lora.r=4"]
    if reason == "experts" and (too_old := versions.too_old_for_experts()):
        with pytest.raises(ConfigErrors, match=re.escape(too_old)):
            plan.make(composed(*arguments))
        return
    alone = plan.make(composed(*arguments)).alone
    assert alone is not None and reason in alone
    sweep = ["lora.lora_alpha=4,8", f"output_dir={tmp_path}"]
    assert cli.main(["train", "-m", *arguments, *sweep]) == 0
    found = recorded_runs(tmp_path)
    assert [r["status"] for _, r in found] == ["finished"] * 2
    for _, record in found:
        assert record["plan"]["pack"]["size"] == 1 and record["plan"]["pack"]["alone"] == alone


# --- resume, memory --------------------------------------------------------------------------

TWO = ["head=exclude,lora", "lora.r=4", "lora.lora_dropout=0.1"]


def outcome(folder: Path) -> dict[str, Any]:
    """What must be the same of every run, by its id."""
    return {r["run_id"]: (r["status"], r["hashes"], scores(r)) for _, r in recorded_runs(folder)}


def test_a_killed_pack_resumes_to_the_same_bits(tmp_path: Path) -> None:
    arguments = [*FAST, *TWO, "trainer.steps=12", "trainer.checkpoint_every=2"]
    killed = tmp_path / "killed"

    def saved() -> bool:
        assert process.poll() is None, process.said
        return len(list(killed.glob("*/*/checkpoint/checkpoint.json"))) == 2

    words = ["train", "-m", *arguments, f"output_dir={killed}"]
    with running(tmp_path, *words, before=slowly) as process:
        wait_for(saved)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert [r["status"] for _, r in recorded_runs(killed)] == ["running"] * 2
    assert cli.main(["train", "-m", *arguments, f"output_dir={killed}"]) == 0
    assert cli.main(["train", "-m", *arguments, f"output_dir={tmp_path / 'whole'}"]) == 0
    assert outcome(killed) == outcome(tmp_path / "whole")
    assert [r["plan"]["pack"]["size"] for _, r in recorded_runs(killed)] == [2, 2]


def test_members_a_step_apart_resume_at_the_step_they_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", "-m", *FAST, *TWO, "trainer.steps=8", "trainer.checkpoint_every=1"]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert cli.main([*arguments, f"output_dir={whole}"]) == 0
    commit, calls = checkpoint.commit, iter(range(10**6))

    def die_between(*arguments: Any) -> None:
        if next(calls) == 2 * 4 + 1:  # the second member's fifth
            raise RuntimeError("power cut")
        commit(*arguments)

    monkeypatch.setattr(checkpoint, "commit", die_between)
    assert cli.main([*arguments, f"output_dir={torn}"]) != 0
    monkeypatch.undo()
    steps = sorted(sorted(checkpoint.steps(f / "checkpoint")) for f, _ in recorded_runs(torn))
    assert steps == [[3, 4], [4, 5]]
    resumed: list[int] = []
    from lorabench.progress import Display

    monkeypatch.setattr(Display, "resumed", lambda self, steps: resumed.append(steps))
    assert cli.main([*arguments, f"output_dir={torn}"]) == 0
    assert resumed == [2 * 4]
    assert outcome(torn) == outcome(whole)


def test_out_of_memory_at_the_first_step_halves_the_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, sizes = StackedPack.forward_backward, []

    def forward_backward(self: StackedPack, step: int, *rest: Any) -> Tensor:
        if step == 0:
            sizes.append(self.size)
        if self.size > 2:
            raise torch.OutOfMemoryError("out of memory")
        return inner(self, step, *rest)

    monkeypatch.setattr(StackedPack, "forward_backward", forward_backward)
    words = ["lora.r=2,3,4,5,6", "trainer.steps=2", f"output_dir={tmp_path}"]
    assert cli.main(["train", "-m", *FAST, *words]) == 0
    assert sizes == [5, 3, 2, 1, 2]
    found = recorded_runs(tmp_path)
    assert [r["status"] for _, r in found] == ["finished"] * 5
    assert sorted(r["plan"]["pack"]["size"] for _, r in found) == [1, 2, 2, 2, 2]
