"""docs/faults.md and the tests say the same."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "faults.md"


def names_in(folder: Path) -> set[str]:
    """Names of the tests of a folder and of those in it."""
    return {
        node.name
        for path in folder.rglob("test_*.py")
        if path != Path(__file__)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_row_has_its_tests_and_every_fault_its_row() -> None:
    rows = [row for row in PAGE.read_text(encoding="utf-8").splitlines() if row.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    assert all(len(row) == 3 and all(row) for row in cells)
    named = {name for row in cells for name in re.findall(r"`(test_\w+)`", row[2])}
    assert all(re.search(r"`test_", row[2]) for row in cells if row[0] != "fault")
    assert named <= names_in(HERE.parent), sorted(named - names_in(HERE.parent))
    assert names_in(HERE) <= named, sorted(names_in(HERE) - named)
