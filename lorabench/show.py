"""Tables a person reads: rich on a terminal, the same text in a pipe, JSON on request."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lorabench import stages, versions
from lorabench.compare import HIGHER_IS_BETTER

if TYPE_CHECKING:
    from lorabench.record import Record
    from lorabench.smoke import Attempt
    from lorabench.sweep import Job


def console() -> Console:
    """Standard output; a pipe gets lines wide enough not to be cut.

    No markup: labels, paths and errors hold brackets of their own.
    """
    found = Console(highlight=False, markup=False)
    if not found.is_terminal:
        found = Console(highlight=False, markup=False, width=200)
    return found


def dump(content: Any) -> None:
    """JSON on standard output; a value that is no number is null."""
    print(json.dumps(_finite(content), indent=2, default=str, allow_nan=False))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def whole(out: Console, table: Table, least: Iterable[str]) -> None:
    """Print a table with no value cut: a narrow terminal gets fewer columns, and is told which.

    Args:
        least: names of the columns that go first.
    """
    wide = out.options.update_width(10_000)
    left_out = []
    for name in least:
        if not out.is_terminal or Measurement.get(out, wide, table).maximum <= out.width:
            break
        kept = [column for column in table.columns if column.header != name]
        left_out += [name] * (len(kept) < len(table.columns))
        table.columns = kept
    for column in table.columns:
        column.overflow = "fold"
    out.print(table)
    if left_out:
        out.print(
            f"left out at {out.width} columns: {', '.join(left_out)}; "
            "a wider terminal or a pipe shows all",
            style="dim",
        )


def quantity(number: float) -> str:
    """12,345 or 1.23M or 2.61B."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:,.0f}"


def size(num_bytes: float) -> str:
    """Bytes in the largest unit that keeps a digit before the point."""
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError


def with_spread(spread: dict[str, Any], digits: int = 4) -> str:
    """mean ± sample standard deviation over seeds."""
    text = f"{spread['mean']:.{digits}f}"
    return text if spread["sd"] is None else f"{text} ± {spread['sd']:.{digits}f}"


# --- plan ------------------------------------------------------------------------------------


def plan(
    jobs: list[Job], packs: list[list[int]], as_json: bool, attempts: Iterable[Attempt] = ()
) -> None:
    """What a command will do.

    Args:
        attempts: of --smoke, one a pack, made while they are shown.
    """
    peak = matmul_flops()
    plans = [
        job.plan.model_dump() | {"label": job.label, "seconds": seconds(job, peak)} for job in jobs
    ]
    if as_json:
        named = [[jobs[i].plan.run_id for i in members] for members in packs]
        content = {"runs": plans, "packs": named, "seconds": sum(p["seconds"] for p in plans)}
        content |= {"versions": versions.shown()}
        tried = [dataclasses.asdict(attempt) for attempt in attempts]
        dump(content | ({"smoke": tried} if tried else {}))
        return
    out = console()
    first = jobs[0]
    models = ", ".join(dict.fromkeys(job.plan.model for job in jobs))
    table = Table(
        title=f"{len(jobs)} run{'s' if len(jobs) > 1 else ''} on {models}", title_justify="left"
    )
    for name in ("run", "what", "modules", "trainable", "scale", "head", "memory", "seconds"):
        justify: Literal["left", "right"] = "left" if name in ("run", "what", "head") else "right"
        table.add_column(name, justify=justify, no_wrap=name == "run")
    for job, planned in zip(jobs, plans, strict=True):
        head = job.plan.head
        table.add_row(
            job.plan.run_id,
            job.label,
            str(len(job.plan.lora_modules)),
            quantity(job.plan.trainable_parameters),
            _scale(job.plan),
            f"{head.policy}{', tied' if head.tied else ''}",
            f"~{size(job.plan.memory_bytes)}",
            f"~{planned['seconds']:.0f}",
        )
    whole(out, table, ("seconds", "scale", "modules", "head", "memory"))
    for text in _each(jobs, _base):
        out.print(f"base      {text}")
    for text in _each(jobs, _training):
        out.print(f"training  {text}")
    for text in dict.fromkeys(stages.describe(job.config.stages) for job in jobs):
        if text:
            out.print(f"stages    {text}")
    if first.plan.labels:
        out.print(f"classes   {len(first.plan.labels)}: {', '.join(first.plan.labels[:12])}")
    for policy in dict.fromkeys(job.plan.head.policy for job in jobs):
        head = next(job.plan.head for job in jobs if job.plan.head.policy == policy)
        out.print(f"head      {policy} ({head.module}): {head.consequence}")
    sizes = ", ".join(str(len(members)) for members in packs)
    if len(jobs) > 1:
        out.print(f"packs     runs that train together: {sizes}")
    for reason in dict.fromkeys(job.plan.alone for job in jobs if job.plan.alone):
        who = next(job.label for job in jobs if job.plan.alone == reason)
        out.print(f"alone     {who}: {reason}")
    answers = Counter(answer for job in jobs for answer in job.plan.exports.items())
    for (kind, reason), number in answers.items():
        if reason != "yes":
            out.print(f"export    {number} run{'s' if number > 1 else ''}, no {kind}: {reason}")
    for modules, count in _module_sets(jobs):
        out.print(f"modules   {count}: {_shorten(modules)}")
    out.print(
        f"folder    {Path(first.plan.folder).parent}, "
        f"~{size(sum(j.plan.disk_bytes for j in jobs))} in all"
    )
    out.print(f"tracker   {first.plan.tracker}")
    installed = ", ".join(f"{name} {version}" for name, version in versions.shown().items())
    out.print(f"versions  {installed}")
    total_seconds = sum(p["seconds"] for p in plans)
    out.print(
        f"time      ~{total_seconds:.0f} s for all runs, from a short measurement of this machine"
    )
    for warning in dict.fromkeys(w for job in jobs for w in job.plan.warnings):
        out.print(f"warning   {warning}", style="yellow")
    if len(jobs) > 1 or first.plan.lora_modules:
        out.print("`--json` lists every adapted module.", style="dim")
    for attempt in attempts:
        out.print(f"smoke     {attempt}", style="red" if attempt.error else None, soft_wrap=True)


def _each(jobs: list[Job], describe: Callable[[Job], str]) -> list[str]:
    """What jobs are told by, each once; where they differ, of how many of them."""
    told = Counter(describe(job) for job in jobs)
    if len(told) == 1:
        return list(told)
    return [f"{count} run{'s' if count > 1 else ''}: {text}" for text, count in told.items()]


def _base(job: Job) -> str:
    model = job.config.model
    parameters = quantity(job.plan.total_parameters)
    return f"{job.plan.model}: {parameters} parameters, {model.dtype}, {model.path}"


def _training(job: Job) -> str:
    trainer = job.config.trainer
    return (
        f"{trainer.steps} steps of {trainer.batch_size} examples, "
        f"lr {trainer.lr:g} {trainer.schedule}, computed in {trainer.dtype}"
    )


def _scale(made: Any) -> str:
    """The effective scale, or its range where patterns give modules their own."""
    own = {*made.scales.values()}
    if len(made.scales) < len(made.lora_modules):
        own.add(made.scale)
    low, high = f"{min(own):g}", f"{max(own):g}"
    return low if low == high else f"{low} to {high}"


def _module_sets(jobs: list[Job]) -> list[tuple[list[str], str]]:
    sets: dict[tuple[str, ...], int] = {}
    for job in jobs:
        key = tuple([*job.plan.lora_modules, *(f"{m} (in full)" for m in job.plan.saved_modules)])
        sets[key] = sets.get(key, 0) + 1
    return [(list(key), f"{count} run{'s' if count > 1 else ''}") for key, count in sets.items()]


def _shorten(modules: list[str]) -> str:
    """Modules with their layer numbers folded: layers.{0-3}.self_attn.q_proj."""
    import re

    groups: dict[str, list[int]] = {}
    for name in modules:
        found = re.search(r"\.(\d+)\.", name)
        key = name if found is None else f"{name[: found.start(1)]}#{name[found.end(1) :]}"
        groups.setdefault(key, []).append(-1 if found is None else int(found[1]))
    parts = []
    for key, numbers in groups.items():
        low, high = min(numbers), max(numbers)
        whole = len(numbers) == high - low + 1
        folded = f"{low}-{high}" if whole else ",".join(map(str, numbers))
        parts.append(key.replace("#", f"{{{folded}}}" if len(numbers) > 1 else str(low)))
    return ", ".join(parts)


def matmul_flops() -> float:
    """Matrix-multiplication FLOPs a second of the device that will train, measured briefly."""
    import time

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(1024, 1024, device=device)
    rates = []
    for _ in range(4):
        begun = time.perf_counter()
        (a @ a).sum().item()
        rates.append(2 * 1024**3 / (time.perf_counter() - begun))
    return max(rates)


def seconds(job: Job, peak: float) -> float:
    """A rough time: training FLOPs at a third of the peak, plus a per-step overhead."""
    steps = job.config.trainer.steps
    overhead = 0.0003 * len(job.plan.lora_modules) + 0.003
    return job.plan.train_flops / (peak / 3) + steps * overhead + 2.0


# --- runs and compare ------------------------------------------------------------------------

COLOURS = {"finished": "green", "failed": "red", "interrupted": "yellow", "stopped": "yellow"}


def runs(found: list[tuple[Path, Record]], as_json: bool) -> None:
    """Status of every run."""
    from lorabench import compare

    table = compare.table([record for _, record in found])
    if as_json:
        dump(
            [
                {
                    "run_id": r.run_id,
                    "folder": str(path),
                    "status": r.status,
                    "error": r.error,
                    "steps_done": r.steps_done,
                    "seeds": r.seeds,
                    "setting": one["setting"],
                }
                for (path, r), one in zip(found, table["runs"], strict=True)
            ]
        )
        return
    title = f"{found[0][0].parent}: {len(found)} run{'s' if len(found) > 1 else ''}"
    out = Table(title=title, title_justify="left")
    # Streams that have a seed of their own in some run.
    own = [s for s in found[0][1].seeds if any(r.seeds[s] != r.config["seed"] for _, r in found)]
    for name in (
        "run",
        *_short_keys(_columns(table)),
        "seed",
        *(f"seeds.{stream}" for stream in own),
        "status",
        "done",
        "seconds",
        "error",
    ):
        out.add_column(name, no_wrap=name == "run")
    for (_, record), one in zip(found, table["runs"], strict=True):
        colour = COLOURS.get(record.status, "cyan")
        out.add_row(
            record.run_id,
            *(_value(one["setting"][key]) for key in _columns(table)),
            str(record.config["seed"]),
            *(str(record.seeds[stream]) for stream in own),
            Text(record.status, colour),
            f"{record.steps_done}/{record.config['trainer']['steps']}",
            f"{record.cost.total_seconds:.1f}",
            record.error or "",
        )
    whole(console(), out, ("seconds",))


def _columns(table: dict[str, Any]) -> list[str]:
    """Varied keys worth a column: where model.name tells runs apart, model.path need not."""
    settings = [one["setting"] for one in table["runs"]]

    def is_told_by(label: str, key: str) -> bool:
        pairs = {(repr(one[label]), repr(one[key])) for one in settings}
        return len(pairs) == len({first for first, _ in pairs})

    labels = {key.partition(".")[0]: key for key in table["varied"] if key.endswith(".name")}
    return [
        key
        for key in table["varied"]
        if (label := labels.get(key.partition(".")[0])) in (None, key)
        or not is_told_by(str(label), key)
    ]


def _short_keys(keys: list[str]) -> list[str]:
    """The last part of each dotted key, or all of it where two end alike; a label's group."""
    keys = [key.removesuffix(".name") for key in keys]
    last = [key.rpartition(".")[2] for key in keys]
    names = [key if last.count(short) > 1 else short for key, short in zip(keys, last, strict=True)]
    return ["head" if name == "policy" else name for name in names]


def _value(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return stages.describe(value)
    return ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def comparison(table: dict[str, Any], folder: Path, as_json: bool) -> None:
    """One row a setting; the best mean of each metric is marked."""
    if as_json:
        dump(table)
        return
    rows = table["rows"]
    out = console()
    if not rows:
        out.print(f"{folder}: no run has finished; lorabench runs {folder} shows their status")
        return
    metrics = list(
        dict.fromkeys((s, n) for row in rows for s in ("test",) for n in row["metrics"].get(s, {}))
    )
    settings = f"{len(rows)} setting{'s' if len(rows) > 1 else ''}"
    title = f"{folder}: {settings}, mean ± standard deviation over seeds"
    shown = Table(title=title, title_justify="left")
    columns = _columns(table)
    for name in _short_keys(columns):
        shown.add_column(name)
    for split, name in metrics:
        arrow = "↑" if name in HIGHER_IS_BETTER else "↓"
        shown.add_column(f"{split} {name} {arrow}", justify="right")
    # In a pack nobody has a time of their own: its seconds over its size is a share, called one.
    packed = any(row["pack_size"]["max"] > 1 for row in rows)
    timed = ["pack s", "share s"] if packed else ["train s"]
    for name in ("seeds", "trainable", *timed, "peak memory"):
        shown.add_column(name, justify="right")
    best = {}
    for split, name in metrics:
        means = [row["metrics"].get(split, {}).get(name, {}).get("mean") for row in rows]
        known = [m for m in means if m is not None and not math.isnan(m)]
        if known:
            best[split, name] = max(known) if name in HIGHER_IS_BETTER else min(known)
    for row in rows:
        cells: list[str | Text] = [_value(row["setting"][key]) for key in columns]
        for split, name in metrics:
            value = row["metrics"].get(split, {}).get(name)
            text = "" if value is None else with_spread(value)
            if value is not None and value["n"] < row["train_seconds"]["n"]:
                text += f" ({value['n']} of {row['train_seconds']['n']} finite)"
            is_best = value is not None and value["mean"] == best.get((split, name))
            cells.append(Text(text, "bold") if is_best and len(rows) > 1 else text)
        count = row["train_seconds"]["n"]
        cells += [
            str(count),
            quantity(row["trainable_parameters"]),
            f"{row['train_seconds']['mean']:.1f}",
            *([f"{row['train_seconds_share']['mean']:.1f}"] if packed else []),
            size(row["peak_memory_bytes"]["max"]),
        ]
        shown.add_row(*cells)
    whole(out, shown, ("share s", "peak memory", *timed, "trainable"))
    for status, ids in table["left_out"].items():
        out.print(f"left out, {status}: {', '.join(ids)}", style="yellow")
