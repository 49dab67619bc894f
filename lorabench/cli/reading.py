"""The runs of a sweep folder, and the verb that lists them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def records_of(
    folder: Path,
    hash_of: Callable[[Path], str] | None = None,
    told: Callable[[list[str]], Any] = tell,
) -> list[Checked]:
    """Runs of a folder; what is damaged is told.

    Args:
        hash_of: reads every file of every run; None: only those whose size or time is another.
        told: gets lines about what is damaged.
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
    told([*lines[:MOST_LINES], *_and_more(lines[MOST_LINES:], folder)])
    bad = [p.parent.name for p in sorted(folder.glob("*/record.json")) if p.parent.name not in read]
    if bad:
        told(
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
    """lorabench runs FOLDER [--status NAME,...] [--verify] [--json]"""
    from lorabench import hashes, show

    parser = _folder_parser("runs")
    parser.add_argument(
        "--status", metavar="NAME,...", help="show these alone, such as failed,interrupted"
    )  # fmt: skip
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every file of every run; exit code 1 if one is not what was recorded",
    )
    options = parser.parse_args(arguments)
    statuses = [] if options.status is None else _statuses(options.status)
    found = records_of(options.folder, hashes.fresh_hash if options.verify else None)
    show.runs(found, options.json, statuses)
    if not options.verify:
        return 0
    recorded = [one for one in found if one.entry.files]
    damaged = [one for one in recorded if one.damaged]
    tell([f"{len(recorded) - len(damaged)} of {len(recorded)} runs are as they were recorded"])
    return 1 if damaged else 0


def _statuses(text: str) -> list[str]:
    """Read statuses separated by commas.

    Raises:
        ConfigErrors: one that no run can have.
    """
    from typing import get_args

    from lorabench.config import ConfigErrors, did_you_mean
    from lorabench.record import Status

    known, asked = get_args(Status), [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in asked if word not in known]
    if unknown or not asked:
        got = ", ".join(did_you_mean(word, known) for word in unknown) or "none"
        raise ConfigErrors(f"--status: must name statuses, of {', '.join(known)}; got {got}")
    return list(dict.fromkeys(asked))
