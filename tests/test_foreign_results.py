"""Results of PEFT's own benchmark: every published shape, and files that are none.

The files in tests/foreign/ have the keys of published ones; names and numbers are invented. The
references are pandas for what a file says, statsmodels and scipy for intervals, and PEFT for the
configs that it writes.
"""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from lorabench import compare
from lorabench.compare import foreign, peft_results
from lorabench.config import ConfigErrors

HERE = Path(__file__).parent / "foreign"
SUCCESSFUL = [
    "2025-03_own_test_set", "2025-06_no_parameter_counts", "2025-06_counts_adalora",
    "2025-07_accelerator_full", "2026-01_forgetting", "2026-06_image_gen", "2026-09_newest_lora",
]  # fmt: skip


def content_of(shape: str) -> Any:
    return json.loads((HERE / f"{shape}.json").read_text())


def row_of(shape: str) -> foreign.ForeignRow:
    (row,) = foreign.read(HERE / f"{shape}.json")
    return row


def written(tmp_path: Path, content: Any) -> foreign.ForeignRow:
    path = tmp_path / "result.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    (row,) = foreign.read(path)
    return row


# --- shapes, by date -------------------------------------------------------------------------


def test_february_2025_hashes_in_place_of_configs_and_no_scores() -> None:
    """train_params_sha and peft_config_sha, cuda_memory_90th, losses, package_info null."""
    row = row_of("2025-02_hashes")
    assert row.error == f"{row.path}: no score on a test or validation split"
    assert (row.name, row.peft_type, row.model, row.seed) == ("lora/tiny", None, None, None)


def test_march_2025_a_test_set_of_its_own_gives_no_interval() -> None:
    """model_sha and dataset_sha, 501 questions out of MetaMathQA: nothing says how many."""
    row = row_of("2025-03_own_test_set")
    assert row.error is None and row.peft_type == "IA3"
    assert row.num_examples == {} and foreign.intervals(row) == {}
    assert row.setting["model.revision"] == "aaaa1111"
    assert row.train_seconds == 2200.25  # no seconds per interval: the longer time, with a note
    assert any("evaluation on the test split" in note for note in row.notes)
    assert any("branch method-comparison" in note for note in row.notes)


def test_june_2025_memory_of_cuda_and_no_parameter_counts() -> None:
    """cuda_memory_max, "loss avg", gpu; neither num_trainable_params nor error_msg."""
    row = row_of("2025-06_no_parameter_counts")
    assert (row.trainable_parameters, row.total_parameters) == (None, None)
    assert row.peak_memory_bytes == 25_000_000_000 and row.versions["device"] == "Example GPU"
    assert row.train_seconds == 20.5 + 21.5  # of the steps, not the 2700.5 with the test in them
    assert row.tokens_per_second == 168_000 / 42


def test_later_in_june_2025_counts_and_the_masks_of_adalora() -> None:
    """num_trainable_params, num_total_params, error_msg; rank_pattern holds what was pruned."""
    row = row_of("2025-06_counts_adalora")
    assert (row.trainable_parameters, row.total_parameters) == (18_350_000, 2_018_350_000)
    assert row.setting["peft.init_r"] == 64 and not any("pattern" in key for key in row.setting)
    assert "lora.r" not in row.setting  # an r of another method is not LoRA's rank


def test_july_2025_memory_of_any_accelerator_and_full_fine_tuning() -> None:
    """accelerator_memory_max, system_info.accelerator; peft_config null."""
    row = row_of("2025-07_accelerator_full")
    assert row.peft_type == "full-finetuning" and row.peak_memory_bytes == 37_000_000_000
    assert row.trainable_parameters == row.total_parameters


def test_january_2026_forgetting_of_before_its_fix() -> None:
    """forgetting, peft_config.peft_version; target_modules a text."""
    row = row_of("2026-01_forgetting")
    assert row.metrics["test"]["forgetting"] == -3.25
    assert any("#3419" in note for note in row.notes)
    assert row.setting["target_modules.names"] == "model.embed_tokens"


def test_march_2026_a_canceled_run_says_why() -> None:
    """status canceled, metrics of its first steps, error_msg of several lines."""
    row = row_of("2026-03_canceled")
    assert row.error == (
        f"{row.path}: its run did not finish: status canceled, Tried to allocate 20.00 MiB."
    )


def test_april_2026_reinforcement_learning_says_its_questions() -> None:
    """rl_eval_info, metrics as TRL logs them, seed 42; no sizes, no memory, no hashes."""
    row = row_of("2026-04_rl")
    assert row.metrics == {"test": {"accuracy": 0.92}} and row.num_examples == {"test": 50}
    assert (row.seed, row.train_seconds, row.peak_memory_bytes) == (42, 670.5, None)
    assert row.setting["trainer.lr"] == 4e-5 and row.setting["lora.use_dora"] is True
    assert row.notes == ("ran on branch lora-comparison, not on PEFT's main",)
    assert foreign.intervals(row)["test"] == pytest.approx(
        proportion_confint(46, 50, method="wilson"), abs=1e-12
    )


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ("2026-04_rl_cancelled", "cancelled, address already in use"),
        ("2026-04_rl_running", "running"),
    ],
)
def test_april_2026_files_are_there_before_their_run_ends(shape: str, why: str) -> None:
    """status cancelled with `error`, or running with total_time null."""
    row = row_of(shape)
    assert row.error == f"{row.path}: its run did not finish: status {why}"


@pytest.mark.parametrize("shape", ["2025-04_generation_flat", "2025-08_generation"])
def test_benchmarks_of_generation_are_recognised_and_left_out(shape: str) -> None:
    """peft_bench and text_generation_benchmark: flat, or with generation_info."""
    row = row_of(shape)
    assert foreign.is_foreign(row.path)
    assert row.error is not None and "speed and memory of generation" in row.error


def test_june_2026_images_have_similarities_and_a_drift_that_is_no_number() -> None:
    """test dino_similarity, drift NaN, one dataset, test_size; 250 steps but seconds of 200."""
    row = row_of("2026-06_image_gen")
    assert row.metrics["test"] == {"dino_similarity": 0.578125}
    assert row.metrics["validation"] == {"dino_similarity": 0.6875}  # the last, not the best
    assert row.num_examples == {"test": 4, "validation": 2} and foreign.intervals(row) == {}
    assert row.train_seconds == 290.5 and row.tokens_per_second is None


def test_september_2026_the_newest_shape() -> None:
    """peft_worktree_is_dirty and use_gc are ignored; use_bdlora is a dictionary."""
    row = row_of("2026-09_newest_lora")
    assert (row.setting["lora.r"], row.setting["lora.lora_alpha"]) == (24, 48)
    assert row.setting["target_modules.names"] == ["q_proj", "v_proj"]  # a set, sorted
    assert row.setting["peft.use_bdlora.nblocks"] == 2
    assert row.metrics["test"]["forgetting"] == 0.0625 and not any("#3419" in n for n in row.notes)
    assert row.num_examples == {"test": 1319, "validation": 50}


@pytest.mark.parametrize("shape", SUCCESSFUL)
def test_what_a_file_says_is_what_pandas_reads_in_it(shape: str) -> None:
    """A key read from the wrong block, or a metric of the wrong step, would differ."""
    row, content = row_of(shape), content_of(shape)
    flat = pd.json_normalize(content).iloc[0]
    entries = pd.DataFrame(content["train_info"]["metrics"])
    assert [row.name, row.created, row.model, row.seed, row.status] == [
        flat["run_info.experiment_name"],
        flat["run_info.created_at"],
        flat["run_info.train_config.model_id"],
        flat["run_info.train_config.seed"],
        flat["train_info.status"],
    ]
    assert row.versions["peft"] == flat["meta_info.package_info.peft-version"]
    assert row.versions["transformers"] == flat["meta_info.package_info.transformers-version"]
    assert row.versions["torch"] == flat["meta_info.package_info.torch-version"]
    assert row.versions["commit"] == flat["meta_info.package_info.peft-commit-hash"]
    assert row.file_size_bytes == flat["train_info.file_size"]
    assert row.total_seconds == flat["run_info.total_time"]
    score = next(key for key in entries if key.startswith("test "))
    assert row.metrics["test"][score[5:]] == entries[score].dropna().iloc[-1]
    assert row.metrics["validation"][score[5:]] == entries[f"valid {score[5:]}"].dropna().iloc[-1]
    assert row.metrics["train"]["loss"] == entries["train loss"].iloc[-1]


def test_a_config_that_this_peft_writes_is_read_as_it_was_set(tmp_path: Path) -> None:
    """Sets become lists as in PEFT's log_results; what a newer PEFT adds must not get lost."""
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=6, target_modules=["b", "a"], use_rslora=True)
    dumped = {k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    content = content_of("2026-09_newest_lora")
    content["run_info"]["peft_config"] = dumped
    row = written(tmp_path, content)
    assert row.error is None and row.peft_type == "LORA"
    for key in peft_results.OF_LORA:
        assert row.setting[f"lora.{key}"] == getattr(config, key)
    assert row.setting["target_modules.names"] == ["a", "b"]


# --- intervals -------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 50, 1319])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.48, 1.0])
@pytest.mark.parametrize("level", [0.05, 0.2])
def test_the_interval_is_that_of_statsmodels_and_scipy(
    num: int, share: float, level: float
) -> None:
    right = round(share * num)
    found = foreign.wilson(right / num, num, level)
    # Formulas differ by rounding alone: a few units of the last place.
    assert found == pytest.approx(
        proportion_confint(right, num, alpha=level, method="wilson"), abs=1e-12
    )
    scipy = stats.binomtest(right, num).proportion_ci(1 - level, method="wilson")
    assert found == pytest.approx((scipy.low, scipy.high), abs=1e-12)


@pytest.mark.parametrize(("accuracy", "num"), [(48.2, 1319), (-0.1, 10), (0.5, 0), (math.nan, 10)])
def test_an_interval_of_no_share_is_refused(accuracy: float, num: int) -> None:
    with pytest.raises(ValueError, match="must be in"):
        foreign.wilson(accuracy, num)


def test_questions_are_counted_only_where_the_accuracy_is_a_whole_number_of_them(
    tmp_path: Path,
) -> None:
    """A subset of GSM8K under the same key would otherwise get the interval of all of it."""
    content = content_of("2026-09_newest_lora")
    content["train_info"]["metrics"][-1]["test accuracy"] = 180 / 501
    row = written(tmp_path, content)
    assert row.num_examples == {"validation": 50} and "test" not in foreign.intervals(row)


# --- files and folders -----------------------------------------------------------------------


def test_a_file_a_folder_and_one_level_below_are_foreign_and_ours_are_not(tmp_path: Path) -> None:
    (tmp_path / "task/results").mkdir(parents=True)
    (tmp_path / "task/results/one.json").write_text(json.dumps(content_of("2026-04_rl")))
    (tmp_path / "task/default_training_params.json").write_text('{"seed": 0}')
    assert foreign.is_foreign(tmp_path / "task/results/one.json")
    assert foreign.is_foreign(tmp_path / "task/results")
    assert foreign.is_foreign(tmp_path / "task")
    assert not foreign.is_foreign(tmp_path)  # two levels below
    assert not foreign.is_foreign(tmp_path / "task/default_training_params.json")
    assert not foreign.is_foreign(tmp_path / "absent")
    sweeps = Path(__file__).parent / "folders"
    written_by_us = [path for path in sweeps.iterdir() if path.is_dir()]
    assert written_by_us and not any(foreign.is_foreign(path) for path in written_by_us)
    rows = {row.path.name: row.error for row in foreign.read(tmp_path / "task")}
    assert rows["one.json"] is None
    assert "no run_info" in str(rows["default_training_params.json"])


def test_every_shape_has_a_row() -> None:
    assert [row.path for row in foreign.read(HERE)] == sorted(HERE.glob("*.json"))


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_a_path_without_results_is_refused_with_a_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigErrors, match="give its results/ folder"):
        foreign.read(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "damaged"),
        ('{"run_info": {"experiment_name": "a', "damaged"),
        ("[" * 100_000, "damaged"),
        ("[1, 2]", "no run_info"),
        ('{"run_info": {"created_at": "now"}}', "run_info.experiment_name: Field required"),
        ('{"run_info": {"experiment_name": "a"}}', "train_info: Field required"),
        (
            '{"run_info": {"experiment_name": "a"}, "train_info": {"status": "success", '
            '"metrics": [3]}}',
            "train_info.metrics.0: Input should be a valid dictionary",
        ),
        (
            '{"run_info": {"experiment_name": "a"}, "train_info": {"status": "success", '
            '"metrics": [{"test accuracy": 48.2}]}, "rl_eval_info": {"num_eval_samples": 50}}',
            r"test accuracy must be in \[0, 1\]; got 48.2",
        ),
        (
            '{"run_info": {"experiment_name": "a"}, "train_info": {"status": "success", '
            '"metrics": [{"test accuracy": NaN}]}}',
            "no score",
        ),
    ],
    ids=[
        "empty", "cut short", "too deep", "a list", "no name", "no training", "no entries",
        "percent", "NaN",
    ],
)  # fmt: skip
def test_a_file_that_is_no_result_says_what_is_wrong(tmp_path: Path, text: str, why: str) -> None:
    row = written(tmp_path, text)
    assert row.error is not None
    assert re.search(why, row.error)
    assert row.error.startswith(f"{row.path}: ") and "\n" not in row.error
    assert foreign.table_rows([row]) == [] and foreign.intervals(row) == {}


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with a key or an index into it."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(pairs):
        yield content, key
        if isinstance(value, (dict, list)):
            yield from places(value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_no_content_raises(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any value of any key may be anything, or missing: there is a row, and a table of it."""
    shape = data.draw(st.sampled_from(["2026-09_newest_lora", "2026-06_image_gen", "2026-04_rl"]))
    content = copy.deepcopy(content_of(shape))
    where = list(places(content))
    container, key = where[data.draw(st.integers(0, len(where) - 1))]
    if data.draw(st.booleans()):
        container[key] = data.draw(VALUES)
    else:
        del container[key]
    row = written(tmp_path_factory.getbasetemp(), content)
    json.dumps(foreign.table_rows([row]))
    assert row.error is not None or row.metrics


# --- the table -------------------------------------------------------------------------------


def test_rows_of_the_table_have_the_keys_of_ours(tmp_path: Path) -> None:
    """A column that `compare.table` gains must come here too, if only as None."""
    from test_compare import entry

    ours = compare.table([entry("lora", 8, 0, {"nll": 1.0})])["rows"][0]
    rows = foreign.table_rows(foreign.read(HERE))
    assert len(rows) == len(SUCCESSFUL) + 1  # and RLMath
    for row in rows:
        assert set(row) == set(ours) | {"foreign"}
        assert row["foreign"]["verdict"] == foreign.ONE_SEED
        assert len(row["seeds"]) == 1
        for values in row["metrics"].values():
            assert all(one["n"] == 1 and one["sd"] is None for one in values.values())
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [row["foreign"]["name"] for row in rows] == sorted(r["foreign"]["name"] for r in rows)


def test_a_row_of_the_table_carries_the_interval_and_the_setting_that_was_asked_for() -> None:
    (row,) = foreign.table_rows([row_of("2026-09_newest_lora")], ["lora.r", "head.policy"])
    assert row["setting"] == {"lora.r": 24, "head.policy": None}
    low, high = proportion_confint(642, 1319, method="wilson")
    assert row["foreign"]["intervals"]["test"] == pytest.approx(
        {"low": low, "high": high, "num_examples": 1319}, abs=1e-12
    )
    assert row["other_stack"] == [
        "PEFT's benchmark (peft 0.21.0, transformers 5.13.1, torch 2.13.0+cu130, "
        "commit 0123456789abcdef0123456789abcdef01234567, branch main, device Example GPU)"
    ]


def test_reading_needs_neither_torch_nor_scipy() -> None:
    code = (
        "import sys; from pathlib import Path; from lorabench.compare import foreign; "
        f"foreign.table_rows(foreign.read(Path({str(HERE)!r}))); "
        "print([name for name in ('torch', 'peft', 'scipy', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
