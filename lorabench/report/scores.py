"""Figures of scores: against what they cost, by two factors, and against what was forgotten."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorabench.compare import HIGHER_IS_BETTER
from lorabench.compare.bases import CHANGES
from lorabench.compare.questions import Factor, factors_of, follows
from lorabench.report.style import (
    COLOURS,
    MARKERS,
    Group,
    arrow,
    colour_of,
    cut,
    finished,
    label_of,
    safe,
    with_unit,
)  # fmt: skip
from lorabench.show.settings import scores_in

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from lorabench.compare import Answers


def scores(table: dict[str, Any], answers: Answers) -> list[Group]:
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
                "Pareto front: no other setting is at least as cheap and as good, and better in "
                "one of the two. It is of the means; whether a difference is more than chance, "
                "the verdicts say.",
                {one: figure for one, figure in shown.items() if figure is not None},
            )
        )
    return found


def metrics_of(table: dict[str, Any], answers: Answers) -> list[str]:
    """Metrics of test, the judge first."""
    return [name for split, name in scores_in(table, table["rows"], [], answers) if split == "test"]


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
    return finished(figure)


def _front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> set[int]:
    """Points that no other is as cheap and as good as, and better in one."""
    sign = -1 if higher_is_better else 1
    costs = [(x, sign * y) for x, y in points]
    return {
        i
        for i, (x, y) in enumerate(costs)
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in costs)
    }


def asked_about(rows: Sequence[dict[str, Any]], answers: Answers) -> set[int]:
    """Rows that the questions are about: where a value is chosen on validation, those that were."""
    if not answers.chosen:
        return set(range(len(rows)))
    factors = factors_of([row["setting"] for row in rows])
    levels = [
        {one.name: one.levels[one.of_settings[i]] for one in factors} for i in range(len(rows))
    ]
    return {
        i
        for i, own in enumerate(levels)
        for one in answers.chosen
        if own.items() >= {**one.at, one.factor: one.value}.items()
    }


def heat_maps(table: dict[str, Any], answers: Answers) -> Group | None:
    """Two factors at a time, averaged over the others."""
    import plotly.graph_objects as go

    metric = answers.metric
    asked = asked_about(table["rows"], answers)
    rows = [
        row
        for i, row in enumerate(table["rows"])
        if i in asked and metric in row["metrics"].get("test", {})
    ]
    factors = [one for one in factors_of([row["setting"] for row in rows]) if len(one.levels) > 1]

    def liked(name: str) -> int:
        return ("head", "r").index(name) if name in ("head", "r") else 2

    factors.sort(key=lambda one: liked(one.name))
    found = {}
    for y, x in itertools.combinations(factors, 2):
        values = [row["metrics"]["test"][metric]["mean"] for row in rows]
        means, is_fair = _cells(y, x, factors, values)
        z = [[means.get((i, j)) for j in range(len(x.levels))] for i in range(len(y.levels))]
        figure = go.Figure(
            go.Heatmap(
                z=z,
                x=list(range(len(x.levels))),
                y=list(range(len(y.levels))),
                customdata=[
                    [safe(f"{cut(one)}, {cut(other)}") for other in _named(x)] for one in _named(y)
                ],
                colorscale="Cividis",
                reversescale=metric not in HIGHER_IS_BETTER,
                texttemplate="%{z:.4g}",
                hovertemplate="%{customdata}: %{z:.5g}<extra></extra>",
                colorbar={
                    "title": {
                        "text": f"test {with_unit(str(metric))}", "side": "right",
                        "font": {"size": 12},
                    },
                    "thickness": 16,
                },
                xgap=2, ygap=2,
            )
        )  # fmt: skip
        # By place: levels that are alike where they are cut stay columns of their own.
        unfair = "" if is_fair else "; cells hold different settings, and do not compare"
        figure.update_xaxes(**_ticks(x), title=f"{safe(x.name)}{unfair}")
        figure.update_yaxes(**_ticks(y), title=safe(y.name))
        found[f"{y.name} x {x.name}"] = finished(figure, 140 + 60 * len(y.levels))
    return Group(
        "heat map",
        "Two factors",
        f"Mean test {metric} over the seeds, and over what else varies wherever all cells have it"
        f"{', at the values that were chosen on validation' if answers.chosen else ''}; brighter "
        f"is better.",
        found,
    )


def _cells(
    y: Factor, x: Factor, factors: Sequence[Factor], values: Sequence[float]
) -> tuple[dict[tuple[int, int], float], bool]:
    """Means by the levels of two factors, over such settings of the others as every cell has.

    Returns:
        The means; and False where there are none, so that each is of the settings it has.
    """
    others = [one for one in factors if not follows(one, y) and not follows(one, x)]
    cells: dict[tuple[int, int], dict[tuple[int, ...], float]] = {}
    for i, value in enumerate(values):
        at = tuple(one.of_settings[i] for one in others)
        cells.setdefault((y.of_settings[i], x.of_settings[i]), {})[at] = value
    shared = set.intersection(*map(set, cells.values()))
    means = {
        place: [value for at, value in own.items() if at in shared or not shared]
        for place, own in cells.items()
    }
    return {p: sum(own) / len(own) for p, own in means.items()}, bool(shared)


def _named(factor: Factor) -> list[str]:
    return [f"{factor.name}={level}" for level in factor.levels]


def _ticks(factor: Factor) -> dict[str, Any]:
    texts = [safe(cut(text, 30)) for text in _named(factor)]
    return {"tickmode": "array", "tickvals": list(range(len(texts))), "ticktext": texts}


def gains(table: dict[str, Any]) -> Group | None:
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
    figure.update_xaxes(title=f"forgetting: retention {with_unit(rows[0]['forgetting']['metric'])}")
    figure.update_yaxes(title=f"gain: test {with_unit(rows[0]['gain']['metric'])}")
    return Group(
        "gain and forgetting",
        "Gain and forgetting",
        "How much better than the untrained base on test, and how much worse on retention: the "
        "upper left is best. Bars are one standard deviation over seeds.",
        {"": finished(figure)},
    )
