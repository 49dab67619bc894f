"""The page of a sweep: what is on it, by other means, and what must not be."""

from __future__ import annotations

import itertools
import json
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas
import pytest
from conftest import SMOKE, say
from pages import LONG, Parsed, needs_browser, records_in, write_hostile, write_many, write_rows
from pyarrow import parquet
from sweeps import write_run, write_sweep

from lorabench import record, report
from lorabench.report import changes, curves, page

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # plotly's, of its own


def made(folder: Path, *words: str) -> Parsed:
    said = say("report", folder, *words)
    assert said.code == 0, said.err
    return Parsed((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_of_a_trained_sweep(output: Path) -> None:
    folder = output / "default"
    said = say("report", folder)
    assert said.code == 0, said.err
    path = folder / "report.html"
    assert re.fullmatch(rf"{re.escape(str(path))}: \d\.\d MB, 4 runs\n", said.out)
    found = Parsed(path.read_text(encoding="utf-8"))
    compared = json.loads(say("compare", folder, "--json").out)
    for one in compared["verdicts"]:
        assert one["sentence"] in found.text
    for one in compared["lints"]:
        assert one["text"] in found.text
    for row in compared["rows"]:
        spread = row["metrics"]["test"]["nll"]
        assert f"{spread['mean']:.4f} ± {spread['sd']:.4f}" in found.text
    (base,) = compared["bases"]
    assert f"{base['metrics']['test']['nll']:.4f}" in found.text
    for _, entry in record.find(folder):
        assert entry.run_id in found.text
        assert entry.hashes["base"] in found.text
        assert entry.provenance["packages"]["torch"] in found.text
    assert f"lorabench replay {folder}" in found.text
    assert "lorabench train -m" in found.text, "the command that asked for the runs"
    # Prompts and completions of the embedded data, and what was written.
    examples = found.data["examples"]
    assert all(prompt and completion for _, prompt, completion in examples["examples"])
    assert set(map(type, examples["texts"])) == {str}


def test_a_page_loads_nothing(output: Path) -> None:
    found = made(output / "default")
    assert set(found.loads) <= {"data:,"}, "no address but the empty icon"
    # The library has addresses of maps and of its maker in it, which it asks for maps alone; the
    # policy of the page forbids every request.
    text = (output / "default" / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "connect-src" not in text
    assert "@import" not in text.split("</style>")[0] and "url(" not in text.split("</style>")[0]


def test_curves_are_means_over_seeds(tmp_path: Path) -> None:
    """By pandas; a run that is short, half of a line and a NaN are in it."""
    rng = np.random.default_rng(0)
    frames, folders = [], []
    for seed in range(3):
        run = tmp_path / str(seed)
        run.mkdir()
        steps = range(1, 400 if seed else 300)
        rows = [{"step": s, "train/loss": float(rng.normal())} for s in steps]
        rows[7 + seed]["train/loss"] = float("nan")
        write_rows(run, rows, tail='{"step": 401, "train/')
        frames.append(pandas.DataFrame(rows).set_index("step")["train/loss"])
        folders.append(run)
    (curve,) = curves.curves_of([folders])
    per = -(-399 // curves.POINTS)
    wide = pandas.concat(frames, axis=1)
    binned = wide.groupby((wide.index - 1) // per).mean()
    assert curve.steps_a_point == per and curve.seeds == 3 and len(curve.steps) <= curves.POINTS
    # float32 on the page.
    np.testing.assert_allclose(curve.mean, binned.mean(axis=1), rtol=2e-6, atol=1e-7)
    deviation = binned.std(axis=1, ddof=1).fillna(0)
    np.testing.assert_allclose(curve.high - curve.mean, deviation, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(curve.mean - curve.low, deviation, rtol=1e-5, atol=1e-6)


def test_figures_for_a_notebook(tmp_path: Path) -> None:
    import plotly.graph_objects as go

    means = {("exclude", 16): 1.0, ("lora", 16): 0.6, ("exclude", 64): 0.9, ("lora", 64): 0.5}
    scores = write_sweep(tmp_path / "s", means, seeds=3)
    found = report.figures(records_in(tmp_path / "s"))
    assert all(isinstance(one, go.Figure) for one in found.values())
    assert set(found) == {"intervals", "parameters nll", "time nll", "heat map head x r"}
    (heat,) = found["heat map head x r"].data
    frame = pandas.DataFrame(
        [{"head": h, "r": r, "nll": v.mean()} for (h, r, _), v in scores.items()]
    ).pivot_table(index="head", columns="r", values="nll")
    np.testing.assert_allclose(np.array(heat.z, float), frame.to_numpy())
    layout = found["heat map head x r"].layout
    assert list(layout.yaxis.ticktext) == ["head=exclude", "head=lora"]
    assert list(layout.xaxis.ticktext) == ["r=16", "r=64"]
    # lora is better at the same number of parameters: exclude is on no front.
    front = next(t for t in found["parameters nll"].data if t.name == "Pareto front")
    assert list(front.x) == [16_000, 64_000]
    by_name = {trace.name: trace for trace in found["parameters nll"].data}
    assert by_name["head=exclude r=16"].marker.symbol.endswith("-open")
    assert not by_name["head=lora r=64"].marker.symbol.endswith("-open")


def test_intervals_point_to_what_is_better(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {("exclude", 16): 1.0, ("lora", 16): 0.5}, seeds=4)
    (verdict,) = json.loads(say("compare", tmp_path / "s", "--json").out)["verdicts"]
    figure = report.figures(records_in(tmp_path / "s"))["intervals"]
    (trace,) = (one for one in figure.data if one.name == "found")
    first = figure.layout.yaxis.ticktext[0].split(" – ")[0]
    sign = 1 if first == f"head={verdict['better']}" else -1
    assert trace.x[0] == pytest.approx(sign * verdict["gain"])
    ends = trace.x[0] - trace.error_x.arrayminus[0], trace.x[0] + trace.error_x.array[0]
    assert sorted(sign * end for end in ends) == pytest.approx([verdict["low"], verdict["high"]])


def test_what_changed_between_settings(tmp_path: Path) -> None:
    """Means over seeds by example, by pandas from the same predictions."""
    write_many(tmp_path / "s", settings=3, seeds=2, examples=30)
    runs = records_in(tmp_path / "s")
    groups = [[f"{i:03}-{seed}" for seed in range(2)] for i in range(3)]
    found = changes.changes_of(runs, groups, "nll")
    assert found is not None and found.metric == "exact_match" and found.is_right
    assert found.left_out == 0 and found.seeds == [2, 2, 2]
    for i, ids in enumerate(groups):
        places = [next((tmp_path / "s" / id).glob("*/*.parquet")) for id in ids]
        frames = [pandas.read_parquet(place) for place in places]
        mean = pandas.concat(frames).groupby("example")["exact_match"].mean()
        np.testing.assert_allclose(found.scores[i], [mean[id] for id in found.examples])
        written = frames[0].set_index("example")["teacher_forced"]
        texts = [found.texts[place] for place in found.written[i]]
        assert texts == [written[id] for id in found.examples]
        own = frames[0].set_index("example")["exact_match"]
        np.testing.assert_array_equal(found.own[i], [own[id] for id in found.examples])
    right = found.scores >= 0.5
    for a, b in itertools.product(range(3), range(3)):
        assert found.gained[a, b] == (~right[a] & right[b]).sum() and found.both[a, b] == 30
    # Other predictions than were recorded are nobody's.
    damaged = tmp_path / "s" / "000-0" / "evaluations"
    (place,) = damaged.iterdir()
    parquet.write_table(parquet.read_table(place).slice(0, 20), place)
    again = changes.changes_of(runs, groups, "nll")
    assert again is not None and again.seeds == [1, 2, 2] and again.seed == 1


def test_examples_beyond_the_room_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_many(tmp_path / "s", settings=2, seeds=2, examples=60)
    monkeypatch.setattr(changes, "MOST_BYTES", 1200)
    found = made(tmp_path / "s")
    kept = len(found.data["examples"]["examples"])
    assert 5 < kept < 60
    assert f"{60 - kept} of 60 test examples are not in the view of examples" in found.text
    # Those on which the settings differ most are kept.
    scores = np.array(found.data["examples"]["scores"], float)
    assert np.abs(scores[0] - scores[1]).min() > 0


def test_figures_beyond_the_room_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of each kind and the examples go last; no page is larger than its room."""
    write_many(tmp_path / "s", settings=6, seeds=2)
    contents = []
    write = page.write
    monkeypatch.setattr(page, "write", lambda *args: (contents.append(args[0]), write(*args))[1])
    whole = made(tmp_path / "s")

    def within(room: int) -> Parsed:
        monkeypatch.setattr(page, "MOST_BYTES", room)
        text = page.html(contents[0])
        found = Parsed(text)
        first = all(found.data["figures"].values()) and found.data["examples"]
        assert not first or len(text.encode()) < room
        return found

    def number(found: Parsed) -> int:
        return sum(map(len, found.data["figures"].values()))

    # The largest room, to a kilobyte, in which something is left out.
    small, large = 0, page.MOST_BYTES
    while large - small > 1000:
        middle = (small + large) // 2
        shown = within(middle)
        if number(shown) == number(whole) and shown.data["examples"]:
            large = middle
        else:
            small = middle
    found = within(small)
    assert number(found) == number(whole) - 1
    assert all(found.data["figures"].values()) and found.data["examples"]
    assert re.search("the figure “[^”]*, exact_match”: the page would be large", found.text)
    # With less room the examples go too, and no first figure of a kind before them.
    rooms = range(small, small - 100_000, -10_000)
    less = next(one for one in map(within, rooms) if not one.data["examples"])
    assert "the view of examples: the page would" in less.text
    assert all(less.data["figures"].values())


@pytest.mark.parametrize("finished", [True, False])
def test_hostile_texts_stay_texts(tmp_path: Path, finished: bool) -> None:
    """No tag, script or handler of a config, an error or data is one of the page."""
    folder = tmp_path / "a <b>'\"&"
    write_hostile(folder, finished)
    found = made(folder)
    assert "img" not in found.tags and found.tags.count("script") == 3, "data, plotly, the page's"
    assert any("onerror=window.hacked=1" in text for text in found.texts), "shown as it is"
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert LONG not in text, "a text of 10 kB is cut"
    assert len(text) < 6_000_000
    if not finished:
        assert page.NONE_YET in found.text


def test_a_hundred_runs_take_less_than_six_megabytes(tmp_path: Path) -> None:
    write_many(tmp_path / "s", settings=20, seeds=5, examples=300)
    found = made(tmp_path / "s")
    assert (tmp_path / "s" / "report.html").stat().st_size < 6_000_000
    assert "the page would be large" not in found.text
    assert len(found.data["figures"]["curves"]) == 1


@pytest.mark.slow
def test_two_hundred_runs_take_less_than_twenty_seconds(tmp_path: Path) -> None:
    write_many(tmp_path / "s", settings=40, seeds=5, examples=300)
    begun = time.perf_counter()
    found = made(tmp_path / "s")
    assert time.perf_counter() - begun < 20
    assert all(found.data["figures"].values()) and found.data["examples"]


def test_options_are_those_of_compare(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {("exclude", 16): 1.0, ("lora", 16): 0.5}, seeds=3, metric="nll")
    found = made(tmp_path / "s", "--margin", "5", "--vary", "head")
    said = say("compare", tmp_path / "s", "--margin", "5", "--json")
    (verdict,) = json.loads(said.out)["verdicts"]
    assert verdict["sentence"] in found.text
    for verb in ("report", "compare"):  # the page's own command, and that of its sentences
        assert f"lorabench {verb} {tmp_path / 's'} --margin 5 --vary head" in found.text


def test_an_unfinished_sweep_that_asks_something_has_a_page(tmp_path: Path) -> None:
    """What an experiment asks about may not vary yet among the runs that have finished."""
    asked = ["lora.r=2,4", "seed=0", "+compare.vary=[lora.r]", "+compare.baseline={lora.r: 2}"]
    said = say("train", "-m", *SMOKE, *asked, f"output_dir={tmp_path}")
    assert said.code == 0, said.err
    for run, entry in record.find(tmp_path / "default"):
        if entry.config["lora"]["r"] == 4:
            entry.model_copy(update={"status": "failed", "evaluations": []}).write(run)
    for verb in ("report", "compare"):
        said = say(verb, tmp_path / "default")
        assert said.code == 0, said.err
    assert say("watch", tmp_path / "default").code == 0


def test_several_sweeps_are_one_page(tmp_path: Path) -> None:
    write_sweep(tmp_path / "a", {("exclude", 16): 1.0}, seeds=3)
    write_sweep(tmp_path / "b", {("lora", 16): 0.5}, seeds=3, draw=0)
    said = say("report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both.html")
    assert said.code == 0, said.err
    found = Parsed((tmp_path / "both.html").read_text())
    assert "head=lora beats head=exclude" in found.text and "sweep" in found.text


def test_refusals_of_a_page(tmp_path: Path) -> None:
    write_run(tmp_path / "s", "lora", 16, 0, {"nll": np.ones(3)})
    said = say("report", tmp_path / "s", "--out", tmp_path)
    assert said.code == 2 and f"--out: must be a file; '{tmp_path}' is a folder" in said.err
    said = say("report", tmp_path / "s", "--out", tmp_path / "none" / "x.html")
    assert said.code == 2 and "must lie in a folder that exists" in said.err
    said = say("report", tmp_path / "nothing")
    assert said.code == 2 and "does not exist" in said.err


def test_one_run_alone_has_a_page(tmp_path: Path) -> None:
    write_run(tmp_path / "s", "lora", 16, 0, {"nll": np.ones(3)})
    assert "one setting alone" in made(tmp_path / "s").text


def test_secrets_are_masked(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "hunter2hunter2")
    said = say("report", output / "default", "--out", output / "hunter2hunter2.html")
    assert said.code == 0 and "hunter2hunter2" not in said.out
    assert "hunter2hunter2" not in (output / "hunter2hunter2.html").read_text()


@pytest.mark.slow
@needs_browser
def test_figures_as_files(tmp_path: Path) -> None:
    """By kaleido, which starts the browser."""
    write_sweep(tmp_path / "s", {("exclude", 16): 1.0, ("lora", 16): 0.6}, seeds=3)
    command = [sys.executable, "-m", "lorabench", "report", str(tmp_path / "s")]
    done = subprocess.run(
        [*command, "--png", str(tmp_path / "png")], capture_output=True, text=True, check=True
    )
    files = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert files == ["intervals.png", "parameters-nll.png", "time-nll.png"]
    assert done.stdout.splitlines()[-1] == f"{tmp_path / 'png'}: 3 figures"
    for path in (tmp_path / "png").iterdir():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and struct.unpack(">I", content[16:20]) == (2200,)
