"""The ranges of trainer and stages: see `ranges`."""

from __future__ import annotations

import math
import re
from typing import Any

from lorabench.config.choices import Found
from lorabench.config.errors import did_you_mean
from lorabench.config.schema import Config

STAGE_KEYS = ("from_step", "from_epoch", "train", "lr_scale", "rewarm_steps")


def trainer(found: Found, config: Config) -> None:
    must, one_of, trainer = found.must, found.one_of, config.trainer
    micro = trainer.micro_batch_size
    must(
        micro is None or (micro >= 1 and trainer.batch_size % micro == 0),
        "trainer.micro_batch_size",
        f"a divisor of trainer.batch_size={trainer.batch_size}",
        micro,
    )
    steps, epochs = trainer.steps, trainer.epochs
    if (steps is None) == (epochs is None):
        got, remedy = "neither", "set trainer.steps=300"
        if epochs is not None:
            got, remedy = (
                f"both ({steps} and {epochs:g})",
                "set trainer.steps=null, or leave out epochs",
            )
        found.errors.append(
            f"trainer.epochs: exactly one of trainer.steps and trainer.epochs must be set; "
            f"got {got}; {remedy}"
        )
    must(steps is None or steps >= 1, "trainer.steps", "at least 1", steps)
    must(
        epochs is None or (math.isfinite(epochs) and epochs > 0),
        "trainer.epochs",
        "above 0",
        epochs,
    )
    for key in ("batch_size", "eval_batch_size", "log_every"):
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
    one_of("trainer.compile", trainer.compile)
    ratio, floor = trainer.warmup_ratio, trainer.min_lr_ratio
    must(ratio is None or 0 <= ratio < 1, "trainer.warmup_ratio", "in [0, 1) or null", ratio)
    must(
        ratio is None or trainer.warmup_steps == 0,
        "trainer.warmup_ratio",
        f"null with trainer.warmup_steps={trainer.warmup_steps}",
        ratio,
        "set one of the two",
    )
    must(0 <= floor < 1, "trainer.min_lr_ratio", "in [0, 1)", floor)
    must(
        floor == 0 or trainer.schedule != "constant",
        "trainer.min_lr_ratio",
        "0 with trainer.schedule=constant, which never falls",
        floor,
        "use trainer.schedule=cosine",
    )
    one_of("trainer.dtype", trainer.dtype)
    must(
        trainer.dtype in (config.model.dtype, "auto")
        or config.model.dtype == "auto"  # checked once it is known
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


def selection(found: Found, config: Config) -> None:
    """Keeping the best adapter and stopping early: both look at validation during training."""
    must, trainer = found.must, config.trainer
    found.one_of("trainer.keep", trainer.keep)
    patience = trainer.patience
    must(patience is None or patience >= 1, "trainer.patience", "at least 1 or null", patience)
    asked = [f"trainer.keep={trainer.keep}"] if trainer.keep == "best" else []
    asked += [f"trainer.patience={patience}"] if patience is not None else []
    if not asked:
        return
    must(
        trainer.eval_every >= 1,
        "trainer.eval_every",
        f"at least 1 with {asked[0]}",
        trainer.eval_every,
        "set the steps between evaluations, such as trainer.eval_every=50",
    )
    must(
        config.objective.startswith("validation/"),
        "objective",
        f"of validation with {asked[0]}: test must not choose",
        config.objective,
        "use objective=validation/nll",
    )


def stages(found: Found, config: Config) -> None:
    must, steps, before, epochs = found.must, config.trainer.steps, 0, 0.0
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
        whole = _is_number(start, int)
        if entry.get("from_epoch") is not None:
            epochs = _begins_by_epoch(found, entry, key, i == 0, epochs)
        elif i == 0:
            must(whole and start == 0, f"{key}.from_step", "0 in the first stage", start)
        else:
            must(
                whole and start >= before,
                f"{key}.from_step",
                f"a whole number, at least {before} as in the stage before",
                start,
            )
        if whole and steps is not None and start >= steps and start not in late:
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
        number = _is_number(scale, int, float)
        must(number and 0 < scale < math.inf, f"{key}.lr_scale", "above 0", scale)
        rewarm = entry.get("rewarm_steps", 0)
        whole = _is_number(rewarm, int)
        must(whole and rewarm >= 0, f"{key}.rewarm_steps", "a whole number, at least 0", rewarm)


def _begins_by_epoch(
    found: Found, entry: dict[str, Any], key: str, is_first: bool, before: float
) -> float:
    """Check a stage's `from_epoch`, and return the latest one so far.

    Whether it is in order with stages that begin at a step is known once it is a step itself.
    """
    start, step = entry["from_epoch"], entry.get("from_step")
    law = "left out beside from_epoch"
    found.must(step is None, f"{key}.from_step", law, step, "keep one of the two")
    valid = _is_number(start, int, float) and math.isfinite(start)
    if is_first:
        found.must(valid and start == 0, f"{key}.from_epoch", "0 in the first stage", start)
    else:
        law = f"a number, at least {before:g} as in the stages before"
        found.must(valid and start >= before, f"{key}.from_epoch", law, start)
    return max(before, start) if valid else before


def _is_number(value: Any, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)
