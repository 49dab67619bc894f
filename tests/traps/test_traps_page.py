"""docs/traps.md and the tests beside this one say the same."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "traps.md"


def rows() -> dict[str, list[str]]:
    """Cells of every row of the page, by its id."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if re.match(r"\| T\d", line):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 5 and all(cells), line
            assert cells[0] not in found, line
            found[cells[0]] = cells
    return found


def of_the_tests() -> dict[str, set[str]]:
    """Names of the tests of every id."""
    found = defaultdict(set)
    for path in sorted({*HERE.glob("test_*.py")} - {Path(__file__)}):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            ids = re.findall(r"T\d+\.\d+", ast.get_docstring(node) or "")
            assert ids, f"{path.name}: {node.name} names no row of {PAGE.name}"
            for one in ids:
                found[one].add(node.name)
    return found


def test_every_row_has_its_tests_and_every_test_its_row() -> None:
    found = of_the_tests()
    named = {one: set(re.findall(r"`(test_\w+)`", cells[4])) for one, cells in rows().items()}
    assert named == found


def test_rows_are_numbered_in_order() -> None:
    numbers = [tuple(map(int, one[1:].split("."))) for one in rows()]
    assert numbers == sorted(numbers)
    for section in range(1, 9):
        row_numbers = [row for s, row in numbers if s == section]
        assert row_numbers == list(range(1, len(row_numbers) + 1)) and row_numbers
