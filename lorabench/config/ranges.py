"""The range of every value: the law, what came, the remedy, one line each."""

from __future__ import annotations

import math
import re

from lorabench.config import data_ranges, parts, training
from lorabench.config.choices import METRICS, METRICS_OF, TASKS, Found
from lorabench.config.errors import did_you_mean
from lorabench.config.schema import CompareConfig, Config, LoraSettings, keys


def range_errors(config: Config) -> list[str]:
    """Every value of a config that is out of its range."""
    found = Found()
    _task(found, config)
    _targets(found, config)
    _lora(found, config.lora)
    data_ranges.check(found, config.data)
    training.trainer(found, config)
    training.selection(found, config)
    training.stages(found, config)
    _rest(found, config)
    _compare(found, config.compare)
    return found.errors


def _task(found: Found, config: Config) -> None:
    """What the task asks of the other groups."""
    must, task, data = found.must, config.task, config.data
    found.one_of("task", task)
    if task not in TASKS:
        return
    for metric in sorted(set(data.metric).intersection(METRICS).difference(METRICS_OF[task])):
        remedy = f"use data.metric=[{','.join(METRICS_OF[task][:2])}]"
        law = f"out of {', '.join(METRICS_OF[task])} with task={task}"
        must(False, "data.metric", law, metric, remedy)
    if task == "causal_lm":
        remedy = "use task=seq_cls"
        must(data.labels is None, "data.labels", f"null with task={task}", data.labels, remedy)
        return
    # A head that starts at random means nothing frozen, and an adapter on it nothing reloaded.
    must(config.head.policy == "full", "head", f"full with task={task}, whose head starts anew",
         config.head.policy, "use head=full")  # fmt: skip
    labels = data.labels
    must(
        labels is None or len(set(labels)) == len(labels) >= 2,
        "data.labels",
        "at least two different labels, or null for those of the training set",
        labels,
    )
    for key, part in parts.parts_of(data).items():
        law = f"prompt_completion with task={task}"
        must(part.format in (None, "prompt_completion"), f"{key}.format", law, part.format)
    law = f"null with task={task}, whose base has no scores that training could lose"
    must(data.retention.path is None, "data.retention.path", law, data.retention.path,
         "put it into data.tests")  # fmt: skip
    plain = {"format": "prompt_completion", "too_long": "leave_out"}
    for key, value in {"chat_template": False, "add_bos": True, "add_eos": True, **plain}.items():
        law = f"left out with task={task}, which takes the tokenizer's own special tokens"
        must(getattr(data, key) == value, f"data.{key}", law, getattr(data, key))


def _targets(found: Found, config: Config) -> None:
    must, one_of = found.must, found.one_of
    one_of("model.dtype", config.model.dtype)
    if "/" not in config.model.attn_implementation:
        one_of("model.attn_implementation", config.model.attn_implementation)
    one_of("head.policy", config.head.policy)

    targets = config.target_modules
    one_of("target_modules.select", targets.select)
    if targets.select == "custom":
        valid = isinstance(targets.names, str) or (
            isinstance(targets.names, list) and all(isinstance(n, str) for n in targets.names)
        )
        must(
            bool(targets.names) and valid,
            "target_modules.names",
            "a list of module names or one regex",
            targets.names,
            "for example target_modules.names=[q_proj,v_proj]",
        )
    else:
        must(
            targets.names is None,
            "target_modules.names",
            f"left out with target_modules={targets.select}",
            targets.names,
            "use target_modules=custom",
        )


def _lora(found: Found, lora: LoraSettings) -> None:
    must, one_of = found.must, found.one_of
    must(lora.r >= 1, "lora.r", "at least 1", lora.r)
    if lora.lora_alpha is not None and lora.alpha_ratio is not None:
        found.errors.append(
            "lora: lora_alpha and alpha_ratio both set the scale, give one of them; "
            f"got lora_alpha={lora.lora_alpha:g} and alpha_ratio={lora.alpha_ratio:g}"
        )
    for key in ("lora_alpha", "alpha_ratio", "loraplus_lr_ratio"):
        value = getattr(lora, key)
        must(value is None or (math.isfinite(value) and value > 0), f"lora.{key}", "above 0", value)
    must(0 <= lora.lora_dropout < 1, "lora.lora_dropout", "in [0, 1)", lora.lora_dropout)
    one_of("lora.bias", lora.bias)
    one_of("lora.init", lora.init)
    must(
        not (lora.use_dora and lora.init in ("olora", "pissa")),
        "lora.use_dora",
        f"false with lora.init={lora.init}",
        True,
    )
    for key, least in (
        ("rank_pattern", "a whole number of at least 1"),
        ("alpha_pattern", "above 0"),
    ):
        pattern = getattr(lora, key)
        if pattern is not None and not isinstance(pattern, dict):
            must(False, f"lora.{key}", "a mapping such as {q_proj: 8}", pattern)
            continue
        for name, value in (pattern or {}).items():
            number = isinstance(value, int if key == "rank_pattern" else (int, float))
            must(number and value > 0, f"lora.{key}.{name}", least, value)
    if lora.init == "orthogonal":
        ranks = {"lora.r": lora.r}
        if isinstance(lora.rank_pattern, dict):
            ranks |= {f"lora.rank_pattern.{name}": r for name, r in lora.rank_pattern.items()}
        for key, r in ranks.items():
            if isinstance(r, int) and r > 0:  # else it was refused above
                must(r % 2 == 0, key, "even with lora.init=orthogonal", r, f"use {r + 1}")


def _rest(found: Found, config: Config) -> None:
    must, one_of, tracker = found.must, found.one_of, config.tracker
    must(config.start_from != "", "start_from", "a run, a PEFT folder or null", config.start_from)
    must(
        config.start_from is None or config.lora.init not in ("olora", "pissa"),
        "lora.init",
        "one that leaves the base as it is with start_from",
        config.lora.init,
        "use lora.init=default",
    )
    one_of("tracker.kind", tracker.kind)
    split, _, metric = config.objective.partition("/")
    known = METRICS_OF.get(config.task, METRICS)
    must(
        split in ("validation", "test") and metric in known,
        "objective",
        f"validation/METRIC or test/METRIC, with a metric out of {', '.join(known)}",
        config.objective,
        "for example objective=validation/nll",
    )
    must(
        metric != "answer" or config.data.answer_pattern is not None,
        "objective",
        "another metric where data.answer_pattern is null",
        config.objective,
        "set data.answer_pattern=...",
    )
    must(
        metric != "gym" or config.data.source == "gym",
        "objective",
        "another metric where data.source is not gym",
        config.objective,
        "use data=gym",
    )
    must(
        config.trainer.eval_examples is None or config.trainer.eval_examples >= 1,
        "trainer.eval_examples",
        "at least 1 or null",
        config.trainer.eval_examples,
    )
    must(
        math.isfinite(config.worker.stale_seconds) and config.worker.stale_seconds >= 1,
        "worker.stale_seconds",
        "at least 1",
        config.worker.stale_seconds,
    )
    one_of("tracker.mode", tracker.mode)
    must(
        tracker.mode != "online" or tracker.kind in ("wandb", "none"),
        "tracker.mode",
        f"offline or disabled with tracker={tracker.kind}, which writes files of this machine",
        tracker.mode,
        "use tracker=wandb",
    )
    for key in ("init", "data", "dropout"):
        must(
            getattr(config.seeds, key) >= 0,
            f"seeds.{key}",
            "at least 0",
            getattr(config.seeds, key),
        )
    must(config.output_dir != "", "output_dir", "a folder", "", "use output_dir=. for this one")
    must(
        re.fullmatch(r"[\w.\-]+", config.sweep) is not None and config.sweep not in (".", ".."),
        "sweep",
        "one folder name of letters, digits, '.', '_' and '-'",
        config.sweep,
    )


def _compare(found: Found, compare: CompareConfig) -> None:
    """Names of keys, whole or their last part: what varies is known when there are runs."""
    known = [key for key in keys() if not key.startswith("compare")]
    names = {*known, *(key.rpartition(".")[2] for key in known)}
    baseline = {} if compare.baseline is None else compare.baseline
    remedy = "for example compare.baseline={lora.r: 16}"
    found.must(isinstance(baseline, dict), "compare.baseline", "{key: value}", baseline, remedy)
    given = {"vary": compare.vary, "baseline": list(baseline) if isinstance(baseline, dict) else []}
    given["select"] = [] if compare.select is None else [compare.select]
    for key, values in given.items():
        for name in (part for value in values for part in str(value).split("+")):
            if name not in names:
                got = did_you_mean(str(name), known)
                found.errors.append(f"compare.{key}: must name a key of the config; got {got}")
