"""records -> table: one row a setting, its values over seeds. Imports without torch."""

from __future__ import annotations

import math
from typing import Any

from lorabench.record import Record

# Keys that name a place or a machine, or are the seeds a setting is repeated over.
NOT_A_SETTING = (
    "seed",
    "seeds.",
    "output_dir",
    "sweep",
    "tracker.",
    "trainer.device",
    "trainer.num_threads",
    "trainer.checkpoint_every",
    "trainer.log_every",
)
# Metrics where more is better; of the others less is.
HIGHER_IS_BETTER = {"exact_match", "answer", "accuracy"}


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted keys; lists stay values."""
    if not isinstance(content, dict):
        return {prefix[:-1]: content}
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flatten(value, f"{prefix}{key}.")
    return found


def setting(record: Record) -> dict[str, Any]:
    """What was chosen for a run, seeds and places aside."""
    return {
        key: value
        for key, value in flatten(record.config).items()
        if not any(
            key == name or (name.endswith(".") and key.startswith(name)) for name in NOT_A_SETTING
        )
    }


def settings_of(records: list[Record]) -> list[dict[str, Any]]:
    """The setting of every run.

    Where the same words stood for other data or another base (a file that was edited), their
    hashes are part of it: such runs are no repetitions over seeds.
    """
    settings = [setting(record) for record in records]
    for key, name in (("data.data_hash", "data"), ("model.base_hash", "base")):
        contents: dict[str, set[str]] = {}
        for one, record in zip(settings, records, strict=True):
            if name in record.hashes:
                contents.setdefault(repr(one), set()).add(record.hashes[name])
        if any(len(found) > 1 for found in contents.values()):
            for one, record in zip(settings, records, strict=True):
                one[key] = record.hashes.get(name, "")[:8]
    return settings


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value), extremes and count."""
    count = len(values)
    mean = math.fsum(values) / count
    deviation = (
        math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1)) if count > 1 else None
    )
    return {"mean": mean, "sd": deviation, "min": min(values), "max": max(values), "n": count}


def table(records: list[Record]) -> dict[str, Any]:
    """The comparison of a sweep.

    Returns:
        varied: keys that differ between runs, seeds aside.
        rows: one a setting, in the order of the varied keys: setting, seeds, metrics
            {split: {name: spread}}, trainable_parameters, train_seconds (of the pack), pack_size,
            train_seconds_share (pack seconds / pack size), total_seconds,
            tokens_per_second, peak_memory_bytes (spreads), runs (ids).
        runs: one a run: id, setting, seeds, status, metrics, cost.
        left_out: runs that did not finish, by status.
    """
    settings = settings_of(records)
    keys = list(dict.fromkeys(key for one in settings for key in one))
    varied = [key for key in keys if len({repr(one.get(key)) for one in settings}) > 1]
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        if record.status == "finished":
            groups.setdefault(repr([settings[i].get(key) for key in varied]), []).append(i)
    rows = []
    for members in groups.values():
        first = records[members[0]]
        names = {
            (split, name)
            for i in members
            for split, scores in records[i].metrics.items()
            for name in scores
        }
        metrics: dict[str, dict[str, Any]] = {}
        for split, name in sorted(names):
            found = [records[i].metrics.get(split, {}).get(name) for i in members]
            values = [metric.value for metric in found if metric and metric.value is not None]
            if values:
                metrics.setdefault(split, {})[name] = spread(values)
        costs = [records[i].cost for i in members]
        rows.append(
            {
                "setting": {key: settings[members[0]].get(key) for key in varied},
                "seeds": sorted({records[i].config["seed"] for i in members}),
                "metrics": metrics,
                "trainable_parameters": first.plan["trainable_parameters"],
                "train_seconds": spread([cost.train_seconds for cost in costs]),
                "pack_size": spread([1 / cost.share for cost in costs]),
                "train_seconds_share": spread([c.train_seconds * c.share for c in costs]),
                "total_seconds": spread([cost.total_seconds for cost in costs]),
                "tokens_per_second": spread([cost.tokens_per_second for cost in costs]),
                "peak_memory_bytes": spread([float(cost.peak_memory_bytes) for cost in costs]),
                "runs": [records[i].run_id for i in members],
            }
        )
    rows.sort(key=lambda row: [_order(row["setting"][key]) for key in varied])
    left_out: dict[str, list[str]] = {}
    for record in records:
        if record.status != "finished":
            left_out.setdefault(record.status, []).append(record.run_id)
    return {
        "varied": varied,
        "rows": rows,
        "runs": [
            {
                "run_id": record.run_id,
                "setting": {key: settings[i].get(key) for key in varied},
                "seeds": record.seeds,
                "status": record.status,
                "metrics": {
                    split: {name: metric.value for name, metric in scores.items()}
                    for split, scores in record.metrics.items()
                },
                "trainable_parameters": record.plan.get("trainable_parameters"),
                "cost": record.cost.model_dump(),
            }
            for i, record in enumerate(records)
        ],
        "left_out": left_out,
    }


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then everything else by its text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (0, float(value), "")
    return (1, 0.0, str(value))
