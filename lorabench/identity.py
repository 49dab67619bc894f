"""What names a training and an evaluation: two hashes over what decides each, and nothing else.

Two spellings of one setting are one run, so the run id is made of what a config resolves to:
modules with their ranks and scales, stages as the modules they train, content hashes in place of
paths. Keys that only decide how a run is scored belong to the evaluation's id.

A config key that is added later must change no id while it has the value that does what earlier
versions did: it goes into NEUTRAL with that value.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from lorabench.config import Config, parts
from lorabench.record import ARITHMETIC_VERSION
from lorabench.stages import Stages
from lorabench.versions import installed

# Keys that decide how a saved adapter is scored, and nothing about its training; `lorabench
# evaluate` takes these. A name that ends in a dot or an underscore stands for all that begin so.
EVALUATION_KEYS = (
    "data.metric",
    "data.answer_",
    "data.test.",
    "data.num_test",
    "data.tests.",
    "data.retention.",
    "data.validation.",
    "data.num_validation",
    "trainer.eval_",
    "objective",
)
# Keys that decide a training only through what they resolve to: content hashes stand for sources,
# modules with their ranks and scales for LoRA's settings, steps for epochs and
# for a warm-up's share. What they resolve to is in the run id.
RESOLVED = {
    "model": {"path", "revision"},
    "data": {
        "source", "skills", "min_word_length", "max_word_length", "gym", "gym_seed", "train",
        "mixture", "prompt", "completion", "format", "messages", "text", "system", "merge_turns",
        "loss_on", "tools",
        "labels", "split_by", "validation_fraction", "test_fraction", "num_train",
    },
    "trainer": {"epochs", "warmup_ratio"},
    "lora": {"r", "lora_alpha", "alpha_ratio", "use_rslora", "rank_pattern", "alpha_pattern"},
}  # fmt: skip
# Keys of the same groups that change no result: labels, places, logs.
NOT_DECIDING = {
    "model": {"name", "allow_kernel_code"},
    "data": {"name", "allow_left_out"},
    # Whether a pack is compiled lies with the pack, as its shape does.
    "trainer": {
        "device", "num_threads", "checkpoint_every", "checkpoint_minutes", "log_every", "compile",
    },
}
# Keys of the evaluation that decide a training which looks at validation: see `selects`.
SELECTION_KEYS = (
    "objective", "trainer.eval_every", "trainer.eval_examples", "trainer.eval_batch_size",
)  # fmt: skip
# Keys added since arithmetic version 3, at the value that does what runs before them did.
NEUTRAL: dict[str, Any] = {
    "lora.loraplus_lr_ratio": None,
    "data.format": "prompt_completion",
    "data.messages": None,
    "data.text": "{text}",
    "data.system": "template",
    "data.merge_turns": False,
    "data.loss_on": "all",
    "data.tools": "tools",
    "data.chat_template_kwargs": None,
    "data.too_long": "leave_out",
    "data.mixture": [],
    "data.train.sample_by": "document",
    "data.gym": None,
    "data.gym_seed": 0,
    "trainer.epochs": None,
    "trainer.warmup_ratio": None,
    "trainer.min_lr_ratio": 0.0,
    "trainer.keep": "last",
    "trainer.patience": None,
    "start_from": None,
}


def is_of_evaluation(key: str) -> bool:
    """Whether a dotted key only decides how a run is scored."""
    return any(
        key == name or (name[-1] in "._" and key.startswith(name)) or key == name.rstrip(".")
        for name in EVALUATION_KEYS
    )


def training(
    config: Config,
    contents: dict[str, str],
    ranks: dict[str, int],
    scales: dict[str, float],
    trained: Iterable[str],
    labels: list[str],
    definitions: dict[str, str],
) -> dict[str, Any]:
    """Return what decides a training, canonically: the content that the run id is the hash of.

    Args:
        contents: hashes of base, tokenizer, a chat template that is given, data, and of the adapter
            it starts from.
        ranks, scales: of each adapted module, patterns included.
        trained: every module that trains, adapted or in full.
        labels: of a classification, in the order of their numbers.
        definitions: the version of each metric.
    """
    groups = dataclasses.asdict(config)
    chosen = _selection(config, contents, definitions) if selects(groups["trainer"]) else {}
    for group in ("model", "data", "lora", "trainer", "seeds"):
        groups[group] = {
            key: value
            for key, value in groups[group].items()
            if key not in RESOLVED.get(group, ())
            and key not in NOT_DECIDING.get(group, ())
            and not is_of_evaluation(f"{group}.{key}")
            and not _is_neutral(f"{group}.{key}", value)
        }
    trainer = groups["trainer"]
    trainer["micro_batch_size"] = trainer["micro_batch_size"] or trainer["batch_size"]
    base = {name: contents[name] for name in ("hub", "revision", "weights")}
    return {
        "arithmetic": ARITHMETIC_VERSION,
        "task": config.task,
        "model": groups["model"] | base,
        "tokenizer": contents["tokenizer"],
        "data": groups["data"]
        | _chat(config, contents)
        | {
            "train": contents["train"],
            "labels": labels,
        },
        "modules": {name: [ranks[name], scales[name]] for name in sorted(ranks)},
        "head": config.head.policy,
        "lora": groups["lora"],
        "trainer": trainer,
        "stages": [
            [stage.step, dict(sorted(stage.lr_scale.items()))]
            + ([dict(sorted(stage.rewarm_steps.items()))] if stage.rewarm_steps else [])
            for stage in Stages(config.stages, trained).all
        ],
        "seeds": groups["seeds"],
        **({"start": contents["start"]} if config.start_from is not None else {}),
    } | chosen


def _chat(config: Config, contents: dict[str, str]) -> dict[str, Any]:
    """Return what stands for `data.chat_template`, and where the turns of conversations may end.

    A template that is given counts by its text; a conversation takes the tokenizer's own, with
    false as with true.
    """
    found: dict[str, Any] = {}
    if "stops" in contents:
        found = {"stops": contents["stops"], "chat_template": True}
    if "chat_template" in contents:
        found["chat_template"] = contents["chat_template"]
    return found


def selects(trainer: dict[str, Any]) -> bool:
    """Whether validation decides what is saved: the best adapter is kept, or a run stops early."""
    return trainer.get("keep") == "best" or trainer.get("patience") is not None


def _selection(
    config: Config, contents: dict[str, str], definitions: dict[str, str]
) -> dict[str, Any]:
    """What decides the validation values that a training looks at."""
    metric = config.objective.partition("/")[2]
    found: dict[str, Any] = {key: value_of(config, key) for key in SELECTION_KEYS}
    found |= {"examples": contents["validation"], "definition": definitions[metric]}
    if metric.startswith("answer"):
        found |= _answer_settings(config)
    return {"selection": found}


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


def _answer_settings(config: Config) -> dict[str, Any]:
    data = dataclasses.asdict(config.data)
    return {
        key: data[key]
        for key in sorted(data)
        if key.startswith("answer_") and not _is_neutral(f"data.{key}", data[key])
    }


def _is_neutral(key: str, value: Any) -> bool:
    """Whether a key that was added later does what versions without it did."""
    return key in NEUTRAL and bool(NEUTRAL[key] == value)


def wanted_metrics(config: Config) -> list[str]:
    """The metrics to score: those of data.metric, and the objective's."""
    return list(dict.fromkeys([*config.data.metric, config.objective.partition("/")[2]]))


def splits_of(config: Config) -> list[str]:
    """The splits that an evaluation scores: validation, test, and the named test sets."""
    return ["validation", "test", *parts.named_sets(config.data)]


def metrics_of(config: Config, split: str) -> list[str]:
    """The metrics to score a split with.

    Retention has `nll`, and `exact_match` where it has completions; other named sets have those of
    test. Of continued text there is the likelihood alone.
    """
    wanted, part = wanted_metrics(config), parts.named_sets(config.data).get(split)
    if part is not None:
        if split == parts.RETENTION:
            wanted = ["nll", "exact_match"]
        if (part.format or config.data.format) == "text":
            wanted = [name for name in wanted if name in ("nll", "nll_per_token")] or ["nll"]
    if split not in answer_splits(config):
        wanted = [name for name in wanted if not name.startswith("answer")]
    return wanted


def evaluation(
    config: Config, contents: dict[str, str], definitions: dict[str, str]
) -> dict[str, Any]:
    """Return what decides the scores of an adapter: the settings of an evaluation.

    Args:
        contents: hashes of the validation and test examples, and of the named sets.
        definitions: the version of each metric.
    """
    metrics, named = wanted_metrics(config), parts.named_sets(config.data)
    metrics += [name for one in named for name in metrics_of(config, one) if name not in metrics]
    settings: dict[str, Any] = {
        "definitions": {name: definitions[name] for name in sorted(set(metrics))},
        "examples": {one: contents[parts.key_of(one)] for one in splits_of(config)},
        "eval_examples": config.trainer.eval_examples,
        "eval_batch_size": config.trainer.eval_batch_size,
    }
    if any(map(is_generated, metrics)):
        settings |= _answer_settings(config)
        settings["answer_splits"] = answer_splits(config)
    if "gym" in metrics:  # what the examples do not say of how they are scored
        settings["gym"] = {"reasoning_gym": installed("reasoning-gym"), "tasks": config.data.gym}
    return settings


def is_generated(metric: str) -> bool:
    """Return whether a metric is about generated text."""
    return metric == "gym" or metric.startswith("answer")


def answer_splits(config: Config) -> list[str]:
    """The splits to generate answers on.

    They are test, named test sets that have completions, and validation where the objective asks
    for it.
    """
    split, _, metric = config.objective.partition("/")
    named = [
        name
        for name, part in (config.data.tests or {}).items()
        if (part.format or config.data.format) != "text"
    ]
    is_asked = split == "validation" and is_generated(metric)
    return ["validation"] * is_asked + ["test", *named]


def short_hash(content: Any) -> str:
    """First 12 hex digits of sha256 over canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
