"""records -> table: one row per setting, its values over seeds. Imports without torch."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lorabench import identity, provenance
from lorabench.config import flatten
from lorabench.config.parts import RETENTION
from lorabench.record import Evaluation, Record

# Keys that name a place or a machine, or are the seeds a setting is repeated over.
NOT_A_SETTING = (
    "seed",
    "seeds.",
    "output_dir",
    "sweep",
    "tracker.",
    "trainer.device",
    "trainer.num_threads",
    "trainer.compile",
    "model.allow_kernel_code",
    "trainer.checkpoint_every",
    "trainer.checkpoint_minutes",
    "trainer.log_every",
    "worker.",
    "compare.",
    "recipe.",
    "presets",
    "presets.",
    "data.allow_left_out",
)
# Keys that people know by the name of their group.
GROUPS = {"head.policy": "head", "target_modules.select": "target_modules"}
FIRST = ("nll", "exact_match", "accuracy", "answer", "gym")  # in the order they are asked for


def setting(config: dict[str, Any]) -> dict[str, Any]:
    """What was chosen for a run, seeds and places aside."""
    known = _neutral(config) | flatten(config)
    return {key: value for key, value in known.items() if _is_chosen(key)}


@functools.cache
def _is_chosen(key: str) -> bool:
    """Whether a dotted key is part of a setting."""
    return not identity.is_of_evaluation(key) and not any(
        key == name or (name.endswith(".") and key.startswith(name)) for name in NOT_A_SETTING
    )


def _neutral(config: dict[str, Any]) -> dict[str, Any]:
    """What a run did by keys that its lorabench did not have yet; nothing of another program's."""
    is_ours = "sweep" in config
    return {key: value for key, value in identity.NEUTRAL.items() if is_ours}


def settings_of(records: list[Record]) -> list[dict[str, Any]]:
    """The setting of every run.

    Where the same words stood for other data or another base (a file that was edited), their
    hashes are part of it: such runs are no repetitions over seeds.
    """
    settings = [setting(one.config) for one in records]
    for key, name in (("data.data_hash", "train"), ("model.base_hash", "base")):
        contents: dict[str, set[str]] = {}
        for words, one in zip(settings, records, strict=True):
            if name in one.hashes:
                contents.setdefault(repr(words), set()).add(one.hashes[name])
        if any(len(found) > 1 for found in contents.values()):
            for words, one in zip(settings, records, strict=True):
                words[key] = one.hashes.get(name, "")[:8]
    # What decides which adapter is kept, where it differs among the runs that choose one.
    choosing = [one for one in records if identity.selects(one.config.get("trainer", {}))]
    for key in ("data.validation_hash", *identity.SELECTION_KEYS):
        if len({repr(_of_selection(one, key)) for one in choosing}) > 1:
            for words, one in zip(settings, records, strict=True):
                words[key] = _of_selection(one, key)
    return settings


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value), extremes and count."""
    count = len(values)
    mean = math.fsum(values) / count
    deviation = (
        math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1)) if count > 1 else None
    )
    return {"mean": mean, "sd": deviation, "min": min(values), "max": max(values), "n": count}


def _of_selection(one: Record, key: str) -> Any:
    if key == "data.validation_hash":
        return one.plan.get("contents", {}).get("validation", "")[:8]
    return flatten(one.config).get(key)


SPLITS = ("validation", "test")


def splits_in(records: Sequence[Record]) -> list[str]:
    """Return the splits that runs were scored on: validation, test, others, and retention last."""
    there = dict.fromkeys(
        split for one in records for found in one.evaluations for split in found.splits
    )
    named = [split for split in there if split not in (*SPLITS, RETENTION)]
    return [*SPLITS, *named, *([RETENTION] if RETENTION in there else [])]


def comparable(evaluation: Evaluation, split: str) -> str:
    """What two evaluations must share for their scores of a split to be compared.

    The batch size is left out: it moves scores by rounding alone.
    """
    settings = {
        key: value
        for key, value in evaluation.settings.items()
        if key not in ("examples", "eval_batch_size", "definitions")
    }
    scores = evaluation.splits[split]
    definitions = {name: metric.definition for name, metric in scores.metrics.items()}
    return identity.short_hash([settings, scores.examples, definitions])


def choose_evaluations(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Choose, per split, the newest evaluation whose settings, examples and definitions all share.

    Returns:
        By split: `shared`, whether there is such a one (else each run's newest is taken), its
        `settings`, `ended`, the time of the newest, and `of_runs`, one evaluation per record, None
        where a run has no scores of the split.
    """
    found: dict[str, dict[str, Any]] = {}
    for split in splits_in(records):
        by_run = [
            {comparable(e, split): e for e in one.evaluations if split in e.splits}
            for one in records
        ]
        scored = [evaluations for evaluations in by_run if evaluations]
        if not scored:
            continue
        common = set.intersection(*map(set, scored))
        # Of two that ended within a second, the one that comes later in the record.
        order = list(scored[0])
        best = max(
            common,
            key=lambda key: (max(one[key].ended for one in scored), order.index(key)),
            default=None,
        )
        of_runs = [
            (one[best] if best else list(one.values())[-1]) if one else None for one in by_run
        ]
        last = max((one for one in of_runs if one), key=lambda one: one.ended)
        found[split] = {
            "shared": best is not None,
            "settings": last.settings,
            "ended": last.ended,
            "of_runs": of_runs,
        }
    return found


def stack_of(one: Record) -> dict[str, Any]:
    """What else than the config could move a run's numbers: versions, device, threads."""
    return {"arithmetic": one.arithmetic_version} | provenance.stack(one.provenance)


def usual_stack(records: Sequence[Record]) -> dict[str, Any]:
    """The stack that most runs come from."""
    if not records:
        return {}
    counts = Counter(repr(stack_of(one)) for one in records)
    most = counts.most_common(1)[0][0]
    return next(stack_of(one) for one in records if repr(stack_of(one)) == most)


def other_stack(one: Record, usual: dict[str, Any]) -> list[str]:
    """How a run's stack differs from the usual one, one text per difference."""
    mine = stack_of(one)
    return [
        f"{name} {mine.get(name)} instead of {usual.get(name)}"
        for name in dict.fromkeys([*usual, *mine])
        if mine.get(name) != usual.get(name)
    ]


def table(records: list[Record]) -> dict[str, Any]:
    """Return the comparison of a sweep.

    Returns:
        varied: keys that differ between runs, seeds aside.
        rows: one per setting, in the order of the varied keys: setting, seeds, metrics
            {split: {name: spread}}, trainable_parameters, train_seconds (of the pack), pack_size,
            train_seconds_share (pack seconds / pack size), total_seconds,
            tokens_per_second, peak_memory_bytes (spreads), other_stack (how its runs' versions,
            device or threads differ from those of most), runs (ids).
        runs: one per run: id, setting, seeds, status, metrics, cost.
        evaluations: by split, which evaluation the metrics are of (`choose_evaluations`).
        notes: what the runs' records say of their data and bases, and of how many runs.
        left_out: runs that did not finish, by status.
    """
    settings = settings_of(records)
    keys = list(dict.fromkeys(key for one in settings for key in one))
    varied = [key for key in keys if len({repr(one.get(key)) for one in settings}) > 1]
    finished = [one for one in records if one.status == "finished"]
    newest: dict[str, int] = {}  # of each setting and seeds: older ones are in no row
    for i in sorted(range(len(records)), key=lambda i: records[i].ended or ""):
        if records[i].status == "finished":
            newest[repr((sorted(settings[i].items()), sorted(records[i].seeds.items())))] = i
    shown = set(newest.values())
    chosen, usual = choose_evaluations(finished), usual_stack(finished)
    metrics = _metrics(records, finished, chosen)
    groups: dict[str, list[int]] = {}
    for i in range(len(records)):
        if i in shown:
            groups.setdefault(repr([settings[i].get(key) for key in varied]), []).append(i)
    rows = []
    for members in groups.values():
        first = records[members[0]]
        costs = [records[i].cost for i in members]
        rows.append(
            {
                "setting": {key: settings[members[0]].get(key) for key in varied},
                "seeds": sorted({records[i].config["seed"] for i in members}),
                "metrics": _spreads([metrics[i] for i in members]),
                "trainable_parameters": first.plan["trainable_parameters"],
                "train_seconds": spread([cost.train_seconds for cost in costs]),
                "pack_size": spread([1 / cost.share for cost in costs]),
                "train_seconds_share": spread([c.train_seconds * c.share for c in costs]),
                "total_seconds": spread([cost.total_seconds for cost in costs]),
                "tokens_per_second": spread([cost.tokens_per_second for cost in costs]),
                "peak_memory_bytes": spread([float(cost.peak_memory_bytes) for cost in costs]),
                "other_stack": sorted(
                    {text for i in members for text in other_stack(records[i], usual)}
                ),
                "runs": [records[i].run_id for i in members],
            }
        )
    rows.sort(key=lambda row: [order(row["setting"][key]) for key in varied])
    left_out: dict[str, list[str]] = {}
    for one in records:
        if one.status != "finished":
            left_out.setdefault(one.status, []).append(one.run_id)
    return {
        "varied": varied,
        "rows": rows,
        "runs": [
            {
                "run_id": one.run_id,
                "setting": {key: settings[i].get(key) for key in varied},
                "seeds": one.seeds,
                "status": one.status,
                "metrics": metrics[i],
                "trainable_parameters": one.plan.get("trainable_parameters"),
                "cost": one.cost.model_dump(),
            }
            for i, one in enumerate(records)
        ],
        "evaluations": {
            split: {key: value for key, value in found.items() if key != "of_runs"}
            | {"ids": sorted({one.id for one in found["of_runs"] if one is not None})}
            for split, found in chosen.items()
        },
        "notes": dict(Counter(note for one in finished for note in one.notes)),
        "left_out": left_out,
    }


def _metrics(
    records: list[Record], finished: list[Record], chosen: dict[str, dict[str, Any]]
) -> list[dict[str, dict[str, float | None]]]:
    """Values of the chosen evaluations, one split -> name -> value per record.

    A run that has not finished shows its newest evaluation, if it has any.
    """
    places = {id(one): place for place, one in enumerate(finished)}
    found = []
    for one in records:
        values: dict[str, dict[str, float | None]] = {}
        place = places.get(id(one))
        for split in chosen if place is not None else one.metrics:
            if place is None:
                scores = one.metrics[split]
            elif evaluation := chosen[split]["of_runs"][place]:
                scores = evaluation.splits[split].metrics
            else:
                continue
            values[split] = {name: metric.value for name, metric in scores.items()}
        found.append(values)
    return found


def _spreads(members: list[dict[str, dict[str, float | None]]]) -> dict[str, dict[str, Any]]:
    """Spread over the runs of a setting, by split and name."""
    names = sorted({(split, name) for one in members for split in one for name in one[split]})
    found: dict[str, dict[str, Any]] = {}
    for split, name in names:
        values = [one.get(split, {}).get(name) for one in members]
        known = [value for value in values if value is not None]
        if known:
            found.setdefault(split, {})[name] = spread(known)
    return found


def order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then everything else by its text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (0, float(value), "")
    return (1, 0.0, str(value))


def short_keys(keys: list[str]) -> list[str]:
    """The last part of each dotted key, or all of it where two end alike; a label's group."""
    keys = [key.removesuffix(".name") for key in keys]
    last = [GROUPS.get(key, key.rpartition(".")[2]) for key in keys]
    return [key if last.count(short) > 1 else short for key, short in zip(keys, last, strict=True)]
