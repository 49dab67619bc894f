"""The pictures of README.md and docs/dashboards.md: the page of a sweep in a headless Chromium.

python benchmarks/picture.py outputs/lm_head docs
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from lorabench.cli import main as lorabench

VIEW = {"width": 1200, "height": 900}
SHOWN = {"report": "verdicts", "report-trade-offs": "trade-offs", "report-examples": "examples"}


def main(arguments: list[str]) -> int:
    """Write the page of a sweep and a picture of each of these tabs."""
    sweep, folder = arguments
    code = lorabench(["report", sweep])
    if code:
        return code
    page_file = (Path(sweep) / "report.html").resolve()
    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_context(viewport=VIEW, color_scheme="light", offline=True).new_page()
        page.goto(page_file.as_uri())
        for name, tab in SHOWN.items():
            page.click(f"#tab-{tab}")
            page.wait_for_timeout(500)  # until figures are drawn
            page.screenshot(path=Path(folder) / f"{name}.png")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
