"""The untrained base is scored once per sweep: against stock transformers, without an adapter."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import composed, predictions, records, say
from processes import running, wait_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorabench import base_scores, data, record
from lorabench import model as base_model
from lorabench.base_scores import BaseEvaluation, base_evaluations
from lorabench.evaluate import evaluate
from lorabench.pack import ModulePack
from lorabench.record import find
from lorabench.sweep import SweepFolder

FAST = [
    "tracker=none", "data.num_train=32", "data.num_validation=4", "data.num_test=12", "lora.r=2",
    "target_modules=attention", "trainer.batch_size=2", "trainer.num_threads=1", "trainer.steps=2",
    "data.skills=[sort,double]",  # known to the base, with some mistakes
]  # fmt: skip
ANSWERS = [
    "data.metric=[nll,nll_per_token,exact_match,answer]", "data.answer_pattern='[a-z]+'",
    "data.answer_examples=8", "data.answer_max_new_tokens=12",
]  # fmt: skip
GRID = ["head=exclude,lora"]
WORDS = ["train", "-m", *FAST, *ANSWERS, *GRID]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with a packed sweep, and a run that trains alone; not to be changed."""
    out = tmp_path_factory.mktemp("swept")
    said = say(*WORDS, f"output_dir={out}")
    assert said.code == 0, said.err
    assert sum(line.startswith("untrained base tiny-gemma  nll ") for line in said.lines) == 1
    said = say("train", *FAST, *ANSWERS, "lora.init=pissa", f"output_dir={out}")
    assert said.code == 0 and "untrained base" not in said.err, "it has been scored"
    return out


@pytest.fixture
def sweep(swept: Path, tmp_path: Path) -> Path:
    """A copy of the sweep folder."""
    shutil.copytree(swept, tmp_path / "out")
    return tmp_path / "out" / "default"


def stamps(sweep: Path) -> dict[str, int]:
    """When each file of base/ was written."""
    return {path.name: path.stat().st_mtime_ns for path in (sweep / "base").iterdir()}


def scores(entry: BaseEvaluation) -> dict[str, Any]:
    """The values of an entry, without times."""
    return {split: one.model_dump() for split, one in entry.evaluation.splits.items()}


def stock(
    folder: str, tokens: data.Tokens, answers: int = 0, new: int = 0, **options: Any
) -> tuple[list[float], list[int], list[list[int]]]:
    """Scores by stock transformers, example by example: nll, exact match, generations.

    Args:
        answers: examples to generate for.
        new: tokens of each generation, at most.
        options: for the loader.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    nll, exact, written = [], [], []
    for i, (one, start) in enumerate(zip(tokens.input_ids, tokens.completion_start, strict=True)):
        ids = torch.tensor([one])
        labels = ids.clone()
        labels[:, :start] = -100
        with torch.no_grad():
            found = model(input_ids=ids, labels=labels)
        nll.append(found.loss.item())
        exact.append(int(torch.equal(found.logits[0, start - 1 : -1].argmax(-1), ids[0, start:])))
        if i < answers:
            prompt = ids[:, :start]
            mask = torch.ones_like(prompt)
            out = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=new)
            written.append(out[0, start:].tolist())
    return nll, exact, written


def test_scores_are_those_of_stock_transformers(swept: Path) -> None:
    (entry,) = base_evaluations(swept / "default")
    config = composed(*FAST, *ANSWERS)
    folder = base_model.location(config.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    split = data.load(config.data)
    table = pd.read_parquet(swept / "default" / "base" / entry.evaluation.predictions)
    for name, examples in (("validation", split.validation), ("test", split.test)):
        rows = table.query("split == @name").reset_index()
        tokens = data.tokenise(examples, tokenizer, config.data)
        nll, exact, written = stock(folder, tokens, 8 if name == "test" else 0, new=12)
        assert rows.example.tolist() == tokens.ids
        # float32 in batches of other lengths: rounding of a loss near 10.
        np.testing.assert_allclose(rows.nll, nll, rtol=2e-5, atol=1e-6)
        assert rows.exact_match.tolist() == exact
        metrics = entry.evaluation.splits[name].metrics
        assert metrics["nll"].value == pytest.approx(rows.nll.mean(), rel=1e-12)
        assert metrics["exact_match"].value == pytest.approx(rows.exact_match.mean(), rel=1e-12)
        weighted = np.average(rows.nll, weights=rows.num_tokens)
        assert metrics["nll_per_token"].value == pytest.approx(weighted, rel=1e-12)
        if name == "test":
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            assert rows.generated[:8].tolist() == texts and rows.generated[8:].isna().all()
            assert 0 < metrics["answer"].value < 1 and 0 < sum(exact) < len(exact), "both occur"


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "gemma2", "qwen3_moe"])
def test_any_architecture_is_scored_as_stock_transformers_scores_it(
    kind: str, tiny_folder: Callable[[str], Path]
) -> None:
    """End to end, padded (Bloom), soft-capped, with experts; and the base is left alone."""
    words = ["model=local", f"model.path={tiny_folder(kind)}", "model.attn_implementation=eager"]
    config = composed(*FAST, *words)
    base = base_model.load(config.model, "cpu")
    before = base_model.checksum(base), repr(base), base.training
    tokenizer = base_model.tokenizer(config.model)
    tokens = data.tokenise(data.load(config.data).test, tokenizer, config.data)
    pack = ModulePack.of_base(base, config, "cpu")
    (table,) = evaluate(pack, tokens, tokenizer, data.pad_id(tokenizer), ["nll", "exact_match"])
    nll, exact, _ = stock(str(tiny_folder(kind)), tokens, attn_implementation="eager")
    np.testing.assert_allclose(table["nll"].to_numpy(), nll, rtol=2e-5, atol=1e-6)  # as above
    assert table["exact_match"].to_pylist() == exact
    assert (base_model.checksum(base), repr(base), base.training) == before


def test_an_entry_goes_with_every_run_of_the_sweep(swept: Path) -> None:
    """What `compare` needs: the same base, evaluation, tokens, examples and columns."""
    sweep = swept / "default"
    (entry,) = base_evaluations(sweep)
    place = sweep / base_scores.FOLDER / entry.evaluation.predictions
    assert {path.name for path in place.parent.iterdir()} == {f"{entry.id}.json", place.name}
    runs = list(find(sweep))
    assert len(runs) == 3, "the folder of the base is no run"
    for path, run in runs:
        assert entry.is_of(run) and base_scores.why_none(run.config) is None
        (evaluation,) = run.evaluations
        assert evaluation.id == entry.evaluation.id
        for split, one in evaluation.splits.items():
            assert one.tokens == entry.evaluation.splits[split].tokens
        mine, theirs = pd.read_parquet(place), pd.read_parquet(predictions(path))
        assert list(mine.columns) == list(theirs.columns)
        assert mine.example.tolist() == theirs.example.tolist()
        other = run.model_copy(update={"hashes": run.hashes | {"base": "another"}})
        assert not entry.is_of(other)
        longer = run.config | {"data": run.config["data"] | {"max_length": 99}}
        assert not entry.is_of(run.model_copy(update={"config": longer}))


def test_it_is_scored_once_and_again_if_it_is_not_whole(sweep: Path) -> None:
    words = [*WORDS, f"output_dir={sweep.parent}"]
    (entry,), before = base_evaluations(sweep), stamps(sweep)
    said = say(*words)
    assert said.code == 0 and "untrained base" not in said.err
    assert stamps(sweep) == before
    place = base_scores.place_of(sweep, entry.id)
    table = place.with_suffix(".parquet")
    (place.parent / f".{table.name}.1.part").write_text("of a process that was killed")
    place.write_text(place.read_text().replace(entry.model, "another"))
    table.write_bytes(table.read_bytes()[:-1] + b"?")
    said = say(*words)
    assert said.code == 0 and said.err.count("untrained base tiny-gemma  nll ") == 1, said.err
    assert set(stamps(sweep)) == set(before), "what was left over is gone"
    (again,) = base_evaluations(sweep)
    assert (again.id, again.model, scores(again)) == (entry.id, entry.model, scores(entry))


def test_an_entry_that_is_not_what_was_written_is_left_out(sweep: Path) -> None:
    (entry,) = base_evaluations(sweep)
    place = base_scores.place_of(sweep, entry.id)
    table = place.with_suffix(".parquet")
    content, rows = place.read_bytes(), table.read_bytes()
    newer = json.loads(content) | {"schema_version": base_scores.SCHEMA_VERSION + 1}
    newer["checksum"] = record.checksum(newer)
    edits: list[Callable[[], Any]] = [
        lambda: place.write_bytes(content.replace(b"tiny-gemma", b"another")),
        lambda: place.write_bytes(content[:100]),
        lambda: place.write_text("[]"),
        lambda: place.write_text("{}"),
        lambda: place.write_text(json.dumps(newer)),
        lambda: place.rename(place.with_name("0123456789ab.json")),
        lambda: table.write_bytes(rows[:-1] + b"?"),
        table.unlink,
    ]
    for edit in edits:
        edit()
        assert base_evaluations(sweep) == []
        place.write_bytes(content)
        table.write_bytes(rows)
        assert base_evaluations(sweep) == [entry]


def test_evaluate_with_other_settings_adds_an_entry(sweep: Path) -> None:
    (first,), before = base_evaluations(sweep), stamps(sweep)
    words = ["evaluate", sweep, "data.num_test=5"]
    assert say(*words, "trainer.eval_base=false").code == 0
    assert stamps(sweep) == before, "it is switched off"
    said = say(*words)
    assert said.code == 0 and said.lines[0] == "3 of 3 runs have what was asked for, 0 to do"
    assert said.err.count("untrained base") == 1
    (new,) = (entry for entry in base_evaluations(sweep) if entry.id != first.id)
    assert new.base == first.base and new.evaluation.splits["test"].metrics["nll"].num_examples == 5
    ids = {tuple(e["id"] for e in run["evaluations"]) for run in records(sweep.parent).values()}
    assert ids == {(first.evaluation.id, new.evaluation.id)}
    # `compare` shows the runs' newest evaluation, and the base's row is of the same.
    (row,) = json.loads(say("compare", sweep, "--json").out)["bases"]
    nll = new.evaluation.splits["test"].metrics["nll"].value
    assert row["metrics"]["test"]["nll"] == nll and len(row["runs"]) == 3
    shown = next(line for line in say("compare", sweep).out.splitlines() if "│ untrained" in line)
    assert f"{nll:.4f}" in shown
    assert {name: stamps(sweep)[name] for name in before} == before


def test_each_base_of_a_sweep_has_an_entry(
    tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    """Two bases in two precisions of the computation; runs find theirs."""
    bases = f"model.path={tiny_folder('gemma')},{tiny_folder('llama')}"
    precision = ["trainer.dtype=float32,bfloat16", "hydra.launcher.pack_size=1"]
    said = say("train", "-m", *FAST, "model=local", bases, *precision, f"output_dir={tmp_path}")
    assert said.code == 0, said.err
    entries, runs = base_evaluations(tmp_path / "default"), list(find(tmp_path / "default"))
    assert len(entries) == len(runs) == 4 and len({entry.base for entry in entries}) == 2
    for _, run in runs:
        (mine,) = (entry for entry in entries if entry.is_of(run))
        assert mine.model == Path(run.config["model"]["path"]).name
        assert mine.conditions["trainer.dtype"] == run.config["trainer"]["dtype"]


def test_a_classifier_has_no_untrained_base(texts: Path, classifiers: dict[str, Path]) -> None:
    out = texts.parent / "classified"
    said = say(
        "train", "task=seq_cls", "model=local", f"model.path={classifiers['bert']}", "data=jsonl",
        f"data.train.path={texts}", "data.max_length=32", "data.metric=[nll,accuracy]",
        "head=full", "trainer=smoke", "tracker=none", f"output_dir={out}",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert not (out / "default" / "base").exists() and "untrained" not in said.err
    ((_, run),) = find(out / "default")
    assert "no head to score" in (base_scores.why_none(run.config) or "")
    run.config["task"], run.config["trainer"]["eval_base"] = "causal_lm", False
    assert base_scores.why_none(run.config) == "trainer.eval_base=false"


def test_an_exception_is_a_warning_and_the_next_command_tries_again(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a run nor the exit code depends on the base: a bug, or a base that changed."""
    before = records(sweep.parent)

    def warned(reason: str) -> None:
        shutil.rmtree(sweep / "base", ignore_errors=True)
        said = say("work", sweep)
        assert said.code == 0 and "Traceback" not in said.err
        (line,) = (line for line in said.lines if line.startswith("warning: "))
        assert line.startswith("warning: the untrained base tiny-gemma is not scored, the next")
        assert reason in line
        assert base_evaluations(sweep) == [] and records(sweep.parent) == before

    score = ModulePack.score

    def touched(self: ModulePack, batch: Any) -> Any:
        with torch.no_grad():
            next(self.tree.parameters()).add_(1.0)
        return score(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ModulePack, "score", lambda *_: 1 / 0)
        warned("ZeroDivisionError: division by zero")
        patch.setattr(ModulePack, "score", touched)
        warned("RuntimeError: the frozen base changed while it was scored")
    assert say("work", sweep).code == 0 and len(base_evaluations(sweep)) == 1
    assert records(sweep.parent) == before


def test_short_memory_halves_its_batches_alone(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = base_evaluations(sweep)
    shutil.rmtree(sweep / "base")
    score = ModulePack.score

    def short(self: ModulePack, batch: Any) -> Any:
        if len(batch.input_ids[0]) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return score(self, batch)

    monkeypatch.setattr(ModulePack, "score", short)
    said = say("work", sweep)
    assert said.code == 0 and "trying batches of 8 examples" in said.err, said.err
    (small,) = base_evaluations(sweep)
    assert entry.evaluation.batch_size == 32 and small.evaluation.batch_size == 8
    for split, one in entry.evaluation.splits.items():
        for name, metric in one.metrics.items():
            found = small.evaluation.splits[split].metrics[name]
            # Batches of other lengths: float32 rounding, as above.
            assert found.value == pytest.approx(metric.value, rel=2e-5)


def test_what_another_process_is_scoring_is_left_to_it(sweep: Path) -> None:
    (entry,) = base_evaluations(sweep)
    shutil.rmtree(sweep / "base")
    with SweepFolder(sweep).base_lock(entry.id):
        said = say("work", sweep)
        assert said.code == 0 and "untrained" not in said.err and "warning" not in said.err
        assert not (sweep / "base").exists()
    assert say("work", sweep).code == 0
    assert [one.id for one in base_evaluations(sweep)] == [entry.id]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_command_that_ends_over_the_base_leaves_it_to_the_next(
    number: int, code: int, sweep: Path, tmp_path: Path
) -> None:
    shutil.rmtree(sweep / "base")
    before, begun = records(sweep.parent), tmp_path / "begun"

    def slow() -> None:
        ModulePack.score = lambda *_: (begun.touch(), time.sleep(60))  # type: ignore

    with running(tmp_path / "said.txt", "work", sweep, before=slow) as process:
        wait_for(begun.exists)
        process.send(number)
        assert process.wait() == code, process.said
    assert base_evaluations(sweep) == [] and records(sweep.parent) == before
    said = say("work", sweep)
    assert said.code == 0 and len(base_evaluations(sweep)) == 1, said.err


def test_the_folder_of_the_base_is_no_run(sweep: Path, tmp_path: Path) -> None:
    shown = json.loads(say("runs", sweep, "--json").out)
    assert len(shown) == 3 and len(json.loads(say("compare", sweep, "--json").out)["runs"]) == 3
    said = say("export", sweep / "base", "--to", "adapter", tmp_path / "exported")
    assert said.code == 2 and not (tmp_path / "exported").exists()
    run = next(path for path, r in find(sweep) if r.config["lora"]["init"] == "default")
    assert say("replay", run, "--out", tmp_path / "again").code == 0
    assert not (tmp_path / "again" / "base").exists(), "a replay trains; the base is not its matter"
