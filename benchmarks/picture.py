"""The pictures of README.md and docs/dashboards.md, of a sweep that was trained.

    lorabench train -m experiment=lm_head
    lorabench train -m experiment=lm_head tracker=trackio sweep=lm_head_trackio
    python benchmarks/picture.py docs

The page and trackio's dashboard in a headless Chromium, W&B's terminal dashboard in tmux. None of
them is faked: what is not installed fails.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

from lorabench.cli import main as lorabench

SWEEP, TRACKIO = Path("outputs/lm_head"), Path("outputs/lm_head_trackio")
VIEW = {"width": 1200, "height": 900}
TABS = {"report": "verdicts", "report-trade-offs": "trade-offs", "report-examples": "examples"}
COLUMNS, LINES = 140, 32
# Runs of one seed, all of them shown, two charts side by side.
KEYS = ["C-f", "C-l", "f", "cfg.seed=10", "Enter", "C-a", "y", "/", "loss", "Enter"]
KEYS += ["c", "1", "r", "1"]
PORT = "7861"


def of_page(browser: Browser, folder: Path) -> None:
    """The page of a sweep, tab by tab."""
    page = browser.new_context(viewport=VIEW, color_scheme="light", offline=True).new_page()
    page.goto((SWEEP / "report.html").resolve().as_uri())
    for name, tab in TABS.items():
        page.click(f"#tab-{tab}")
        page.wait_for_timeout(500)  # until figures are drawn
        page.screenshot(path=folder / f"{name}.png")


def of_wandb(browser: Browser, folder: Path) -> None:
    """`wandb leet`, which reads the offline files."""
    tmux = ["tmux", "-L", "lorabench"]
    command = f"wandb leet {SWEEP / 'wandb'}"
    size = ["-x", str(COLUMNS), "-y", str(LINES)]
    with tempfile.TemporaryDirectory() as settings:  # it keeps filters there
        asked = f"COLORTERM=truecolor WANDB_CONFIG_DIR={settings} {command}"
        subprocess.run([*tmux, "new-session", "-d", "-s", "leet", *size, asked], check=True)
        shown = _typed(tmux)
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(shown.replace(str(Path.cwd()) + "/", "")))
    page = browser.new_context(viewport={"width": 1300, "height": 800}).new_page()
    page.set_content(console.export_svg(title=command, theme=DIMMED_MONOKAI))
    page.locator("svg").first.screenshot(path=folder / "wandb-leet.png")


def _typed(tmux: list[str]) -> str:
    """What the terminal shows when the keys were typed."""
    try:
        time.sleep(10)
        for key in KEYS:
            subprocess.run([*tmux, "send-keys", "-t", "leet", key], check=True)
            time.sleep(1)
        time.sleep(10)  # while it reads the runs
        capture = [*tmux, "capture-pane", "-t", "leet", "-p", "-e"]
        return subprocess.run(capture, check=True, capture_output=True, text=True).stdout
    finally:
        subprocess.run([*tmux, "kill-server"], check=True)


def of_trackio(browser: Browser, folder: Path) -> None:
    """trackio's dashboard: scores, grouped by setting."""
    with _serving():
        page = browser.new_context(viewport=VIEW).new_page()
        page.goto(f"http://127.0.0.1:{PORT}/?project=lorabench")
        page.fill("[placeholder*='ndcg']", "nll|loss|exact_match")
        page.click("[aria-label='Group by']")
        page.click("[role=option]:has-text('setting')")
        page.wait_for_timeout(5000)
        page.screenshot(path=folder / "trackio.png")


@contextmanager
def _serving() -> Iterator[None]:
    environment = os.environ | {
        "TRACKIO_DIR": str(TRACKIO / "trackio"), "GRADIO_SERVER_PORT": PORT, "BROWSER": "true"
    }  # fmt: skip
    command = ["trackio", "show", "--project", "lorabench"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        time.sleep(20)
        try:
            yield
        finally:
            process.terminate()


def main(arguments: list[str]) -> int:
    """Write every picture into a folder."""
    (folder,) = map(Path, arguments)
    code = lorabench(["report", str(SWEEP)])
    if code:
        return code
    with sync_playwright() as started:
        flags = ["--no-sandbox", "--disable-gpu"]
        browser: Any = started.chromium.launch(
            executable_path=shutil.which("chromium"), args=flags
        )
        for picture in (of_page, of_wandb, of_trackio):
            picture(browser, folder)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
