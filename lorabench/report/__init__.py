"""Runs -> one self-contained page, and its figures for a notebook. Imports without torch.

curves    metrics.jsonl -> curves of a setting over its seeds
changes   predictions -> which examples changed between settings, with what was written
texts     the texts of those examples, where the data are at hand
style     what all figures share
scores    figures of scores; plots the others, and all of them
tables    rows and columns of the page's tables
content   everything the page shows
page      the HTML file: it loads nothing from elsewhere
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorabench.report.plots import figures

__all__ = ["figures"]


def __getattr__(name: str) -> Any:
    """plotly is imported where a figure is asked for."""
    if name == "figures":
        import importlib

        return importlib.import_module("lorabench.report.plots").figures
    raise AttributeError(name)
