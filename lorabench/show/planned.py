"""What a command will do."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rich.table import Table

from lorabench import machine, stages, versions
from lorabench.show.examples import examples
from lorabench.show.text import console, dump, quantity, size, whole

if TYPE_CHECKING:
    from lorabench.compare.outlook import Outlook
    from lorabench.smoke import Attempt
    from lorabench.sweep import Job
    from lorabench.sweep.needs import Needs


def plan(
    jobs: list[Job],
    packs: list[list[int]],
    needs: Needs,
    as_json: bool,
    attempts: Iterable[Attempt] = (),
    notes: Iterable[str] = (),
    unread: str = "",
    told: Outlook | None = None,
    difference: float | None = None,
    seen: dict[str, Any] | None = None,
    faster: str | None = None,
) -> None:
    """Show what a command will do.

    Args:
        needs: tells memory and time.
        attempts: of --smoke, one per pack, made while they are shown.
        notes: what is to be said about the data.
        unread: why the data could not be read.
        told: what the sweep will be able to tell.
        difference: that is to be found, in the unit of its metric.
        seen: examples as the model sees them, and lengths, of the first run.
        faster: a setting with which all would take less time.
    """
    estimates = _estimates(jobs, packs, needs)
    plans = [
        job.plan.model_dump()
        | {"label": job.label, "memory_bytes": memory, "seconds": seconds}
        for job, memory, seconds in zip(
            jobs, needs.alone(jobs), _shares(jobs, packs, estimates), strict=True
        )
    ]
    notes = [*notes, *(_rough(model, why) for model, why in needs.rough.items())]
    if as_json:
        named = [[jobs[i].plan.run_id for i in members] for members in packs]
        content = {"runs": plans, "packs": named, "seconds": sum(p["seconds"] for p in plans)}
        content |= {"pack_memory_bytes": [one.memory_bytes for one in estimates], "faster": faster}
        content |= {"versions": versions.shown(), "notes": list(notes), "unread": unread}
        content["outlook"] = _outlook_content(told, difference, content["seconds"] / len(jobs))
        tried = [dataclasses.asdict(attempt) for attempt in attempts]
        dump(content | ({"smoke": tried} if tried else {}) | (seen or {}))
        return
    out = console()
    if seen is not None:
        examples(seen["examples"], seen["lengths"])
        out.print()
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
            f"~{size(planned['memory_bytes'])}",
            f"~{planned['seconds']:.0f}",
        )
    whole(out, table, ("seconds", "scale", "modules", "head", "memory"))
    for text in _each(jobs, _base):
        out.print(f"base      {text}")
    for text in _each(jobs, _training):
        out.print(f"training  {text}")
    for text in dict.fromkeys(map(_defaults, jobs)):
        if text:
            out.print(f"defaults  {text}", soft_wrap=True)
    for text in dict.fromkeys(stages.describe(job.config.stages) for job in jobs):
        if text:
            out.print(f"stages    {text}")
    if first.plan.labels:
        out.print(f"classes   {len(first.plan.labels)}: {', '.join(first.plan.labels[:12])}")
    for policy in dict.fromkeys(job.plan.head.policy for job in jobs):
        head = next(job.plan.head for job in jobs if job.plan.head.policy == policy)
        out.print(f"head      {policy} ({head.module}): {head.consequence}")
    for reason in dict.fromkeys(job.plan.padded for job in jobs):
        out.print(f"rows      {_rows([job for job in jobs if job.plan.padded == reason])}")
    if unread:
        text = f"lengths   are bounds, the data could not be read: {unread}"
        out.print(text, style="yellow", soft_wrap=True)
    if len(jobs) > 1:
        out.print(f"packs     runs that train together: {_packing(packs, estimates)}")
    if faster:
        out.print(f"faster    {faster}", soft_wrap=True)
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
    for device in dict.fromkeys(job.config.trainer.device for job in jobs):
        out.print(f"device    {machine.describe(machine.choose_device(device))}")
    out.print(f"tracker   {first.plan.tracker}")
    installed = ", ".join(f"{name} {version}" for name, version in versions.shown().items())
    out.print(f"versions  {installed}")
    total_seconds = sum(p["seconds"] for p in plans)
    out.print(
        f"time      ~{total_seconds:.0f} s for all runs, from the kernels of a step, timed here"
    )
    if told is None and difference is not None:
        out.print("settle    nothing: one setting alone, or no test examples to compare on")
    if told is not None:
        each = total_seconds / len(jobs) * told.settings
        for text in _outlook(told, difference, each):
            out.print(text, soft_wrap=True)
    for warning in dict.fromkeys(w for job in jobs for w in job.plan.warnings):
        out.print(f"warning   {warning}", style="yellow")
    for note in notes:
        out.print(f"note      {note}", style="yellow", soft_wrap=True)
    if len(jobs) > 1 or first.plan.lora_modules:
        out.print("`--json` lists every adapted module.", style="dim")
    for attempt in attempts:
        out.print(f"smoke     {attempt}", style="red" if attempt.error else None, soft_wrap=True)


def _outlook(told: Outlook, difference: float | None, seconds: float) -> list[str]:
    """What the sweep will be able to tell.

    Args:
        seconds: of one seed of every setting.
    """
    metric, of = told.spreads.metric, told.spreads.of
    asked = f"{told.questions} question{'s' if told.questions > 1 else ''}"
    seeds = f"{told.seeds} seed{'s' if told.seeds > 1 else ''}"
    if told.smallest is None:
        lines = [f"verdict   {asked}, but one seed settles none; add seed=0,1,2,3,4"]
    else:
        lines = [
            f"verdict   {asked}, {seeds} and {told.examples:,} test examples: a difference of "
            f"{told.smallest:.2g} {metric} between two settings is found in 4 of 5 such sweeps"
        ]
    lines.append(
        f"          if their difference varies by {of['seeds']:.2g} over seeds, "
        f"{of['examples']:.2g} over examples and {of['rest']:.2g} besides ({told.spreads.source})"
    )
    if difference is not None:
        lines.append(f"settle    {difference:g} {metric} {_needs(told, difference, seconds)}")
    return lines


def _needs(told: Outlook, difference: float, seconds: float) -> str:
    seeds, examples = told.needed(difference)
    if seeds is None:
        return "is found with no number of seeds or test examples"
    runs = f"{seeds * told.settings} runs, {_hours(seeds * seconds)}"
    if examples is None:
        return (
            f"needs {seeds} seeds of {told.settings} settings with {told.examples:,} test "
            f"examples: {runs}"
        )
    return (
        f"is not found with {told.examples:,} test examples, however many seeds there are; "
        f"{examples:,} of them and {seeds} seeds find it: {runs} and more scoring"
    )


def _hours(seconds: float) -> str:
    if seconds < 5400:
        return f"~{seconds / 60:.0f} minutes" if seconds > 90 else f"~{seconds:.0f} s"
    return f"~{seconds / 3600:.1f} hours"


def _outlook_content(
    told: Outlook | None, difference: float | None, seconds: float
) -> dict[str, Any] | None:
    """The same for programs.

    Args:
        seconds: of one run.
    """
    if told is None:
        return None
    content = dataclasses.asdict(told)
    if difference is not None:
        seeds, examples = told.needed(difference)
        runs = None if seeds is None else seeds * told.settings
        content["settle"] = {
            "difference": difference, "seeds": seeds, "examples": examples, "runs": runs,
            "seconds": None if runs is None else runs * seconds,
        }  # fmt: skip
    return content


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
    floor = f" to {trainer.min_lr_ratio:g} of it" if trainer.min_lr_ratio else ""
    return (
        f"{trainer.num_steps} steps of {trainer.batch_size} examples, "
        f"lr {trainer.lr:g} {trainer.schedule}{floor}, computed in {trainer.dtype}"
    )


def _defaults(job: Job) -> str:
    """The values that come from the model's recipe, and those that something else sets."""

    def listed(values: dict[str, Any]) -> str:
        return ", ".join(f"{key} {_plain(value)}" for key, value in values.items())

    found = job.plan.defaults
    if not found:
        return ""
    otherwise = listed(found["otherwise"])
    return (
        f"of {job.plan.model} (recipe={found['recipe']}): {listed(found['applied']) or 'none'}"
        f"{f' (set otherwise: {otherwise})' if otherwise else ''}"
    )


def _plain(value: Any) -> str:
    """A value, as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _rows(jobs: list[Job]) -> str:
    """How batches are laid out, and how much of what is computed is real."""
    found = [job.plan.lengths for job in jobs if job.plan.lengths is not None]
    tokens = sum(one.tokens for one in found)
    reason = jobs[0].plan.padded
    text = "examples lie end to end" if reason is None else "each batch is padded to its longest"
    if found:
        # A pack with several data seeds is padded to the longest example of all of them.
        most = reason is not None and len({job.config.seeds.data for job in jobs}) > 1
        share = tokens / sum(one.rows for one in found)
        text += f"; {'at most ' if most else ''}{share:.0%} of the computed tokens are real"
        if reason is None:
            padded = tokens / sum(one.padded_rows for one in found)
            text += f" (padded batches: {padded:.0%})"
        text += f"; the longest micro-batch has {max(one.longest for one in found):,}"
    return text if reason is None else f"{text}: {reason}"


class Estimate(NamedTuple):
    """What a pack takes."""

    memory_bytes: int
    seconds: float  # of all it does
    is_busy: bool  # whether one of its runs alone would keep the device busy


def _estimates(jobs: list[Job], packs: list[list[int]], needs: Needs) -> list[Estimate]:
    found = []
    for members in packs:
        pack = [jobs[i] for i in members]
        step, host = needs.step_seconds(pack[:1])
        is_busy = step - host > 5 * host
        found.append(Estimate(needs.memory(pack), needs.seconds(pack), is_busy))
    return found


def _shares(jobs: list[Job], packs: list[list[int]], estimates: list[Estimate]) -> list[float]:
    """Each run's part of the seconds of its pack."""
    found = [0.0] * len(jobs)
    for members, estimate in zip(packs, estimates, strict=True):
        for i in members:
            found[i] = estimate.seconds / len(members)
    return found


def _rough(model: str, why: str) -> str:
    return f"memory and time of {model} are rough: its step cannot be traced ({why})"


def _packing(packs: list[list[int]], estimates: list[Estimate]) -> str:
    """Sizes and memory of the packs, and whether a run alone keeps the device busy."""
    sizes = ", ".join(str(len(members)) for members in packs)
    most = max(one.memory_bytes for one in estimates)
    text = f"{sizes}, ~{size(most)} {'each' if len(packs) > 1 else 'of memory'}"
    larger = [one.is_busy for one, members in zip(estimates, packs, strict=True) if members[1:]]
    return text + (
        " (a run alone keeps this device busy: a pack saves loading and takes more memory, and its "
        "steps are hardly faster)"
        if larger and all(larger)
        else ""
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
