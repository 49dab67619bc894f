"""The README's picture: what `lorabench compare` prints of a sweep, as SVG.

python benchmarks/picture.py outputs/lm_head docs/lm_head.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from lorabench.cli import main as lorabench
from lorabench.show import compared

WIDTH = 132  # columns: the widest sentence and the columns that matter


def main(arguments: list[str]) -> int:
    """Print a comparison into a recording terminal and save it."""
    folder, picture = arguments
    with open("/dev/null", "w", encoding="utf-8") as nowhere:
        console = Console(
            record=True, width=WIDTH, file=nowhere, force_terminal=True, highlight=False,
            markup=False,
        )  # fmt: skip
        compared.console = lambda: console
        code = lorabench(["compare", folder])
    Path(picture).write_text(console.export_svg(title=f"lorabench compare {folder}"))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
