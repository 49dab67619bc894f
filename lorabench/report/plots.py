"""plotly's figures of a sweep: for the page, a notebook, or files."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.compare import HIGHER_IS_BETTER
from lorabench.compare.bases import CHANGES
from lorabench.compare.questions import factors_of, text_of, told
from lorabench.compare.sentences import sentence
from lorabench.compare.tables import FIRST, short_keys
from lorabench.record import Record
from lorabench.report.curves import Curve, curves_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from lorabench.compare import Answers
    from lorabench.compare.judging import Verdict

# Okabe and Ito 2008: eight colours that colour-blind readers tell apart. Grey in place of black,
# which a dark page hides.
COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A800", "#7F7F7F",
)  # fmt: skip
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "pentagon")
VISIBLE = 8  # curves that are on at first
LABEL = 60  # characters of a setting in a legend
WIDTH = 1100  # pixels of a figure in a file or a notebook
MOST_QUESTIONS = 40  # in the figure of intervals
OUTCOMES = {
    "found": (COLOURS[0], "circle"),
    "no worse": (COLOURS[2], "diamond"),
    "trade-off": (COLOURS[4], "square"),
    "not settled": (COLOURS[1], "circle-open"),
    "no verdict": (COLOURS[7], "x-thin-open"),
}


@dataclass(frozen=True)
class Group:
    """Figures of one kind.

    Args:
        name: such as "curves".
        figures: by what they show, such as a metric; the first is shown first.
    """

    name: str
    title: str
    caption: str
    figures: dict[str, go.Figure]


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
    folders = {one.run_id: path for path, one in runs}
    labels = [one["label"] for one in rows]
    curves = curves_of([[folders[run] for run in one["runs"]] for one in rows])
    found = [
        _intervals(answers),
        _learning(curves, labels, _leading(rows, table, answers)),
        *_scores(table, answers),
        _heat_maps(table, answers),
        _changes(table),
    ]
    return [one for one in found if one is not None and one.figures]


def settings_of_curves(
    runs: Sequence[tuple[Path, Record]], table: dict[str, Any]
) -> list[dict[str, Any]]:
    """Settings by all their runs, those that have not finished among them: label, runs."""
    found: dict[str, dict[str, Any]] = {}
    order = [one["run_id"] for one in table["runs"]]
    for run in sorted(table["runs"], key=lambda one: order.index(one["run_id"])):
        key = repr(sorted((k, text_of(v)) for k, v in run["setting"].items()))
        own = found.setdefault(key, {"label": label_of(run["setting"], table), "runs": []})
        own["runs"].append(run["run_id"])
    places = {run: i for i, row in enumerate(table["rows"]) for run in row["runs"]}
    last = len(places)
    return sorted(found.values(), key=lambda one: min(places.get(r, last) for r in one["runs"]))


def label_of(setting: dict[str, Any], table: dict[str, Any]) -> str:
    """Such as "head=lora r=16"; of a sweep of one setting "all runs"."""
    from lorabench.show.results import columns_of

    columns = columns_of(table)
    names = short_keys(columns)
    text = " ".join(
        f"{name}={text_of(setting.get(key))}" for key, name in zip(columns, names, strict=True)
    )
    return cut(text or "all runs")


def cut(text: str, longest: int = LABEL) -> str:
    """A text that fits a legend."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def safe(text: str) -> str:
    """A text that plotly shows as it is: it reads some tags."""
    return html.escape(text, quote=False)


def colour_of(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def arrow(metric: str) -> str:
    """A metric, and which way is better."""
    return f"{safe(metric)} ({'higher' if metric in HIGHER_IS_BETTER else 'lower'} is better)"


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
    figure.update_xaxes(title=f"test {safe(str(answers.metric))} gained", zeroline=False)
    more = len(asked) - len(shown)
    return Group(
        "intervals",
        "How sure",
        "One line per question: by how much the first level is better than the second on test, "
        "with the interval that its sentence names. An interval that reaches across the dotted "
        "line is not settled."
        + (f" {more} more questions are in the list above alone." if more else ""),
        {"": _finished(figure, 110 + 26 * len(shown))},
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
        unit = {"loss": " (nats per token)", "nll": " (nats)"}.get(metric.partition("/")[2], "")
        figure.update_yaxes(title=f"{safe(metric)}{unit}")
        figure.update_layout(hovermode="x unified")
        found[metric] = _finished(figure)
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
            f" {off} settings are off at first: the {len(leading)} best on validation are on; "
            "a click in the legend shows or hides one, a double click shows it alone."
            if off > 0
            else " A click in the legend hides a setting, a double click shows it alone."
        ),
        found,
    )


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def _scores(table: dict[str, Any], answers: Answers) -> list[Group]:
    """Test scores against what they cost, with the Pareto front."""
    metrics = metrics_of(table, answers)
    axes = {
        "parameters": (
            "Score and trainable parameters", "trainable parameters", "log",
            lambda row: row["trainable_parameters"],
        ),
        "time": (
            "Score and time", "training seconds of a run (of a pack: its share)", "linear",
            lambda row: row["train_seconds_share"]["mean"],
        ),
    }  # fmt: skip
    found = []
    for name, (title, axis, scale, x_of) in axes.items():
        shown = {one: _pareto(table, one, axis, scale, x_of) for one in metrics}
        found.append(
            Group(
                name,
                title,
                "Mean over seeds on test; the bar is one standard deviation. The line joins the "
                "Pareto front: settings that no other beats in both. The front is of the means; "
                "whether a difference is more than chance, the verdicts say.",
                {one: figure for one, figure in shown.items() if figure is not None},
            )
        )
    return found


def metrics_of(table: dict[str, Any], answers: Answers) -> list[str]:
    """Metrics of test, the judge first."""
    there = {name for row in table["rows"] for name in row["metrics"].get("test", {})}
    return [
        name for name in dict.fromkeys([answers.metric, *FIRST, *sorted(there)]) if name in there
    ]  # type: ignore[misc]


def _pareto(
    table: dict[str, Any], metric: str, axis: str, scale: str, x_of: Any
) -> go.Figure | None:
    import plotly.graph_objects as go

    points = [
        (i, float(x), value)
        for i, row in enumerate(table["rows"])
        if (x := x_of(row)) and (value := row["metrics"].get("test", {}).get(metric))
    ]
    if not points:
        return None
    front = _front([(x, value["mean"]) for _, x, value in points], metric in HIGHER_IS_BETTER)
    figure = go.Figure()
    line = sorted((points[i][1], points[i][2]["mean"]) for i in front)
    if len(line) > 1:
        figure.add_scatter(
            x=[x for x, _ in line], y=[y for _, y in line], mode="lines", name="Pareto front",
            line={"color": COLOURS[7], "dash": "dot", "width": 2}, hoverinfo="skip",
        )  # fmt: skip
    for k, (i, x, value) in enumerate(points):
        label = label_of(table["rows"][i]["setting"], table)
        symbol = MARKERS[i // len(COLOURS) % len(MARKERS)]
        figure.add_scatter(
            x=[x], y=[value["mean"]], mode="markers", name=safe(label),
            error_y={"array": [value["sd"]], "thickness": 1.2} if value["sd"] else None,
            marker={
                "color": colour_of(i), "size": 13 if k in front else 9,
                "symbol": symbol if k in front else f"{symbol}-open",
                "line": {"width": 2, "color": colour_of(i)},
            },
            hovertemplate=f"%{{x:,.4g}}, %{{y:.4g}} over {value['n']} seeds<br>{safe(label)}"
            f"{', on the front' if k in front else ''}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title=axis, type=scale, rangemode="tozero")
    figure.update_yaxes(title=f"test {arrow(metric)}")
    return _finished(figure)


def _front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> set[int]:
    """Points that no other is as cheap and as good as, and better in one."""
    sign = -1 if higher_is_better else 1
    costs = [(x, sign * y) for x, y in points]
    return {
        i
        for i, (x, y) in enumerate(costs)
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in costs)
    }


def _heat_maps(table: dict[str, Any], answers: Answers) -> Group | None:
    """Two factors at a time, averaged over the others."""
    import plotly.graph_objects as go

    metric = answers.metric
    rows = [row for row in table["rows"] if metric in row["metrics"].get("test", {})]
    factors = [one for one in factors_of([row["setting"] for row in rows]) if len(one.levels) > 1]

    def liked(name: str) -> int:
        return ("head", "r").index(name) if name in ("head", "r") else 2

    factors.sort(key=lambda one: liked(one.name))
    found = {}
    for y, x in itertools.combinations(factors, 2):
        cells: dict[tuple[int, int], list[float]] = {}
        for i, row in enumerate(rows):
            place = y.of_settings[i], x.of_settings[i]
            cells.setdefault(place, []).append(row["metrics"]["test"][metric]["mean"])
        z = [
            [
                sum(own) / len(own) if (own := cells.get((i, j))) else None
                for j in range(len(x.levels))
            ]
            for i in range(len(y.levels))
        ]
        figure = go.Figure(
            go.Heatmap(
                z=z,
                x=[safe(cut(f"{x.name}={level}", 40)) for level in x.levels],
                y=[safe(cut(f"{y.name}={level}", 40)) for level in y.levels],
                colorscale="Cividis",
                reversescale=metric not in HIGHER_IS_BETTER,
                texttemplate="%{z:.4g}",
                hovertemplate="%{y}, %{x}: %{z:.5g}<extra></extra>",
                colorbar={"title": {"text": f"test {safe(str(metric))}"}},
                xgap=2, ygap=2,
            )
        )  # fmt: skip
        figure.update_xaxes(type="category", title=safe(x.name))
        figure.update_yaxes(type="category", title=safe(y.name), automargin=True)
        found[f"{y.name} x {x.name}"] = _finished(figure, 140 + 60 * len(y.levels))
    return Group(
        "heat map",
        "Two factors",
        f"Mean test {metric} over the seeds, and over what else varies; brighter is better.",
        found,
    )


def _changes(table: dict[str, Any]) -> Group | None:
    """What was gained on test against what was forgotten."""
    rows = [row for row in table["rows"] if all(name in row for name in CHANGES)]
    if not rows:
        return None
    import plotly.graph_objects as go

    figure = go.Figure()
    for i, row in enumerate(rows):
        label = label_of(row["setting"], table)
        gain, lost = row["gain"], row["forgetting"]
        figure.add_scatter(
            x=[lost["mean"]], y=[gain["mean"]], mode="markers", name=safe(label),
            error_x={"array": [lost["sd"]], "thickness": 1.2} if lost["sd"] else None,
            error_y={"array": [gain["sd"]], "thickness": 1.2} if gain["sd"] else None,
            marker={
                "color": colour_of(i), "size": 11,
                "symbol": MARKERS[i // len(COLOURS) % len(MARKERS)],
            },
            hovertemplate=f"gained %{{y:.4g}}, forgot %{{x:.4g}}<br>{safe(label)}<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=0, line={"width": 1, "dash": "dot", "color": COLOURS[7]})
    figure.add_hline(y=0, line={"width": 1, "dash": "dot", "color": COLOURS[7]})
    figure.update_xaxes(title=f"forgetting: {safe(rows[0]['forgetting']['metric'])} on retention")
    figure.update_yaxes(title=f"gain: {safe(rows[0]['gain']['metric'])} on test")
    return Group(
        "gain and forgetting",
        "Gain and forgetting",
        "How much better than the untrained base on test, and how much worse on retention: the "
        "upper left is best. Bars are one standard deviation over seeds.",
        {"": _finished(figure)},
    )


def _finished(figure: go.Figure, height: int = 420) -> go.Figure:
    """What all figures share. Colours of text and grid are the page's.

    Args:
        height: without the legend, which lies below.
    """
    names = [one.name for one in figure.data if one.name and one.showlegend is not False]
    rows = len(names) / max(1, WIDTH // (7 * max(map(len, names), default=1) + 56))
    legend = 22 * math.ceil(rows) + 10 if len(names) > 1 else 0
    figure.update_layout(
        template="none",
        font={"size": 13},
        margin={"l": 60, "r": 20, "t": 20, "b": 60},
        legend={
            "orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0,
            "maxheight": max(legend, 1),
        },
        showlegend=len(names) > 1,
        hoverlabel={"namelength": -1},
        height=height + legend,
        meta={"height": height},
    )  # fmt: skip
    figure.update_xaxes(automargin=True, title_font_size=13)
    figure.update_yaxes(automargin=True, title_font_size=13)
    return figure
