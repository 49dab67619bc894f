"""A run trained again from its record alone, and what differs. Comparing imports without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorabench import provenance
from lorabench.config import ConfigErrors, flatten
from lorabench.record import Record

Answer = Literal["identical", "within rounding", "different"]
INPUTS = {  # hashes of what a training starts from, and what each is of
    "base": "the base's weights as loaded",
    "train": "the training data",
    "train_tokens": "the token ids of the training data",
    "data_order": "the order of the examples",
    "initial_adapter": "the initial adapter",
}
FIRST = 12  # logged losses that other shapes, devices and versions move by rounding alone
ROUNDING = {"bfloat16": 5e-2}  # of a loss, relative
OTHER_ROUNDING = 1e-4
PLACES = ("output_dir", "sweep", "tracker.", "worker.", "hydra.")  # decide nothing about a run


@dataclass
class Compared:
    """Two trainings of what should be one run.

    Args:
        shape: how pack, device and versions differ: what may move rounding.
        inputs: what the trainings started from that is not the same.
        first: the first logged step whose losses differ: step, one loss, the other.
        drift: largest relative difference of a logged loss, and its step.
    """

    answer: Answer
    lines: list[str] = field(default_factory=list)
    shape: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    first: tuple[int, float, float] | None = None
    drift: tuple[int, float] | None = None


def compared(one: tuple[Path, Record], other: tuple[Path, Record]) -> Compared:
    """Compare hashes, losses and adapters of two trainings."""
    (folder, mine), (other_folder, theirs) = one, other
    inputs = [
        f"{what}: {mine.hashes[name][:12]}, now {theirs.hashes[name][:12]}"
        for name, what in INPUTS.items()
        if name in mine.hashes
        and name in theirs.hashes
        and mine.hashes[name] != theirs.hashes[name]
    ]
    shape = list(_shape(mine, theirs))
    found = Compared("identical", shape=shape, inputs=inputs)
    losses, other_losses = _losses(folder), _losses(other_folder)
    steps = [step for step in losses if step in other_losses]
    if not steps or len(losses) != len(other_losses):
        inputs.append(f"{len(losses)} losses are logged, now {len(other_losses)}")
    gaps = {step: _gap(losses[step], other_losses[step]) for step in steps}
    moved = [step for step in steps if gaps[step] > 0]
    if moved:
        found.first = (moved[0], losses[moved[0]], other_losses[moved[0]])
        worst = max(steps, key=lambda step: gaps[step])
        found.drift = (worst, gaps[worst])
    same_adapter = mine.hashes.get("adapter") == theirs.hashes.get("adapter")
    bound = ROUNDING.get(mine.config["trainer"]["dtype"], OTHER_ROUNDING)
    early = max((gaps[step] for step in steps[:FIRST]), default=math.inf)
    if inputs:
        found.answer = "different"
    elif moved or not same_adapter:
        found.answer = "within rounding" if shape and early <= bound else "different"
    found.lines = list(_lines(found, len(steps), same_adapter, early, bound))
    return found


def _shape(mine: Record, theirs: Record) -> Iterator[str]:
    """What may move a run's rounding."""
    pack, other = mine.plan.get("pack") or {}, theirs.plan.get("pack") or {}
    for key, what in (
        ("size", "runs in the pack"),
        ("blocks", "runs that share batches"),
        ("compiled", "compiled"),
    ):
        if pack.get(key) != other.get(key):
            yield f"{what}: {pack.get(key)}, now {other.get(key)}"
    here, there = provenance.stack(mine.provenance), provenance.stack(theirs.provenance)
    for name in dict.fromkeys([*here, *there]):
        if here.get(name) != there.get(name):
            yield f"{name}: {here.get(name)}, now {there.get(name)}"
    if mine.arithmetic_version != theirs.arithmetic_version:
        yield f"arithmetic version: {mine.arithmetic_version}, now {theirs.arithmetic_version}"


def _losses(folder: Path) -> dict[int, float]:
    """The loss of every logged step; of a step that was logged twice the last."""
    try:
        rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        found = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    except (OSError, ValueError):
        return {}
    return dict(sorted(found.items()))


def _gap(a: float | None, b: float | None) -> float:
    """Relative difference of two losses; infinity where only one is a number."""
    if a == b:
        return 0.0
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
        return 0.0 if repr(a) == repr(b) else math.inf
    return abs(a - b) / max(abs(a), abs(b))


def _lines(
    found: Compared, steps: int, same_adapter: bool, early: float, bound: float
) -> Iterator[str]:
    for text in found.inputs:
        yield f"not the same: {text}"
    for text in found.shape:
        yield f"another shape: {text}"
    if found.first is None:
        yield f"losses: the same at all {steps} logged steps"
    else:
        step, mine, theirs = found.first
        yield f"losses: first differ at step {step}: {mine!r}, now {theirs!r}"
        assert found.drift is not None
        yield (
            f"losses: the first {min(FIRST, steps)} logged ones within {early:.1e} "
            f"(rounding: {bound:g}), the largest difference {found.drift[1]:.1e} at step "
            f"{found.drift[0]}"
        )
    yield f"final adapter: {'the same bits' if same_adapter else 'other bits'}"


# --- training again --------------------------------------------------------------------------


def why_another(folder: Path, content: dict[str, Any]) -> list[str]:
    """Keys of a record's config that are not those the run was started with (config.yaml)."""
    from omegaconf import OmegaConf

    try:
        started = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    except (OSError, ValueError):
        return []
    if not isinstance(started, dict):
        return []
    before, now = flatten(started), flatten(content)  # type: ignore[arg-type]
    return [
        f"{key}: {now.get(key)!r} in record.json, {before.get(key)!r} when it was started"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key) and not _is_place(key)
    ]


def _is_place(key: str) -> bool:
    return any(key == name or (name[-1] == "." and key.startswith(name)) for name in PLACES)


def members_of(entry: Record, size: int | None) -> list[str]:
    """Run ids of the pack to train in, by slot: the run's own, or neighbours of it.

    Args:
        size: runs of the pack; None: as many as it had.
    Raises:
        ConfigErrors: the pack has not so many runs.
    """
    members = list((entry.plan.get("pack") or {}).get("members") or [entry.run_id])
    if size is None or size == len(members):
        return members
    if not 1 <= size <= len(members):
        raise ConfigErrors(
            f"--pack-size: must be from 1 to the size of the run's pack, {len(members)}; got {size}"
        )
    place = members.index(entry.run_id)
    first = min(max(0, place - size + 1), len(members) - size)
    return members[first : first + size]


def configs_of(entry: Record, members: list[str], out: Path) -> list[dict[str, Any]]:
    """The configs of a pack's runs, as this run's record tells them, to be trained below `out`."""
    found = []
    for run in members:
        mine = json.loads(json.dumps(entry.config))
        for key, value in ({} if run == entry.run_id else entry.mates[run]).items():
            _put(mine, key, value)
        mine["output_dir"], mine["sweep"] = str(out.parent), out.name
        mine["tracker"] = mine.get("tracker", {}) | {"kind": "none"}
        found.append(mine)
    return found


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    *groups, last = key.split(".")
    for group in groups:
        config = config.setdefault(group, {})
    config[last] = value


def differing(one: Record, other: Record) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Keys of the configs and values of the results that differ, each with both values."""
    before, now = flatten(one.config), flatten(other.config)
    config = {
        key: (before.get(key), now.get(key))
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key) and not _is_place(key)
    }
    results = {}
    for split, metrics in one.metrics.items():
        for name, metric in metrics.items():
            theirs = other.metrics.get(split, {}).get(name)
            if theirs is not None and metric.value != theirs.value:
                results[f"{split} {name}"] = (metric.value, theirs.value)
    return {"config": config, "results": results}
