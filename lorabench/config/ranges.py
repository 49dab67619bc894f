"""The range of every value: the law, what came, the remedy, one line each."""

from __future__ import annotations

import math
import re
from typing import Any

from lorabench.config.errors import did_you_mean
from lorabench.config.schema import CompareConfig, Config, DataConfig, LoraSettings, keys

TASKS = ("causal_lm", "seq_cls")
DTYPES = ("float64", "float32", "bfloat16")
METRICS_OF = {
    "causal_lm": ("nll", "exact_match", "nll_per_token", "answer", "answer_flexible", "gym"),
    "seq_cls": ("nll", "accuracy"),
}
METRICS = tuple(dict.fromkeys(name for names in METRICS_OF.values() for name in names))
# The values that a key can take, or the elements of a list.
CHOICES: dict[str, tuple[str, ...]] = {
    "task": TASKS,
    "model.dtype": DTYPES,
    "model.attn_implementation": ("sdpa", "eager", "flash_attention_2"),
    "target_modules.select": ("auto", "attention", "mlp", "all-linear", "custom"),
    "head.policy": ("exclude", "lora", "full"),
    "lora.bias": ("none", "lora_only", "all"),
    "lora.init": ("default", "gaussian", "olora", "orthogonal", "pissa"),
    "data.source": ("skills", "gym", "jsonl", "hub"),
    "data.metric": METRICS,
    "trainer.schedule": ("constant", "linear", "cosine"),
    "trainer.dtype": DTYPES,
    "tracker.kind": ("wandb", "none"),
    "tracker.mode": ("offline", "online", "disabled"),
}
STAGE_KEYS = ("from_step", "train", "lr_scale")


class Found:
    """The errors so far, and the two laws most of them break."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def must(self, holds: bool, key: str, law: str, got: Any, remedy: str = "") -> None:
        if not holds:
            remedy = f"; {remedy}" if remedy else ""
            self.errors.append(f"{key}: must be {law}; got {got!r}{remedy}")

    def one_of(self, key: str, got: str) -> None:
        allowed = CHOICES[key]
        if got not in allowed:
            self.errors.append(
                f"{key}: must be one of {', '.join(allowed)}; got {did_you_mean(str(got), allowed)}"
            )


def range_errors(config: Config) -> list[str]:
    """Every value of a config that is out of its range."""
    found = Found()
    _task(found, config)
    _targets(found, config)
    _lora(found, config.lora)
    _data(found, config.data)
    _trainer(found, config)
    _stages(found, config)
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
    for key, value in (("chat_template", False), ("add_bos", True), ("add_eos", True)):
        law = f"left out with task={task}, which takes the tokenizer's own special tokens"
        must(getattr(data, key) == value, f"data.{key}", law, not value)


def _targets(found: Found, config: Config) -> None:
    must, one_of = found.must, found.one_of
    one_of("model.dtype", config.model.dtype)
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


def _data(found: Found, data: DataConfig) -> None:
    must, one_of = found.must, found.one_of
    one_of("data.source", data.source)
    if data.source == "skills":
        must(bool(data.skills), "data.skills", "at least one skill", data.skills)
        must(
            1 <= data.min_word_length <= data.max_word_length,
            "data.min_word_length",
            f"in [1, max_word_length={data.max_word_length}]",
            data.min_word_length,
        )
    elif data.source == "gym":
        remedy = "for example data.gym={chain_sum: {max_terms: 3}}"
        tasks = data.gym if isinstance(data.gym, dict) else {}
        must(bool(tasks), "data.gym", "a mapping of tasks to their settings", data.gym, remedy)
        for task, settings in tasks.items():
            holds = settings is None or isinstance(settings, dict)
            must(holds, f"data.gym.{task}", "a mapping of settings, or null", settings, remedy)
        must(data.gym_seed >= 0, "data.gym_seed", "at least 0", data.gym_seed)
    else:
        must(
            data.train.path is not None,
            "data.train.path",
            "a file" if data.source == "jsonl" else "a dataset id or folder",
            None,
            "set data.train.path=...",
        )
    if data.source != "gym":
        must(data.gym is None, "data.gym", f"null with data.source={data.source}", data.gym)
        must("gym" not in data.metric, "data.metric", "without gym where data.source is not gym",
             "gym", "use data=gym")  # fmt: skip
    must(bool(data.metric), "data.metric", f"a list out of {', '.join(METRICS)}", data.metric)
    for metric in data.metric:
        one_of("data.metric", metric)
    must(
        "answer" not in data.metric or data.answer_pattern is not None,
        "data.answer_pattern",
        "a regular expression where data.metric asks for answer",
        data.answer_pattern,
    )
    if data.answer_pattern is not None:
        try:
            re.compile(data.answer_pattern)
        except re.error as error:
            found.errors.append(f"data.answer_pattern: must be a regular expression; {error}")
    must(
        all(data.answer_stop),
        "data.answer_stop",
        "a list of texts, none of them empty",
        data.answer_stop,
        "for example data.answer_stop=['Question:']",
    )
    must(data.max_length >= 2, "data.max_length", "at least 2 tokens", data.max_length)
    for key in ("num_train", "num_validation", "num_test"):
        value = getattr(data, key)
        must(value is None or value >= 1, f"data.{key}", "at least 1", value)
    for key in ("answer_examples", "answer_max_new_tokens"):
        must(getattr(data, key) >= 1, f"data.{key}", "at least 1", getattr(data, key))
    for key in ("validation_fraction", "test_fraction"):
        must(0 < getattr(data, key) < 1, f"data.{key}", "in (0, 1)", getattr(data, key))
    must(
        data.validation_fraction + data.test_fraction < 1,
        "data.test_fraction",
        "such that some examples are left to train on",
        data.test_fraction,
    )


def _trainer(found: Found, config: Config) -> None:
    must, one_of, trainer = found.must, found.one_of, config.trainer
    micro = trainer.micro_batch_size
    must(
        micro is None or (micro >= 1 and trainer.batch_size % micro == 0),
        "trainer.micro_batch_size",
        f"a divisor of trainer.batch_size={trainer.batch_size}",
        micro,
    )
    for key in ("steps", "batch_size", "eval_batch_size", "log_every"):
        must(getattr(trainer, key) >= 1, f"trainer.{key}", "at least 1", getattr(trainer, key))
    for key in ("warmup_steps", "eval_every", "checkpoint_every"):
        must(getattr(trainer, key) >= 0, f"trainer.{key}", "at least 0", getattr(trainer, key))
    minutes = trainer.checkpoint_minutes
    must(
        math.isfinite(minutes) and minutes >= 0, "trainer.checkpoint_minutes", "0 or more", minutes
    )
    must(math.isfinite(trainer.lr) and trainer.lr > 0, "trainer.lr", "above 0", trainer.lr)
    must(trainer.weight_decay >= 0, "trainer.weight_decay", "at least 0", trainer.weight_decay)
    must(trainer.eps > 0, "trainer.eps", "above 0", trainer.eps)
    for key in ("beta1", "beta2"):
        must(0 <= getattr(trainer, key) < 1, f"trainer.{key}", "in [0, 1)", getattr(trainer, key))
    must(
        trainer.max_grad_norm is None or trainer.max_grad_norm > 0,
        "trainer.max_grad_norm",
        "above 0 or null",
        trainer.max_grad_norm,
    )
    must(
        trainer.num_threads is None or trainer.num_threads >= 1,
        "trainer.num_threads",
        "at least 1 or null",
        trainer.num_threads,
    )
    one_of("trainer.schedule", trainer.schedule)
    one_of("trainer.dtype", trainer.dtype)
    must(
        trainer.dtype == config.model.dtype
        or (trainer.dtype, config.model.dtype) == ("bfloat16", "float32"),
        "trainer.dtype",
        f"model.dtype={config.model.dtype}, or bfloat16 (autocast) over float32",
        trainer.dtype,
    )
    must(
        re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", trainer.device) is not None,
        "trainer.device",
        "auto, cpu, mps, cuda or cuda:N",
        trainer.device,
    )


def _stages(found: Found, config: Config) -> None:
    must, steps, before = found.must, config.trainer.steps, 0
    late: set[int] = set()  # said once a step, however many entries begin there
    for i, entry in enumerate(config.stages):
        key, example = f"stages[{i}]", "{from_step: 0, train: [layer.11], lr_scale: 0.5}"
        if not isinstance(entry, dict):
            must(False, key, f"a mapping such as {example}", entry)
            continue
        found.errors += [
            f"{key}.{name}: no such key; got {did_you_mean(str(name), STAGE_KEYS)}"
            for name in entry
            if name not in STAGE_KEYS
        ]
        start: Any = entry.get("from_step")
        names, scale = entry.get("train"), entry.get("lr_scale", 1.0)
        whole = isinstance(start, int) and not isinstance(start, bool)
        if i == 0:
            must(whole and start == 0, f"{key}.from_step", "0 in the first stage", start)
        else:
            must(
                whole and start >= before,
                f"{key}.from_step",
                f"a whole number, at least {before} as in the stage before",
                start,
            )
        if whole and start >= steps and start not in late:
            late.add(start)
            must(
                False,
                f"{key}.from_step",
                f"below trainer.steps={steps}",
                start,
                "raise trainer.steps, or give a stages file that begins earlier",
            )
        before = max(before, start) if whole else before
        must(
            isinstance(names, list) and bool(names) and all(isinstance(n, str) for n in names),
            f"{key}.train",
            "a list of module names, at least one",
            names,
            "for example train: [layer.11], or train: [all]",
        )
        number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        must(number and 0 < scale < math.inf, f"{key}.lr_scale", "above 0", scale)


def _rest(found: Found, config: Config) -> None:
    must, one_of, tracker = found.must, found.one_of, config.tracker
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
