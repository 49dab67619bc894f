"""The page in a real browser without a network: no error, tabs, tables, light and dark, narrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import say
from pages import BROWSER, needs_browser, write_hostile, write_many

pytestmark = [
    needs_browser,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # plotly's and playwright's own
]
WIDE, NARROW = {"width": 1400, "height": 900}, {"width": 400, "height": 800}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    assert BROWSER, "LORABENCH_BROWSER=required, and there is no Chromium"
    with sync_playwright() as started:
        flags = [
            "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update",
        ]  # fmt: skip
        found = started.chromium.launch(executable_path=BROWSER, args=flags)
        yield found
        found.close()


class Opened:
    """A page and what it complained of or asked for."""

    def __init__(self, browser: Any, path: Path, viewport: dict[str, int], scheme: str):
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme, offline=True)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: m.type == "error" and self.errors.append(m.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: self.errors.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.resolve().as_uri())

    def tabs(self) -> list[str]:
        return [
            one.get_attribute("aria-controls") for one in self.page.query_selector_all("[role=tab]")
        ]

    def open(self, name: str) -> None:
        self.page.click(f"#tab-{name}")

    def overflows(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth > innerWidth")

    def close(self) -> None:
        addresses = [one for one in self.asked if not one.startswith(("file:", "data:", "blob:"))]
        self.context.close()
        assert self.errors == []
        assert addresses == [], "a page asks for nothing"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "s"
    write_many(folder, settings=20, seeds=3)
    assert say("report", folder).code == 0
    return folder / "report.html"


@pytest.mark.parametrize(("viewport", "scheme"), [(WIDE, "light"), (NARROW, "dark")])
def test_every_tab_opens(browser: Any, many: Path, viewport: dict[str, int], scheme: str) -> None:
    opened = Opened(browser, many, viewport, scheme)
    assert opened.tabs() == ["verdicts", "curves", "trade-offs", "examples", "runs", "provenance"]
    for name in opened.tabs():
        opened.open(name)
        shown = opened.page.query_selector_all("[role=tabpanel].open")
        assert [one.get_attribute("id") for one in shown] == [name]
        assert not opened.overflows(), f"{name} is wider than {viewport['width']} pixels"
        for figure in opened.page.query_selector_all("[role=tabpanel].open .figure"):
            assert figure.query_selector("svg.main-svg") is not None, "the figure is drawn"
    # Text can be read on the page's ground, in figures too.
    ground = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    opened.open("curves")
    fill_of = "getComputedStyle(document.querySelector('.open .xtitle')).fill"
    fill = opened.page.evaluate(fill_of)
    assert fill == {"light": "rgb(27, 31, 36)", "dark": "rgb(230, 233, 237)"}[scheme]
    opened.page.click("#theme")
    opened.page.wait_for_function(f"before => {fill_of} != before", arg=fill, timeout=5000)
    opened.close()


def test_tables_sort(browser: Any, many: Path) -> None:
    opened = Opened(browser, many, WIDE, "light")
    table = "#verdicts table.sortable"
    heads = [one.inner_text() for one in opened.page.query_selector_all(f"{table} thead th")]
    column = next(i for i, head in enumerate(heads) if head.startswith("test") and "nll" in head)

    def values() -> list[float]:
        cells = opened.page.query_selector_all(f"{table} tbody td:nth-child({column + 1})")
        return [float(cell.inner_text().split()[0]) for cell in cells]

    before = values()
    opened.page.click(f"{table} thead th:nth-child({column + 1}) button")
    assert values() == sorted(before) != before
    opened.page.click(f"{table} thead th:nth-child({column + 1}) button")
    assert values() == sorted(before, reverse=True)
    # Numbers sort as numbers: r = 16 comes behind r = 4.
    column = heads.index("r")
    opened.page.click(f"{table} thead th:nth-child({column + 1}) button")
    assert values() == sorted(values())
    opened.close()


def test_examples_of_two_settings(browser: Any, many: Path) -> None:
    """What the view counts, from the data that lie in the page."""
    opened = Opened(browser, many, WIDE, "light")
    opened.open("examples")
    opened.page.select_option("#first", "2")
    opened.page.select_option("#second", "7")
    found = opened.page.evaluate("JSON.parse(document.getElementById('data').textContent).examples")
    a, b = found["scores"][2], found["scores"][7]
    gained = [i for i in range(len(a)) if a[i] < 0.5 <= b[i]]
    lost = [i for i in range(len(a)) if b[i] < 0.5 <= a[i]]
    told = opened.page.inner_text("#counted")
    assert told.startswith(f"{len(gained)} of {len(a)} test examples went from wrong to right")
    assert f"and {len(lost)} from right to wrong" in told
    for kind, places in (("gained", gained), ("lost", lost)):
        opened.page.select_option("#which", kind)
        rows = opened.page.query_selector_all("#changed tbody tr")
        assert len(rows) == len(places) > 0
    text = max((found["texts"][found["written"][7][i]] for i in lost), key=len)
    opened.page.fill("#needle", text.upper())
    (row,) = opened.page.query_selector_all("#changed tbody tr")
    assert text in row.inner_text()
    opened.close()


def test_a_reload_keeps_the_place(browser: Any, many: Path) -> None:
    opened = Opened(browser, many, NARROW, "light")
    opened.open("runs")
    opened.page.click("#runs thead th:nth-child(2) button")
    opened.page.click("#theme")
    opened.page.reload()
    shown = opened.page.query_selector("[role=tabpanel].open")
    assert shown is not None and shown.get_attribute("id") == "runs"
    head = opened.page.query_selector("#runs thead th:nth-child(2)")
    assert head is not None and head.get_attribute("aria-sort") == "ascending"
    assert opened.page.evaluate("document.documentElement.dataset.theme") == "dark"
    opened.close()


@pytest.mark.slow
def test_a_reload_keeps_zoom_legend_and_unfolded_texts(browser: Any, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    write_hostile(folder, True)
    assert say("report", folder).code == 0
    opened = Opened(browser, folder / "report.html", WIDE, "light")
    page = opened.page
    opened.open("runs")
    page.click("#runs details summary")
    unfolded = "[...document.querySelectorAll('details')].map((one) => one.open)"
    assert page.evaluate(unfolded).count(True) == 1
    opened.open("curves")
    page.wait_for_selector("#curves .nsewdrag")
    look = "document.querySelector('#curves .figure')"
    assert page.evaluate(f"{look}.layout.xaxis.autorange")
    shown = page.evaluate(f"{look}.data.map((one) => one.visible)")
    page.click("#curves .legend .legendtoggle >> nth=1")
    page.wait_for_function(
        f"before => {look}.data.map((one) => one.visible).join() !== before.join()", arg=shown
    )
    box = page.locator("#curves .nsewdrag").first.bounding_box()
    assert box is not None
    left, top = box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"]
    page.mouse.move(left, top)
    page.mouse.down()
    page.mouse.move(left + 0.4 * box["width"], top + 0.4 * box["height"], steps=5)
    page.mouse.up()
    page.wait_for_function(f"() => {look}.layout.xaxis.autorange === false")
    state = (
        f"JSON.stringify([{look}.layout.xaxis.range, {look}.layout.yaxis.range, "
        f"{look}.data.map((one) => one.visible)])"
    )
    before = page.evaluate(state)
    page.reload()
    page.wait_for_selector("#curves .nsewdrag")
    assert page.evaluate(state) == before
    assert page.evaluate(unfolded)[0] and page.evaluate(unfolded).count(True) == 1
    page.click("#curves [data-title='Reset axes']")
    page.wait_for_function(f"() => {look}.layout.xaxis.autorange")
    page.reload()
    page.wait_for_selector("#curves .nsewdrag")
    assert page.evaluate(f"{look}.layout.xaxis.autorange")
    opened.close()


@pytest.mark.slow
def test_paper_has_every_figure(browser: Any, many: Path) -> None:
    """In dark on white, whatever the screen has."""
    opened = Opened(browser, many, WIDE, "dark")
    opened.page.click("#theme")
    opened.page.click("#theme")
    drawn = "[...document.querySelectorAll('.figure')].map((one) => !!one.querySelector('svg'))"
    assert not all(opened.page.evaluate(drawn))
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert all(opened.page.evaluate(drawn)) and len(opened.page.evaluate(drawn)) >= 4
    widths = "[...document.querySelectorAll('svg.main-svg')].map((one) => one.clientWidth)"
    assert min(opened.page.evaluate(widths)) > 1000
    fill = "getComputedStyle(document.querySelector('.xtitle')).fill"
    assert opened.page.evaluate(fill) == "rgb(27, 31, 36)"
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    opened.page.wait_for_function(f"() => {fill} === 'rgb(230, 233, 237)'")
    assert not opened.page.is_visible("#runs")
    opened.close()


@pytest.mark.parametrize("finished", [True, False])
def test_a_hostile_sweep_has_a_page_that_works(
    browser: Any, tmp_path: Path, finished: bool
) -> None:
    folder = tmp_path / "a <b>'\"&"
    write_hostile(folder, finished)
    assert say("report", folder).code == 0
    for viewport in (WIDE, NARROW):
        opened = Opened(browser, folder / "report.html", viewport, "light")
        assert opened.page.title() == f"{folder.name} · lorabench"
        for name in opened.tabs():
            opened.open(name)
            opened.page.wait_for_timeout(50)
            assert not opened.overflows(), name
        if "examples" in opened.tabs():
            opened.open("examples")
            opened.page.select_option("#which", "all")
            assert len(opened.page.query_selector_all("#changed tbody tr")) == 40
        assert opened.page.evaluate("window.hacked") is None
        opened.close()


def watched(folder: Path, settings: int, seconds: float, patience: float = 60) -> Path:
    """The page of a sweep as `watch` writes it."""
    write_many(folder, settings, seeds=2)
    assert say("report", folder).code == 0
    path = folder / "report.html"
    text = path.read_text().replace('"reload":null', f'"reload":{seconds}')
    path.write_text(text.replace('"patience":60', f'"patience":{patience}'))
    return path


@pytest.mark.slow
def test_a_watched_page_reloads_itself(browser: Any, tmp_path: Path) -> None:
    path = watched(tmp_path / "s", settings=20, seconds=1)
    opened = Opened(browser, path, NARROW, "light")
    opened.open("runs")
    opened.page.evaluate("scrollTo(0, 300)")
    path.write_text(path.read_text().replace("40 finished", "41 finished"))
    opened.page.wait_for_function(
        "() => document.body.innerText.includes('41 finished')", timeout=5000
    )
    opened.page.wait_for_function("() => scrollY === 300", timeout=5000)
    shown = opened.page.query_selector("[role=tabpanel].open")
    assert shown is not None and shown.get_attribute("id") == "runs"
    opened.close()


@pytest.mark.slow
def test_a_page_that_nothing_writes_any_more_stops_reloading(browser: Any, tmp_path: Path) -> None:
    """As where a watch was killed."""
    path = watched(tmp_path / "s", settings=2, seconds=0.3, patience=1)
    opened = Opened(browser, path, WIDE, "light")
    opened.page.wait_for_selector("#stale:visible", timeout=60_000)
    reloads = len(opened.asked)
    assert reloads == 8, "six rounds, and the one that tells"
    opened.page.wait_for_timeout(1000)
    assert len(opened.asked) == reloads
    opened.page.click("#again")
    opened.page.wait_for_function("() => document.querySelector('#stale').hidden", timeout=5000)
    opened.close()
