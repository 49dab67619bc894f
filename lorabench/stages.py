"""Which modules train at a step, and at what part of the learning rate; knows no torch.

All modules are allocated and seeded before the first step, whichever stage they train in; a stage
only freezes and thaws them. A frozen module keeps its weights and its optimizer moments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lorabench.config import and_more, nearest

ALL = "all"  # in `train`: every module the run trains


@dataclass(frozen=True)
class Stage:
    """What trains from a step on; modules that are not here are frozen."""

    step: int  # steps done before it begins
    lr_scale: dict[str, float]  # by module: what multiplies the run's learning rate
    rewarm_steps: dict[str, int] = field(default_factory=dict)  # by module, where it re-warms

    def changes_at(self, step: int) -> bool:
        """Whether learning rates of a step (from 0) are other parts of the run's than before it."""
        return step == self.step or step <= self.step + max(self.rewarm_steps.values(), default=-1)

    def scales_at(self, step: int) -> dict[str, float]:
        """What multiplies the run's learning rate at a step (from 0), by module.

        A module that re-warms over n steps trains at (step - self.step) / n of its rate until they
        are over, so that its first step is taken at zero, as the first of `trainer.warmup_steps`.
        Source: transformers' get_constant_schedule_with_warmup.
        """
        done = step - self.step
        return self.lr_scale | {
            module: self.lr_scale[module] * min(1.0, done / n)
            for module, n in self.rewarm_steps.items()
        }


class Stages:
    """Says at each step what trains: the one place that knows."""

    def __init__(self, entries: list[dict[str, Any]], modules: Iterable[str]):
        """Resolve the entries of a config; without any, every module trains from step 0.

        Args:
            modules: everything that is trained, by full name.
        """
        known = list(dict.fromkeys(modules))
        begun: dict[int, Stage] = {}
        for entry in canonical(entries or [{"from_step": 0, "train": [ALL]}]):
            stage = begun.setdefault(entry["from_step"], Stage(entry["from_step"], {}))
            for module in matched(entry["train"], known):
                stage.lr_scale[module] = entry["lr_scale"]
                if entry["rewarm_steps"]:
                    stage.rewarm_steps[module] = entry["rewarm_steps"]
        self.all = [stage for _, stage in sorted(begun.items())]

    def at(self, step: int) -> Stage:
        """The stage that a step (from 0) belongs to: the last one begun."""
        return next(stage for stage in reversed(self.all) if stage.step <= step)


def canonical(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a config with nothing left out, once `from_epoch` is a step."""
    return [
        {
            "from_step": entry["from_step"],
            "train": list(entry["train"]),
            "lr_scale": float(entry.get("lr_scale", 1.0)),
            "rewarm_steps": int(entry.get("rewarm_steps", 0)),
        }
        for entry in entries
    ]


def matches(name: str, module: str) -> bool:
    """Whether whole dotted parts of a module's name, side by side, are `name`.

    `layer.1` is in `encoder.layer.1.output` and not in `encoder.layer.11.output`.
    """
    return name == ALL or f".{name}." in f".{module}."


def matched(names: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The modules that any of the names matches, in their order."""
    wanted = list(names)
    return [module for module in modules if any(matches(name, module) for name in wanted)]


def errors(entries: list[dict[str, Any]], modules: Iterable[str]) -> list[str]:
    """What is wrong with the stages of a config for a run that trains these modules."""
    if not entries:
        return []
    known = list(dict.fromkeys(modules))
    found = []
    placed: dict[tuple[int, str], int] = {}  # (from_step, module) -> its entry
    for i, entry in enumerate(canonical(entries)):
        for name in entry["train"]:
            if not matched([name], known):
                found.append(
                    f"stages[{i}].train: every name must be whole dotted parts of a trained "
                    f"module's name, or all; unmatched: '{name}'; {_nearest(name, known)}"
                )
        step, twice = entry["from_step"], []
        for module in matched(entry["train"], known):
            if placed.setdefault((step, module), i) != i:
                twice.append(module)
        if twice:
            found.append(
                f"stages[{i}].train: a module must be in one entry of from_step={step}; "
                f"{_some(twice)} already in stages[{placed[step, twice[0]]}]"
            )
    trained = {module for _, module in placed}
    never = [module for module in known if module not in trained]
    if never and not found:  # a name that does not match leaves its modules out, too
        found.append(
            f"stages: every trained module must train in some stage; {_some(never)} in none; "
            f"add it to a `train`, or give it no adapter (target_modules, head, lora.bias)"
        )
    return found


def _some(modules: list[str]) -> str:
    return f"{and_more(modules, 2)} {'is' if len(modules) == 1 else 'are'}"


def _nearest(name: str, modules: list[str]) -> str:
    """Names of as many parts that would match, or a whole one."""
    length = name.count(".") + 1
    there = {
        ".".join(parts[first : first + length])
        for parts in (module.split(".") for module in modules)
        for first in range(len(parts) - length + 1)
    }
    close = nearest(name, sorted(there), 3)
    return f"nearest: {', '.join(close)}" if close else f"trained are such as {modules[0]}"


def describe(entries: list[dict[str, Any]]) -> str:
    """The stages of a config in one line."""
    begun: dict[int, list[str]] = {}
    for entry in canonical(entries):
        scale = entry["lr_scale"]
        names = ", ".join(entry["train"]) + ("" if scale == 1 else f" at {scale:g} lr")
        if steps := entry["rewarm_steps"]:
            names += f" re-warmed over {steps} step{'s' if steps > 1 else ''}"
        begun.setdefault(entry["from_step"], []).append(names)
    return "; ".join(f"from step {step} {' + '.join(names)}" for step, names in begun.items())
