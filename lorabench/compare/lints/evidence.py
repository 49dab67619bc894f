"""Lints of what verdicts rest on: seeds and test examples."""

from __future__ import annotations

import re
import shlex
from typing import Any

from lorabench.compare.lints.design import Design, Lint
from lorabench.compare.scored import JUDGE, metric_of
from lorabench.compare.tables import choose_evaluations
from lorabench.config import and_more
from lorabench.config.parts import RETENTION
from lorabench.identity import is_generated

# Below about 30 examples a mean is far from normal, and one example moves an accuracy by over 3%.
FEWEST_EXAMPLES = 30
OVERLAP = re.compile(
    r"(?:data\.)?(validation|test|tests\.[\w\-]+|retention): (\d+) of (\d+) "
    r"(?:prompts|texts) are in (?:the training set|train) ?too"
)


def one_seed(design: Design) -> list[Lint]:
    """Find settings with one seed: how much of a difference is luck is unknown."""
    single = [
        i
        for i in range(len(design.settings))
        if len({tuple(sorted(one.seeds.items())) for one in design.of_setting(i)}) == 1
    ]
    if not single or len(design.settings) < 2:
        return []
    folder = design.runs[design.members[single[0]][0]][0].parent
    return [
        Lint(
            "one-seed",
            f"{_one_seed(design, single)}: how much of a difference is due to the seed is unknown",
            f"add seeds: `lorabench settle {shlex.quote(str(folder))}`, or repeat the "
            f"`lorabench train -m` command with seed=0,1,2,3,4",
            design.ids(single),
        )
    ]


def _one_seed(design: Design, settings: list[int]) -> str:
    """Such as "all settings have one seed" and "r=4 has one seed"."""
    have = "has" if len(settings) == 1 else "have"
    return f"{design.named(settings)} {have} one seed"


def few_examples(design: Design) -> list[Lint]:
    """Find test sets with too few scored examples, in general or for the questions asked."""
    metric = design.answers.metric if design.answers else metric_of(design.records)
    if metric is None:
        return []
    evaluations = choose_evaluations(design.records)[JUDGE]["of_runs"]
    counts = {
        one.run_id: evaluation.splits[JUDGE].metrics[metric].num_examples
        for one, evaluation in zip(design.records, evaluations, strict=True)
        if evaluation is not None and metric in evaluation.splits[JUDGE].metrics
    }
    few = {run: count for run, count in counts.items() if count < FEWEST_EXAMPLES}
    if few:
        least, most = min(few.values()), max(few.values())
        examples = f"{least}" if least == most else f"{least} to {most}"
        text = (
            f"{JUDGE} {metric} stands on {examples} example{'' if most == 1 else 's'} for "
            f"{design.named(design.settings_with(few))}: fewer than {FEWEST_EXAMPLES} tell little "
            f"about other examples"
        )
        return [Lint("few-examples", text, _more_examples(design, metric, None), tuple(few))]
    return _unsettled(design, metric)


def _unsettled(design: Design, metric: str) -> list[Lint]:
    """Find questions that lack examples, not seeds."""
    asked = design.answers.verdicts if design.answers else []
    lacking = [one for one in asked if one.more_examples is not None]
    if not lacking or design.answers is None:
        return []
    names = and_more([f"'{one.question.name}'" for one in lacking], 2)
    have = max(one.examples for one in lacking)
    needed = max(one.more_examples or 0 for one in lacking)
    runs_of = design.answers.runs
    settings = {i for one in lacking for pair in one.question.pairs for i in pair}
    ids = {run for i in sorted(settings) if i < len(runs_of) for run in runs_of[i]}
    text = (
        f"{have:,} {JUDGE} examples are too few for {len(lacking)} of {len(asked)} questions "
        f"({names}): more seeds would not settle them"
    )
    remedy = _more_examples(design, metric, needed)
    return [Lint("few-examples", text, remedy, design.ids(design.settings_with(ids)))]


def _more_examples(design: Design, metric: str, wanted: int | None) -> str:
    """How to score more test examples: what limits them, and the command.

    Args:
        wanted: examples that would settle what is asked; None: not known.
    """
    folder = shlex.quote(str(design.runs[0][0].parent))
    too_long = [
        note
        for one in design.records
        for note in one.notes
        if note.startswith(f"data.{JUDGE}: ") and "longer than data.max_length" in note
    ]
    if too_long:
        return f"raise data.max_length and train again ({too_long[0].removeprefix('data.test: ')})"
    config = design.records[0].config
    data, trainer = config.get("data", {}), config.get("trainer", {})
    if is_generated(metric):
        key = "data.answer_examples"
    elif trainer.get("eval_examples") is not None:
        key = "trainer.eval_examples"
    else:
        key = "data.num_test"
    limit: Any = {
        "data.answer_examples": data.get("answer_examples"),
        "trainer.eval_examples": trainer.get("eval_examples"),
        "data.num_test": data.get("num_test"),
    }[key]
    size = wanted or 10 * FEWEST_EXAMPLES
    if limit is None:
        return (
            f"score about {size:,} test examples: `lorabench evaluate {folder} data.test.path=...` "
            f"with a larger set, or a larger data.test_fraction"
        )
    return f"score more test examples: `lorabench evaluate {folder} {key}={size}`"


def selection_seeds(design: Design) -> list[Lint]:
    """Find runs with a seed that the design was chosen on: what was luck there is luck here."""
    found: dict[tuple[int, ...], list[str]] = {}
    used: set[int] = set()
    asked = _asked(design)
    for one in design.records:
        used |= {*one.seeds.values()}
        seeds = set((one.config.get("compare") or {}).get("selected_on") or ())
        seeds |= set(asked.get(one.run_id, ()))
        if seeds & {*one.seeds.values()}:
            found.setdefault(tuple(sorted(seeds)), []).append(one.run_id)
            used |= seeds
    if not found:
        return []
    seeds_of = sorted({seed for seeds in found for seed in seeds})
    runs = [run for ids in found.values() for run in ids]
    fresh = max(used) + 1
    return [
        Lint(
            "selection-seeds",
            f"this design was chosen on seed{'s' if len(seeds_of) > 1 else ''} "
            f"{', '.join(map(str, seeds_of))}, and {len(runs)} of {len(design.records)} runs have "
            f"{'one of them' if len(seeds_of) > 1 else 'it'}: they would find again what was luck "
            f"there",
            f"confirm it with fresh seeds in a sweep of its own: sweep=confirm "
            f"seed={','.join(str(fresh + i) for i in range(5))}",
            tuple(runs),
        )
    ]


def _asked(design: Design) -> dict[str, list[int]]:
    """`compare.selected_on` of the newest command that asked for each run, from sweep.json.

    A finished run keeps the record of the command that trained it.
    """
    from lorabench.sweep import SweepFolder

    found: dict[str, list[int]] = {}
    for folder in dict.fromkeys(path.parent for path, _ in design.runs):
        if (folder / "sweep.json").is_file():
            for run, entry in SweepFolder(folder).read().runs.items():
                found[run] = list((entry.config.get("compare") or {}).get("selected_on") or ())
    return found


def test_in_train(design: Design) -> list[Lint]:
    """Find test and validation sets whose prompts are in train, from the notes of the data."""
    found: dict[str, list[str]] = {}
    for one in design.records:
        for note in one.notes:
            if OVERLAP.match(note):
                found.setdefault(note, []).append(one.run_id)
    lints = []
    for note, ids in found.items():
        split, shared, count = OVERLAP.match(note).groups()  # type: ignore[union-attr]
        split = split.removeprefix("tests.")
        harm = (
            "it hides what training makes the base forget"
            if split == RETENTION
            else f"{split} scores overstate how well a run does on new prompts, and reward what "
            "memorises best"
        )
        remedy = note.rpartition("; ")[2] if "; " in note else "remove them from one of the two"
        lints.append(
            Lint(
                "test-in-train",
                f"{shared} of {count} {split} prompts are in the training set too "
                f"({design.named(design.settings_with(ids))}): {harm}",
                remedy,
                tuple(ids),
            )
        )
    return lints
