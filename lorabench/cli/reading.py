"""The runs of a sweep folder, and the verb that lists them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.cli.telling import Parser, tell
from lorabench.cli.verbs import VERBS

if TYPE_CHECKING:
    from lorabench.intact import Checked

MOST_LINES = 5  # about damaged runs


def _folder_parser(verb: str) -> argparse.ArgumentParser:
    parser = Parser(prog=f"lorabench {verb}", description=VERBS[verb])
    parser.add_argument("folder", type=Path, help="folder of a sweep, such as outputs/lm_head")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    return parser


def records_of(folder: Path, hash_of: Callable[[Path], str] | None = None) -> list[Checked]:
    """Runs of a folder; what is damaged is told on stderr.

    Args:
        hash_of: reads every file of every run; None: only those whose size or time is another.
    """
    from lorabench import intact
    from lorabench.config import ConfigErrors
    from lorabench.sweep import SweepFolder

    if not folder.is_dir():
        near = [str(p) for p in sorted(folder.parent.glob("*/")) if any(p.glob("*/record.json"))]
        has = f"; sweeps there: {', '.join(near)}" if near else ""
        raise ConfigErrors(f"folder: must be the folder of a sweep; '{folder}' does not exist{has}")
    found = intact.checked(folder, hash_of)
    read = {one.folder.name for one in found}
    lines = [intact.described_damage(*one) for one in found if one.damaged]
    tell([*lines[:MOST_LINES], *_and_more(lines[MOST_LINES:], folder)])
    bad = [p.parent.name for p in sorted(folder.glob("*/record.json")) if p.parent.name not in read]
    if bad:
        tell(
            [
                f"left out, record.json is damaged or of a newer version: {', '.join(bad)}; "
                "the command that made them trains them again"
            ]
        )
    if (folder / "sweep.json").is_file():
        found += [intact.Checked(*one, {}) for one in SweepFolder(folder).planned()]
    if not found:
        raise ConfigErrors(
            f"folder: must hold runs (folders with record.json); '{folder}' has none; "
            f"`lorabench train` makes them"
        )
    return found


def _and_more(lines: list[str], folder: Path) -> list[str]:
    return [f"and {len(lines)} more: `lorabench runs {folder}` marks them"] if lines else []


def runs(arguments: list[str]) -> int:
    """lorabench runs FOLDER [--verify] [--json]"""
    from lorabench import hashes, show

    parser = _folder_parser("runs")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every file of every run; exit code 1 if one is not what was recorded",
    )
    options = parser.parse_args(arguments)
    found = records_of(options.folder, hashes.fresh_hash if options.verify else None)
    show.runs(found, options.json)
    if not options.verify:
        return 0
    recorded = [one for one in found if one.entry.files]
    damaged = [one for one in recorded if one.damaged]
    tell([f"{len(recorded) - len(damaged)} of {len(recorded)} runs are as they were recorded"])
    return 1 if damaged else 0
