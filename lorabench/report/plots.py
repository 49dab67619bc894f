"""plotly's figures of a sweep: for the page, a notebook, or files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.compare import HIGHER_IS_BETTER
from lorabench.compare.questions import told
from lorabench.compare.sentences import sentence
from lorabench.compare.tables import FIRST
from lorabench.record import Record
from lorabench.report import scores
from lorabench.report.curves import Curve, curves_of
from lorabench.report.style import (
    COLOURS,
    DASHES,
    Group,
    colour_of,
    cut,
    finished,
    label_of,
    safe,
    with_unit,
)  # fmt: skip

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from lorabench.compare import Answers
    from lorabench.compare.judging import Verdict

VISIBLE = 8  # curves that are on at first
MOST_QUESTIONS = 40  # in the figure of intervals
OUTCOMES = {
    "found": (COLOURS[0], "circle"),
    "no worse": (COLOURS[2], "diamond"),
    "trade-off": (COLOURS[4], "square"),
    "not settled": (COLOURS[1], "circle-open"),
    "no verdict": (COLOURS[7], "x-thin-open"),
}


def figures(runs: Iterable[tuple[Path, Record]], metric: str | None = None) -> dict[str, go.Figure]:
    """Return the page's figures of some runs.

    Args:
        runs: folders and records, such as from `lorabench.record.find`.
        metric: that is compared; None: the first of nll, exact_match, accuracy, answer and gym.
    Returns:
        By names such as "curves validation/nll" and "heat map head x r".
    """
    from lorabench import compare
    from lorabench.compare.bases import add_changes, bases

    runs = list(runs)
    answers = compare.verdicts(runs, metric)
    records = [one for _, one in runs]
    table = compare.table(records)
    sweeps = dict.fromkeys(path.parent for path, _ in runs)
    table["bases"] = bases(sweeps, records, table["evaluations"])
    if answers.metric is not None and answers.retention_metric is not None:
        add_changes(table, table["bases"], answers.metric, answers.retention_metric)
    found = groups_of(runs, table, answers)
    return {
        f"{group.name} {what}".strip(): figure
        for group in found
        for what, figure in group.figures.items()
    }


def groups_of(
    runs: Sequence[tuple[Path, Record]], table: dict[str, Any], answers: Answers
) -> list[Group]:
    """Return every group that has a figure.

    Args:
        table: `compare.table` of the runs, with what `add_changes` adds.
    """
    rows = settings_of_curves(runs, table)
    labels = [one["label"] for one in rows]
    curves = curves_of([one["folders"] for one in rows])
    found = [
        _intervals(answers),
        _learning(curves, labels, _leading(rows, table, answers)),
        *scores.scores(table, answers),
        scores.heat_maps(table, answers),
        scores.gains(table),
    ]
    return [one for one in found if one is not None and one.figures]


def settings_of_curves(
    runs: Sequence[tuple[Path, Record]], table: dict[str, Any]
) -> list[dict[str, Any]]:
    """Settings with all their runs, those that have not finished among them.

    Of runs of the same setting and seeds the newest counts, as in the table.

    Returns:
        label, runs (ids) and folders of each, in the order of the table's rows.
    """
    found: dict[str, dict[Any, tuple[Path, Record, dict[str, Any]]]] = {}
    for (path, entry), row in zip(runs, table["runs"], strict=True):
        own = found.setdefault(repr(sorted(row["setting"].items())), {})
        seeds = tuple(sorted(entry.seeds.items()))
        if seeds not in own or entry.started > own[seeds][1].started:
            own[seeds] = path, entry, row
    places = {run: i for i, row in enumerate(table["rows"]) for run in row["runs"]}
    settings = [
        {
            "label": label_of(next(iter(own.values()))[2]["setting"], table),
            "runs": [entry.run_id for _, entry, _ in own.values()],
            "folders": [path for path, _, _ in own.values()],
        }
        for own in found.values()
    ]
    last = len(places)
    return sorted(settings, key=lambda one: min(places.get(run, last) for run in one["runs"]))


# --- one kind after the other ----------------------------------------------------------------


def _intervals(answers: Answers) -> Group | None:
    """The interval of every question."""
    asked = [one for one in answers.verdicts if math.isfinite(one.gain)]
    if not asked:
        return None
    import plotly.graph_objects as go

    shown = asked[:MOST_QUESTIONS]
    figure = go.Figure()
    names, sentences = [_side(one) for one in shown], [sentence(one) for one in shown]
    for outcome, (colour, marker) in OUTCOMES.items():
        own = [i for i, one in enumerate(shown) if one.outcome == outcome]
        if not own:
            continue
        signed = [_signed(shown[i]) for i in own]
        figure.add_scatter(
            x=[one[0] for one in signed],
            y=own,
            error_x={
                "type": "data", "symmetric": False,
                "array": [one[2] - one[0] for one in signed],
                "arrayminus": [one[0] - one[1] for one in signed],
                "color": colour, "thickness": 2,
            },
            mode="markers",
            marker={
                "color": colour, "symbol": marker, "size": 9,
                "line": {"width": 2, "color": colour},
            },
            name=outcome,
            text=[safe(cut(sentences[i], 300)) for i in own],
            hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=0, line={"width": 1, "dash": "dot", "color": COLOURS[7]})
    figure.update_yaxes(
        tickmode="array", tickvals=list(range(len(shown))), ticktext=names,
        autorange="reversed", automargin=True, zeroline=False,
    )  # fmt: skip
    figure.update_xaxes(title=f"gain in test {with_unit(str(answers.metric))}", zeroline=False)
    more = len(asked) - len(shown)
    return Group(
        "intervals",
        "How sure",
        "One line per question: by how much the first level is better than the second on test, "
        "with the interval that its sentence names; with one seed it covers the examples only."
        + (f" {more} more questions are in the list above alone." if more else ""),
        {"": finished(figure, 110 + 26 * len(shown))},
    )


def _side(one: Verdict) -> str:
    first, second = (told(one.question.factor, level) for level in one.question.levels)
    return safe(cut(f"{first} – {second}{one.question.where}", 70))


def _signed(one: Verdict) -> tuple[float, float, float]:
    """The gain of the question's first level over its second, and its interval."""
    low, high = (one.low, one.high) if math.isfinite(one.low) else (one.plain_low, one.plain_high)
    if one.better == one.question.levels[0]:
        return one.gain, low, high
    return -one.gain, -high, -low


def _leading(rows: list[dict[str, Any]], table: dict[str, Any], answers: Answers) -> list[int]:
    """Settings whose curves are on at first: the best ones by validation."""
    metric = answers.metric
    values = {
        run: row["metrics"].get("validation", {}).get(metric, {}).get("mean")
        for row in table["rows"]
        for run in row["runs"]
    }
    sign = -1 if metric in HIGHER_IS_BETTER else 1

    def key(place: int) -> tuple[bool, float]:
        known = [v for run in rows[place]["runs"] if (v := values.get(run)) is not None]
        return (not known, sign * known[0] if known else 0.0)

    return sorted(sorted(range(len(rows)), key=key)[:VISIBLE])


def _learning(curves: Sequence[Curve], labels: Sequence[str], leading: list[int]) -> Group | None:
    """Curves of every metric, with bands over seeds."""
    import plotly.graph_objects as go

    def first(metric: str) -> tuple[int, str]:
        split, _, name = metric.partition("/")
        kind = 0 if split == "validation" else 1
        return (kind * 10 + (FIRST.index(name) if name in FIRST else 9), metric)

    found: dict[str, go.Figure] = {}
    for metric in sorted({one.metric for one in curves}, key=first):
        figure = go.Figure()
        for one in (curve for curve in curves if curve.metric == metric):
            place = one.setting
            colour, dash = colour_of(place), DASHES[place // len(COLOURS) % len(DASHES)]
            on: Any = True if place in leading else "legendonly"
            group = {"legendgroup": str(place), "visible": on}
            if one.low is not None and one.high is not None:
                edge = {
                    "x": one.steps, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip",
                    "showlegend": False,
                }  # fmt: skip
                figure.add_scatter(y=one.high, **edge, **group)
                filled = {"fill": "tonexty", "fillcolor": _faint(colour)}
                figure.add_scatter(y=one.low, **filled, **edge, **group)
            marked = "lines+markers" if len(one.steps) < 12 else "lines"
            figure.add_scatter(
                x=one.steps, y=one.mean, mode=marked, name=safe(labels[place]),
                line={"color": colour, "dash": dash, "width": 2}, marker={"size": 5},
                hovertemplate="step %{x:.0f}: %{y:.4g}", **group,
            )  # fmt: skip
        figure.update_xaxes(title="optimizer steps")
        split, _, name = metric.partition("/")
        figure.update_yaxes(title=f"{safe(split)} {with_unit(name)}" if name else safe(metric))
        figure.update_layout(hovermode="x unified")
        found[metric] = finished(figure)
    if not found:
        return None
    per = max(one.steps_a_point for one in curves)
    off = len(labels) - len(leading)
    return Group(
        "curves",
        "Learning curves",
        "Mean over the seeds of a setting; the band is one standard deviation over seeds."
        + (f" Up to {per} logged steps are averaged into a point." if per > 1 else "")
        + (
            f" {off} settings are hidden at first; the {len(leading)} best on validation, or the "
            f"first {len(leading)}, are shown. A click in the legend shows or hides one, a double "
            "click shows it alone."
            if off > 0
            else " A click in the legend hides a setting, a double click shows it alone."
        ),
        found,
    )


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
