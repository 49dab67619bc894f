"""Content -> one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench import masking
from lorabench.compare.lints import is_linted
from lorabench.files import write_atomic
from lorabench.report.changes import shortened
from lorabench.report.content import Content
from lorabench.report.style import WIDTH, Group
from lorabench.show.compared import how_judged, nothing_asked
from lorabench.show.text import finite

if TYPE_CHECKING:
    from lorabench.compare import Answers

HERE = Path(__file__).parent / "assets"
MOST_BYTES = 6_000_000  # of a page; what is beyond is left out, and named
PATIENCE = 60  # seconds after which a page that is not written again stops reloading itself
ROUGHLY = 150_000  # bytes of style, script, sentences and provenance
SENTENCE = 1000  # characters of a sentence
MARKS = {"found": "●", "no worse": "◆", "trade-off": "■", "not settled": "○", "no verdict": "–"}
TABS = (
    ("curves", "Learning curves", ("curves",)),
    ("trade-offs", "Trade-offs", ("parameters", "time", "heat map", "gain and forgetting")),
)
NONE_YET = "No run has finished yet: the runs that train, and what failed, are in their tab."
WORD = re.compile(r"[\w.+]+")
STATUSES = ("finished", "running", "trained", "planned", "interrupted", "stopped", "failed")


def write(content: Content, out: Path, reload_seconds: int | None = None) -> int:
    """Replace the page in one step, and return its bytes.

    Args:
        reload_seconds: how often the page reloads itself; None: never.
    """
    page = html(content, reload_seconds)
    write_atomic(out, page)
    return len(page.encode())


def html(content: Content, reload_seconds: int | None = None) -> str:
    """Return the page."""
    from plotly.offline import get_plotlyjs

    library = get_plotlyjs() if content.groups else ""
    figures, examples, left_out = _fitting(content, MOST_BYTES - len(library.encode()))
    groups: dict[str, Any] = dict.fromkeys(["intervals", *(n for one in TABS for n in one[2])])
    groups |= {one.name: one for one in content.groups if figures[one.name]}
    text: str = (
        _environment()
        .get_template("page.html")
        .render(
            content=content,
            sections=_sections(content.answers),
            counts=[
                (name, content.statuses[name]) for name in STATUSES if name in content.statuses
            ],
            marks=MARKS,
            nothing=nothing_asked(content.answers)
            if content.statuses.get("finished")
            else NONE_YET,
            counted=how_judged(content.answers) if content.answers.verdicts else "",
            notes=_notes(content.table),
            groups=groups,
            tabs=[one for one in TABS if any(groups[name] for name in one[2])],
            has_examples=bool(examples),
            left_out=[*content.left_out, *left_out],
            data=_script(
                masking.mask(
                    {
                        "figures": figures,
                        "examples": examples,
                        "reload": reload_seconds,
                        "made": content.made,
                        "patience": PATIENCE,
                    }
                )
            ),
            library=library,
            style=(HERE / "page.css").read_text(encoding="utf-8"),
            script=(HERE / "page.js").read_text(encoding="utf-8"),
        )
    )
    return text.lstrip().encode("utf-8", "replace").decode()  # data may hold half characters


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.filters["short"] = lambda text, longest=SENTENCE: shortened(text, longest)
    return found


def _sections(answers: Answers) -> list[tuple[str, list[tuple[str, str]]]]:
    """Sentences by factor: (factor, [(outcome, sentence)])."""
    found: dict[str, list[tuple[str, str]]] = {}
    for one, text in zip(answers.verdicts, answers.sentences(), strict=True):
        found.setdefault(one.question.factor, []).append((one.outcome, text))
    return list(found.items())


def _fitting(
    content: Content, room: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any], list[str]]:
    """What fits: the first figure of each kind, then the examples, then the other figures."""
    found: dict[str, list[dict[str, Any]]] = {group.name: [] for group in content.groups}
    left_out: list[str] = []
    room -= ROUGHLY + 100 * sum(map(len, [*content.runs.rows, *content.settings.rows]))

    def add(group: Group, what: str, figure: Any) -> None:
        nonlocal room
        drawn = json.loads(figure.to_json())
        num_bytes = len(_script(drawn))
        if num_bytes > room:
            named = f"{group.title}, {what}" if what else group.title
            left_out.append(f"the figure \u201c{named}\u201d: the page would be large")
            return
        room -= num_bytes
        found[group.name].append({"name": what, "figure": drawn})

    for group in content.groups:
        add(group, *next(iter(group.figures.items())))
    examples = content.examples
    num_bytes = len(_script(examples))
    if num_bytes > room:
        examples = {}
        left_out.append("the view of examples: the page would be large")
    else:
        room -= num_bytes
    for group in content.groups:
        for what, figure in list(group.figures.items())[1:]:
            add(group, what, figure)
    return found, examples, left_out


def _notes(table: dict[str, Any]) -> list[str]:
    """Notes of records that no lint says, with how many runs have them."""
    finished = sum(len(row["runs"]) for row in table["rows"])
    return [
        note if count == finished else f"{note} ({count} of {finished} runs)"
        for note, count in table["notes"].items()
        if not is_linted(note)
    ]


def _script(data: dict[str, Any]) -> str:
    """JSON that can stand inside of a script element: nothing in it ends the element."""
    text = json.dumps(finite(data), separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def write_png(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Write every figure as a PNG file for a paper, and return the files.

    Raises:
        ConfigErrors: kaleido or a browser is missing.
    """
    from plotly import io

    from lorabench.config import ConfigErrors, first_line

    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        folder / f"{'-'.join(WORD.findall(f'{group.name} {what}'))[:100]}.png": figure
        for group in groups
        for what, figure in group.figures.items()
    }
    for figure in figures.values():
        figure.update_layout(paper_bgcolor="white", plot_bgcolor="white")
    heights = [figure.layout.height for figure in figures.values()]
    try:
        io.write_images(
            list(figures.values()), list(figures), width=WIDTH, height=heights, scale=2
        )  # fmt: skip
    except Exception as error:  # no kaleido, no browser, a browser that does not start
        raise ConfigErrors(
            f"--png: must have kaleido and a Chrome or Chromium that starts; got: "
            f"{first_line(error)}; `pip install 'lorabench[png]'` installs kaleido"
        ) from error
    return list(figures)
