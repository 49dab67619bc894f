"""The page of every kind of sweep: chosen values, retention, mixtures, classes, several bases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SMOKE, predictions, say
from pages import Parsed
from sources import write
from sweeps import write_run, write_sweep
from test_mixture import SIZES, rows
from test_mixture_runs import FAST
from test_report import made
from test_selection import RATES, write_rates

from lorabench import record, report

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # plotly's, of its own
FOREIGN = Path(__file__).parent / "foreign"


def drawn(found: Parsed, group: str) -> dict[str, dict]:
    return {one["name"]: one["figure"] for one in found.data["figures"][group]}


def test_chosen_values_alone_are_compared(tmp_path: Path) -> None:
    """Heat map and first pair of examples: at the rate that was chosen on validation."""
    loss = {
        (head, lr): 1.5 - 0.4 * (lr == best) - 0.2 * (head == "lora")
        for head, best in (("lora", RATES[1]), ("exclude", RATES[0]))
        for lr in RATES
    }
    for r in (16, 32):
        scores = write_rates(tmp_path / f"{r}", loss)
        for run in (tmp_path / f"{r}").iterdir():
            entry = record.read(run)
            assert entry is not None
            entry.config["lora"]["r"] = r
            entry.write(run)
            shutil.move(run, tmp_path / "s" / f"{r}-{run.name}")
            entry = entry.model_copy(update={"run_id": f"{r}-{run.name}"})
            entry.write(tmp_path / "s" / f"{r}-{run.name}")
    found = made(tmp_path / "s", "--select", "trainer.lr")
    (figure,) = drawn(found, "heat map").values()
    chosen = {"lora": RATES[1], "exclude": RATES[0]}
    seeds = {seed for _, _, seed in scores}
    means = {h: np.mean([scores[h, lr, s][1] for s in seeds]) for h, lr in chosen.items()}
    assert np.asarray(figure["data"][0]["z"], float) == pytest.approx(
        np.array([[means["exclude"]] * 2, [means["lora"]] * 2]), rel=1e-9
    )
    examples = found.data["examples"]
    first, second = (examples["settings"][examples[name]] for name in ("first", "second"))
    assert first.startswith("head=exclude") and f"lr={RATES[0]:g}" in first
    assert second.startswith("head=lora") and f"lr={RATES[1]:g}" in second
    assert "chosen on validation" in found.text.lower()


def test_heat_maps_are_of_settings_that_every_cell_has(tmp_path: Path) -> None:
    """Dropout 0.2 was trained at r=32 alone: its better scores are no merit of r."""
    cells = {(16, 0.0, 1): 1.0, (16, 0.0, 2): 2.0, (32, 0.0, 1): 3.0, (32, 0.0, 2): 4.0}
    cells |= {(32, 0.2, 1): 0.0}
    for (r, dropout, batch), mean in cells.items():
        for seed in range(2):
            write_run(
                tmp_path / "s", "lora", r, seed, {"nll": np.full(5, mean)},
                config={"lora": {"r": r, "lora_dropout": dropout},
                        "trainer": {"steps": 4, "lr": 1e-3, "batch_size": batch}},
                name=f"{r}-{dropout}-{batch}-{seed}",
            )  # fmt: skip
    maps = drawn(made(tmp_path / "s"), "heat map")
    z = maps["r x batch_size"]["data"][0]["z"]
    assert z == [[1.0, 2.0], [3.0, 4.0]]
    z, title = maps["r x lora_dropout"]["data"][0]["z"], maps["r x lora_dropout"]["layout"]["xaxis"]
    assert z == [[1.0, None], [3.0, 0.0]] and "do not compare" not in title["title"]["text"]


def test_heat_maps_without_a_shared_setting_say_so(tmp_path: Path) -> None:
    for r, lr, batch in ((16, 1e-3, 1), (32, 1e-3, 2), (16, 2e-3, 2), (32, 2e-3, 1)):
        config = {"lora": {"r": r}, "trainer": {"steps": 4, "lr": lr, "batch_size": batch}}
        for seed in range(2):
            write_run(tmp_path / "s", "lora", r, seed, {"nll": np.full(5, float(batch))},
                      config=config, name=f"{r}-{lr}-{seed}")  # fmt: skip
    maps = drawn(made(tmp_path / "s"), "heat map")
    assert "do not compare" in maps["r x lr"]["layout"]["xaxis"]["title"]["text"]


def test_levels_that_are_cut_alike_stay_columns(tmp_path: Path) -> None:
    names = [f"{'same beginning ' * 5}{x}{' same end' * 5}" for x in "ab"]
    for k, name in enumerate(names):
        for r in (16, 32):
            write_run(
                tmp_path / "s", "lora", r, 0, {"nll": np.full(5, float(k))},
                config={"lora": {"r": r}, "model": {"name": name}}, name=f"{k}-{r}",
            )  # fmt: skip
    (figure,) = drawn(made(tmp_path / "s"), "heat map").values()
    z = np.asarray(figure["data"][0]["z"], float)
    assert z.shape == (2, 2) and sorted(z.ravel()) == [0, 0, 1, 1]


def test_a_page_of_retention_and_of_a_mixture(tmp_path: Path) -> None:
    """Gain and forgetting as compare has them, beside the untrained base."""
    for name, count in SIZES.items():
        write(tmp_path / f"{name}.jsonl", rows(name, count))
    write(tmp_path / "old.jsonl", [{"text": f"the old words {i}"} for i in range(9)])
    parts = ",".join(f"{{path: '{tmp_path}/{name}.jsonl'}}" for name in ("maths", "words"))
    mixture = f"data.mixture=[{parts}]"
    said = say(
        "train", "-m", *FAST, "data=jsonl", mixture, f"output_dir={tmp_path}/outputs", "seed=0,1",
        "lora.lora_alpha=2,8", f"data.retention={{path: '{tmp_path}/old.jsonl', format: text}}",
    )  # fmt: skip
    assert said.code == 0, said.err
    sweep = tmp_path / "outputs" / "default"
    found = made(sweep)
    (figure,) = drawn(found, "gain and forgetting").values()
    # pandas' means of what was written: of each run, less those of the untrained base.
    base = pd.read_parquet(next(sweep.glob("base/*.parquet"))).groupby("split")["nll"].mean()
    changes: dict[float, list[pd.Series]] = {}
    for run, entry in record.find(sweep):
        mean = pd.read_parquet(predictions(run)).groupby("split")["nll"].mean()
        changes.setdefault(entry.config["lora"]["lora_alpha"], []).append(mean - base)
    expected = [sum(own) / len(own) for own in changes.values()]
    points = sorted((one["x"][0], one["y"][0]) for one in figure["data"])
    assert np.array(points) == pytest.approx(
        np.array(sorted((one["retention"], -one["test"]) for one in expected)), rel=1e-9
    )
    assert "untrained" in found.text and "gain: how much better" in found.text
    texts = {text for _, *both in found.data["examples"]["examples"] for text in both}
    assert any("maths" in text for text in texts), "prompts are read from every source again"


@pytest.mark.slow
def test_a_page_of_classes_and_of_two_bases(tmp_path: Path) -> None:
    words = ["task=seq_cls", "data=classes", "model=tiny-gemma,tiny-bert", "head=full", "seed=0,1"]
    said = say("train", "-m", *SMOKE, *words, "target_modules=all-linear",
               f"output_dir={tmp_path}", "data.num_test=24")  # fmt: skip
    assert said.code == 0, said.err
    found = made(tmp_path / "default")
    assert found.data["examples"]["metric"] == "accuracy"
    assert found.data["examples"]["by"] == "predicted"
    labels = {text for _, _, text in found.data["examples"]["examples"]}
    assert {*found.data["examples"]["texts"]} <= labels and len(labels) > 1
    settings = found.data["examples"]["settings"]
    assert ["tiny-gemma" in one for one in settings] == ["tiny-bert" not in one for one in settings]
    # pandas' means of what was written.
    means: dict[str, list[float]] = {}
    for run, entry in record.find(tmp_path / "default"):
        frame = pd.read_parquet(predictions(run))
        mean = frame[frame["split"] == "test"]["accuracy"].mean()
        means.setdefault(entry.config["model"]["name"], []).append(mean)
    assert set(means) == {"tiny-gemma", "tiny-bert"}
    for values in means.values():
        assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in found.text


def test_results_of_pefts_benchmark_stand_beside_a_sweep(tmp_path: Path) -> None:
    shutil.copytree(FOREIGN, tmp_path / "theirs")
    write_sweep(tmp_path / "s", {("exclude", 16): 1.0, ("lora", 16): 0.5}, seeds=3)
    said = say("report", tmp_path / "s", tmp_path / "theirs", "--out", tmp_path / "both.html")
    assert said.code == 0, said.err
    both = Parsed((tmp_path / "both.html").read_text())
    shown = say("compare", tmp_path / "s", tmp_path / "theirs", "--json").out
    theirs = json.loads(shown)["foreign"]
    assert theirs and all(row["setting"]["experiment"] in both.text for row in theirs)
    assert "results of PEFT's benchmark: one seed each, so no verdict" in both.text
    assert "experiment" in both.text and " none " not in both.text, "ours know no experiment"
    # What could not be read is on the page, and not on stderr alone.
    refused = [line for line in said.err.splitlines() if line]
    assert refused and all(" ".join(line.split())[:60] in both.text for line in refused)
    alone = say("report", tmp_path / "theirs")
    assert alone.code == 0 and theirs[0]["setting"]["experiment"] in (
        Parsed((tmp_path / "theirs" / "report.html").read_text()).text
    )


def test_what_is_told_stands_on_the_page(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {("exclude", 16): 1.0, ("lora", 16): 0.5}, seeds=3)
    (tmp_path / "s" / "lora-16-2" / "record.json").write_text('{"half')
    said = say("report", tmp_path / "s")
    assert said.code == 0 and "record.json is damaged" in said.err
    assert "record.json is damaged or of a newer version: lora-16-2" in (
        Parsed((tmp_path / "s" / "report.html").read_text()).text
    )


def test_scores_of_runs_that_stopped_are_among_the_runs(tmp_path: Path) -> None:
    for seed in range(2):
        run = write_run(tmp_path / "s", "lora", 16, seed, {"nll": np.full(5, 0.125)})
        entry = record.read(run)
        assert entry is not None
        entry.model_copy(update={"status": "stopped"}).write(run)
    found = made(tmp_path / "s")
    assert "test nll ↓" in found.text.replace("\u00a0", " ") and "0.1250" in found.text


def test_marks_of_the_table_are_on_the_page(tmp_path: Path) -> None:
    """What is finite, and the best on validation."""
    for head, mean in (("exclude", 1.0), ("lora", 0.5)):
        for seed in range(3):
            bad = head == "exclude" and seed == 1
            values = np.full(20, np.nan if bad else mean)
            write_run(tmp_path / "s", head, 16, seed, {"nll": values},
                      validation={"nll": None if bad else mean})  # fmt: skip
    found = made(tmp_path / "s")
    assert "(2 of 3 finite)" in found.text and "lora *" in found.text
    assert "* the best on validation nll; test judges" in found.text


def test_curves_are_of_the_newest_run_of_a_setting_and_seed(tmp_path: Path) -> None:
    from pages import write_rows

    for name, ended, loss in (("old", "2026-11-24T12:00:00Z", 9.0), ("new", "", 1.0)):
        run = write_run(tmp_path / "s", "lora", 16, 0, {"nll": np.ones(3)}, name=name,
                        **({"ended": ended} if ended else {}))  # fmt: skip
        entry = record.read(run)
        assert entry is not None
        entry.model_copy(update={"started": ended or "2026-11-25T12:00:00Z"}).write(run)
        write_rows(run, [{"step": step, "train/loss": loss} for step in (1, 2)])
    figures = report.figures(record.find(tmp_path / "s"))
    (curve,) = figures["curves train/loss"].data
    assert list(curve.y) == [1.0, 1.0]
