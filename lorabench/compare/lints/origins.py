"""Lints of where runs come from: software, machine, data, base, evaluation."""

from __future__ import annotations

import shlex
from collections import Counter

from lorabench.compare.lints.design import Design, Lint, listed
from lorabench.compare.tables import choose_evaluations, other_stack, usual_stack
from lorabench.record import Evaluation

HASHES = {"data.data_hash": "training data", "model.base_hash": "base"}


def mixed_arithmetic(design: Design) -> list[Lint]:
    """Find runs of another arithmetic version: the same config gives other results there."""
    versions = Counter(one.arithmetic_version for one in design.records)
    if len(versions) < 2:
        return []
    newest = max(versions)
    old = [one for one in design.records if one.arithmetic_version != newest]
    settings = design.settings_with(one.run_id for one in old)
    listed = ", ".join(str(version) for version in sorted(versions))
    return [
        Lint(
            "mixed-arithmetic",
            f"runs of arithmetic versions {listed} are compared: {design.named(settings)} would "
            f"come out otherwise with version {newest}",
            "repeat the `lorabench train` command, which trains them again, and compare a folder "
            "without the old ones",
            tuple(one.run_id for one in old),
        )
    ]


def mixed_stacks(design: Design) -> list[Lint]:
    """Find runs whose software, device or threads are not those of most."""
    usual = usual_stack(design.records)
    differing = {
        one.run_id: [text for text in other_stack(one, usual) if not text.startswith("arithmetic ")]
        for one in design.records
    }
    other = {run: texts for run, texts in differing.items() if texts}
    if not other:
        return []
    texts = dict.fromkeys(text for found in other.values() for text in found)
    return [
        Lint(
            "mixed-stacks",
            f"{len(other)} of {len(design.records)} runs come from another software stack or "
            f"machine ({', '.join(texts)}), in {design.named(design.settings_with(other))}: they "
            f"differ by more than their setting",
            "train all runs on one of them, in a sweep folder of their own (sweep=NAME)",
            tuple(other),
        )
    ]


def mixed_data(design: Design) -> list[Lint]:
    """Find one config that stood for several training sets or bases: a file was edited."""
    lints = []
    for key, what in HASHES.items():
        contents: dict[str, dict[str, list[int]]] = {}
        for i, values in enumerate(design.settings):
            if key in values:
                words = repr(sorted((k, v) for k, v in values.items() if k not in HASHES))
                contents.setdefault(words, {}).setdefault(values[key], []).append(i)
        mixed = [of for of in contents.values() if len(of) > 1]
        if mixed:
            hashes = sorted({content for of in mixed for content in of})
            settings = [i for of in mixed for places in of.values() for i in places]
            lints.append(
                Lint(
                    "mixed-data" if key == "data.data_hash" else "mixed-base",
                    f"the same config stood for different {what} (hashes {', '.join(hashes)}) in "
                    f"{design.named(settings, [key])}: it was changed between the runs",
                    f"train all of them on the same {what}, in a sweep folder of their own "
                    f"(sweep=NAME)",
                    design.ids(settings),
                )
            )
    return lints


def mixed_evaluations(design: Design) -> list[Lint]:
    """Find splits that the runs were scored on in different ways."""
    splits: dict[str, list[str]] = {}  # by how their evaluations differ
    runs: dict[str, dict[str, None]] = {}
    for split, found in choose_evaluations(design.records).items():
        if found["shared"]:
            continue
        of_runs: list[Evaluation | None] = found["of_runs"]
        how = listed(_ways([one for one in of_runs if one is not None], split))
        splits.setdefault(how, []).append(split)
        for one, evaluation in zip(design.records, of_runs, strict=True):
            if evaluation is not None:
                runs.setdefault(how, {})[one.run_id] = None
    folders = dict.fromkeys(shlex.quote(str(path.parent)) for path, _ in design.runs)
    commands = listed(f"`lorabench evaluate {folder}`" for folder in folders)
    return [
        Lint(
            "mixed-evaluations",
            f"{listed(names)}: the runs were scored {how}, so their values are not comparable",
            f"{commands} scores all alike",
            tuple(runs[how]),
        )
        for how, names in splits.items()
    ]


def _ways(evaluations: list[Evaluation], split: str) -> list[str]:
    """How evaluations of a split differ."""
    found = []
    if len({one.splits[split].examples for one in evaluations}) > 1:
        found.append("on different examples")
    definitions: dict[str, set[str]] = {}
    for one in evaluations:
        for name, metric in one.splits[split].metrics.items():
            definitions.setdefault(name, set()).add(metric.definition)
    several = sorted({version for of in definitions.values() if len(of) > 1 for version in of})
    if several:
        found.append(f"by different definitions ({', '.join(several)})")
    return found or ["with different settings or metrics"]
