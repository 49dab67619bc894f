"""The verbs that read what runs left: runs and compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lorabench.cli.mistakes import Parser, fail
from lorabench.cli.verbs import VERBS


def _folder_parser(verb: str) -> argparse.ArgumentParser:
    parser = Parser(prog=f"lorabench {verb}", description=VERBS[verb])
    parser.add_argument("folder", type=Path, help="folder of a sweep, such as outputs/lm_head")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    return parser


def _records(folder: Path) -> list[Any]:
    from lorabench import record
    from lorabench.config import ConfigErrors
    from lorabench.sweep import SweepFolder

    if not folder.is_dir():
        near = [str(p) for p in sorted(folder.parent.glob("*/")) if any(p.glob("*/record.json"))]
        has = f"; sweeps there: {', '.join(near)}" if near else ""
        raise ConfigErrors(f"folder: must be the folder of a sweep; '{folder}' does not exist{has}")
    found = list(record.find(folder))
    read = {path.name for path, _ in found}
    bad = [p.parent.name for p in sorted(folder.glob("*/record.json")) if p.parent.name not in read]
    if bad:
        fail(
            [
                f"left out, record.json is damaged or of a newer version: {', '.join(bad)}; "
                "the command that made them trains them again"
            ]
        )
    if (folder / "sweep.json").is_file():
        found += SweepFolder(folder).planned()
    if not found:
        raise ConfigErrors(
            f"folder: must hold runs (folders with record.json); '{folder}' has none; "
            f"`lorabench train` makes them"
        )
    return found


def runs(arguments: list[str]) -> int:
    """lorabench runs FOLDER [--json]"""
    from lorabench import show

    options = _folder_parser("runs").parse_args(arguments)
    show.runs(_records(options.folder), options.json)
    return 0


def compare(arguments: list[str]) -> int:
    """lorabench compare FOLDER [--json]"""
    from lorabench import compare as comparing
    from lorabench import show

    options = _folder_parser("compare").parse_args(arguments)
    table = comparing.table([record for _, record in _records(options.folder)])
    show.comparison(table, options.folder, options.json)
    return 0
