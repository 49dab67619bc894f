"""One result file of PEFT's benchmark -> what it says, in our names and units.

The benchmark is method_comparison/ of PEFT's repository. Its keys changed over time; `_Result`
names those of all files published from February 2025 to September 2026. Imports without torch.

Source: method_comparison/{MetaMathQA,image-gen,RLMath}/{run,utils}.py of huggingface/peft.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, Field, ValidationError

from lorabench.config import flatten
from lorabench.config.errors import first_line

FULL_FINE_TUNING = "full-finetuning"  # as PEFT's own table calls a run without an adapter
# MetaMathQA/data.py tests on all of GSM8K's test split and validates on 50 of its train split. The
# files do not say so: a count is used only where the accuracy is a whole number of right answers.
GSM8K = {"test": 1319, "validation": 50}
FORGETTING_FIXED = "2026-07-10"  # opened on this day: https://github.com/huggingface/peft/pull/3419
METRICS = {  # key of an entry of train_info.metrics -> split and name
    "test accuracy": ("test", "accuracy"),
    "valid accuracy": ("validation", "accuracy"),
    "test dino_similarity": ("test", "dino_similarity"),
    "valid dino_similarity": ("validation", "dino_similarity"),
    "forgetting": ("test", "forgetting"),  # measured with the test, on texts outside of the task
    "drift": ("test", "drift"),  # the same of images
    "train loss": ("train", "loss"),  # mean of the last eval_steps steps
}
OF_RL = {"test_pass_at_1": ("test", "accuracy"), "valid_pass_at_1": ("validation", "accuracy")}
# Keys of train_config that lorabench has a key for. Of a LoRA config these are spelled the same.
OF_TRAINING = {
    "max_steps": "trainer.steps",
    "batch_size": "trainer.batch_size",
    "max_seq_length": "data.max_length",
    "dtype": "model.dtype",
    "optimizer_kwargs.lr": "trainer.lr",
    "learning_rate": "trainer.lr",
}
OF_LORA = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora")
NOT_A_SETTING = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode",
}  # fmt: skip


class _RunInfo(BaseModel):
    experiment_name: str
    created_at: str | None = None
    total_time: float | None = None
    peft_branch: str | None = None
    train_config: dict[str, Any] = {}
    # None: full fine-tuning. Files of February 2025 have a hash of the config instead of this key.
    peft_config: dict[str, Any] | None = None
    error_msg: str | None = None


class _TrainInfo(BaseModel):
    status: str
    metrics: list[dict[str, Any]] = []
    train_time: float | None = None
    file_size: float | None = None
    num_trainable_params: int | None = None
    num_total_params: int | None = None
    peak_memory: float | None = Field(
        None, validation_alias=AliasChoices("accelerator_memory_max", "cuda_memory_max")
    )
    error: str | None = None


class _MetaInfo(BaseModel):
    model_info: dict[str, Any] | None = None
    model_sha: str | None = None  # until March 2025
    dataset_info: dict[str, Any] | None = None
    package_info: dict[str, Any] | None = None
    system_info: dict[str, Any] | None = None


class _Result(BaseModel):
    run_info: _RunInfo
    train_info: _TrainInfo
    rl_eval_info: dict[str, Any] = {}  # RLMath
    meta_info: _MetaInfo = _MetaInfo()


@dataclass(frozen=True)
class ForeignRow:
    """One result file. What the file does not say is None.

    Args:
        name: the experiment, such as lora/llama-3.2-3B-rank32; the file's name if it has none.
        status: as the file says; only "success" has scores.
        created: ISO time the run began.
        peft_type: as PEFT spells it, such as LORA, or full-finetuning.
        setting: dotted keys: lorabench's where it has one, else `peft.` and PEFT's.
        metrics: by split and name. `accuracy` is the share of generated answers that are right by
            PEFT's parser; `forgetting` the change of the loss on Wikipedia text, in nats per token.
        num_examples: by split, as far as it is known.
        train_seconds: of the training steps; see `notes` where the file only has a longer time.
        peak_memory_bytes: reserved by the allocator, evaluation included.
        versions: of peft, transformers and torch; peft's commit and branch; the device.
        notes: what makes a number mean something else than in lorabench's own rows.
        error: why there is nothing to compare, as `path: what is wrong`; None: there is.
    """

    path: Path
    name: str
    status: str | None = None
    created: str | None = None
    peft_type: str | None = None
    model: str | None = None
    seed: int | None = None
    setting: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    num_examples: dict[str, int] = field(default_factory=dict)
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    train_seconds: float | None = None
    total_seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    file_size_bytes: int | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: str | None = None


def row_of(file: Path) -> ForeignRow:
    """Return what one file says; with `error` where it cannot be used."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        return _unusable(file, f"cannot be read: {first_line(error)}; check its rights")
    except (ValueError, RecursionError) as error:
        return _unusable(file, f"must be JSON; it is damaged: {first_line(error)}; get it again")
    try:
        return _read(file, _Result.model_validate(content))
    except ValidationError as error:
        return _unusable(file, _why_not(content, error))
    except RecursionError:
        return _unusable(
            file, "must be a result of PEFT's method_comparison; it is nested too deep"
        )


def _unusable(file: Path, why: str) -> ForeignRow:
    return ForeignRow(file, file.stem, error=f"{file}: {why}")


def _why_not(content: Any, error: ValidationError) -> str:
    if isinstance(content, dict) and ("generation_info" in content or "peft_method" in content):
        return "measures the speed and memory of generation, not a training; leave it out"
    if not isinstance(content, dict) or "run_info" not in content:
        return "must be a result of PEFT's method_comparison; it has no run_info; leave it out"
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"must be a result of PEFT's method_comparison; {where}: {first['msg']}; get it again"


def _read(file: Path, result: _Result) -> ForeignRow:
    run, train, meta = result.run_info, result.train_info, result.meta_info
    config, peft = run.train_config, run.peft_config or {}
    packages, system = meta.package_info or {}, meta.system_info or {}
    metrics = _metrics(result)
    seconds, tokens = _steps(train.metrics)
    seed = config.get("seed")
    kind = peft.get("peft_type")
    if run.peft_config is None and "peft_config" in run.model_fields_set:
        kind = FULL_FINE_TUNING
    model = config.get("model_id") or peft.get("base_model_name_or_path")
    revision = (meta.model_info or {}).get("sha") or meta.model_sha
    setting = {
        "experiment": run.experiment_name, "peft_type": kind, "model.path": model,
        "model.revision": revision,
    } | _setting(config, peft)  # fmt: skip
    return ForeignRow(
        path=file,
        name=run.experiment_name,
        status=train.status,
        created=run.created_at,
        peft_type=kind,
        model=model,
        seed=seed if isinstance(seed, int) else None,
        setting={key: value for key, value in setting.items() if value is not None},
        metrics=metrics,
        num_examples=_num_examples(result, metrics),
        trainable_parameters=train.num_trainable_params,
        total_parameters=train.num_total_params,
        train_seconds=_number(train.train_time) if seconds is None else seconds,
        total_seconds=_number(run.total_time),
        tokens_per_second=tokens / seconds if tokens and seconds else None,
        peak_memory_bytes=_whole(train.peak_memory),
        file_size_bytes=_whole(train.file_size),
        versions={
            "peft": packages.get("peft-version"),
            "transformers": packages.get("transformers-version"),
            "torch": packages.get("torch-version"),
            "commit": packages.get("peft-commit-hash"),
            "branch": run.peft_branch,
            "device": system.get("accelerator") or system.get("gpu"),
        },
        notes=tuple(_notes(result, metrics, seconds)),
        error=_error(file, result, metrics),
    )


def _error(file: Path, result: _Result, metrics: dict[str, dict[str, float]]) -> str | None:
    train = result.train_info
    if train.status != "success":
        why = train.error or result.run_info.error_msg
        text = f"its run did not finish: status {train.status}"
        return f"{file}: {text}{f', {why.strip().splitlines()[0]}' if why and why.strip() else ''}"
    if "test" not in metrics and "validation" not in metrics:
        return f"{file}: no score on a test or validation split"
    for split, values in metrics.items():
        if not 0 <= values.get("accuracy", 0) <= 1:
            return f"{file}: {split} accuracy must be in [0, 1]; got {values['accuracy']}"
    return None


def _number(value: Any) -> float | None:
    """A finite number, or None: image-gen has written NaN."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if abs(value) < 1e300 else None  # NaN, infinity and endless digits


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _metrics(result: _Result) -> dict[str, dict[str, float]]:
    """The last value of every metric, by split and name."""
    last = {key: value for entry in result.train_info.metrics for key, value in entry.items()}
    found = {place: last.get(key) for key, place in METRICS.items()}
    found |= {
        place: result.rl_eval_info[key]
        for key, place in OF_RL.items()
        if key in result.rl_eval_info
    }
    metrics: dict[str, dict[str, float]] = {}
    for (split, name), value in found.items():
        if (number := _number(value)) is not None:
            metrics.setdefault(split, {})[name] = number
    return metrics


def _num_examples(result: _Result, metrics: dict[str, dict[str, float]]) -> dict[str, int]:
    config = result.run_info.train_config
    said = {
        "test": result.rl_eval_info.get("num_eval_samples", config.get("test_size")),
        "validation": config.get("valid_size"),
    }
    found = {split: n for split, value in said.items() if (n := _whole(value) or 0) >= 1}
    if "gsm8k" in (result.meta_info.dataset_info or {}):
        for split, count in GSM8K.items():
            right = metrics.get(split, {}).get("accuracy", math.nan) * count
            if abs(math.remainder(right, 1)) < 1e-6:  # rounding is 1e-13; NaN is no accuracy
                found.setdefault(split, count)
    return found


def _steps(entries: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Seconds of all training steps, and their tokens; None unless the entries cover every step."""
    timed = [one for one in entries if _number(one.get("train time")) is not None]
    last = max((_number(one.get("step")) or 0 for one in entries), default=0)
    if not timed or timed[-1].get("step") != last:
        return None, None
    tokens = [_number(one.get("train total tokens")) for one in entries]
    return math.fsum(one["train time"] for one in timed), tokens[-1]


def _setting(config: dict[str, Any], peft: dict[str, Any]) -> dict[str, Any]:
    known, kind = flatten(config), peft.get("peft_type")
    found = {ours: known[theirs] for theirs, ours in OF_TRAINING.items() if theirs in known}
    for key, value in peft.items():
        # AdaLoRA's rank_pattern is an outcome of the training: a mask per module.
        if key in NOT_A_SETTING or (key == "rank_pattern" and kind == "ADALORA"):
            continue
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            value = sorted(value)  # PEFT writes sets: another order is not another setting
        name = f"peft.{key}"
        if key == "target_modules":
            name = "target_modules.names"
        elif key in OF_LORA and kind == "LORA":
            name = f"lora.{key}"
        found |= flatten(value, f"{name}.")
    return {key: value for key, value in found.items() if value is not None and value != []}


def _notes(
    result: _Result, metrics: dict[str, dict[str, float]], seconds: float | None
) -> Iterator[str]:
    run, train = result.run_info, result.train_info
    if run.peft_branch not in (None, "main"):
        yield f"ran on branch {run.peft_branch}, not on PEFT's main"
    if seconds is None and train.train_time is not None and not result.rl_eval_info:
        yield "train seconds include loading the data and the evaluation on the test split"
    if train.peak_memory is not None:
        yield "peak memory is what the allocator reserved, evaluation included"
    if "forgetting" in metrics.get("test", {}) and (run.created_at or "") < FORGETTING_FIXED:
        yield "forgetting predates a fix (PEFT #3419): not comparable with that of later files"
