"""What all figures share: colours, markers, labels, the place of the legend."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorabench.compare import HIGHER_IS_BETTER
from lorabench.compare.questions import text_of
from lorabench.compare.tables import short_keys
from lorabench.show.results import columns_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito 2008: eight colours that colour-blind readers tell apart. Grey in place of black,
# which a dark page hides.
COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A800", "#7F7F7F",
)  # fmt: skip
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "pentagon")
UNITS = {"nll": "nats", "nll_per_token": "nats per token", "loss": "nats per token"}
LABEL = 60  # characters of a setting in a legend
WIDTH = 1100  # pixels of a figure in a file or a notebook


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


def label_of(setting: dict[str, Any], table: dict[str, Any]) -> str:
    """Such as "head=lora r=16"; of a sweep of one setting "all runs"."""
    columns = columns_of(table)
    names = short_keys(columns)
    text = " ".join(
        f"{name}={text_of(setting.get(key))}" for key, name in zip(columns, names, strict=True)
    )
    return cut(text or "all runs")


def cut(text: str, longest: int = LABEL) -> str:
    """A text that fits a legend; of long ones the middle goes, as their ends tell them apart."""
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


def safe(text: str) -> str:
    """A text that plotly shows as it is: it reads some tags."""
    return html.escape(text, quote=False)


def colour_of(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def unit_of(metric: str) -> str:
    """What a metric counts; nothing where that is not known."""
    if metric == "gym":
        return "mean reward"
    if metric in HIGHER_IS_BETTER:
        return "share of examples"
    return UNITS.get(metric, "")


def with_unit(metric: str, *more: str) -> str:
    """A metric with its unit, and what else is to be said of it."""
    told = "; ".join(text for text in (unit_of(metric), *more) if text)
    return f"{safe(metric)} ({told})" if told else safe(metric)


def arrow(metric: str) -> str:
    """A metric with its unit, and which way is better."""
    return with_unit(metric, f"{'higher' if metric in HIGHER_IS_BETTER else 'lower'} is better")


def finished(figure: go.Figure, height: int = 420) -> go.Figure:
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
