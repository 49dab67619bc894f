"""The verbs that read what runs left: runs and compare."""

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


def _records(folder: Path, hash_of: Callable[[Path], str] | None = None) -> list[Checked]:
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
    found = _records(options.folder, hashes.fresh_hash if options.verify else None)
    show.runs(found, options.json)
    if not options.verify:
        return 0
    recorded = [one for one in found if one.entry.files]
    damaged = [one for one in recorded if one.damaged]
    tell([f"{len(recorded) - len(damaged)} of {len(recorded)} runs are as they were recorded"])
    return 1 if damaged else 0


def compare(arguments: list[str]) -> int:
    """lorabench compare FOLDER [FOLDER ...] [--vary ...] [--baseline ...] [--margin X] [--json]"""
    from lorabench import compare as comparing
    from lorabench import show

    parser = Parser(prog="lorabench compare", description=VERBS["compare"])
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="folder",
        help="folder of a sweep, such as outputs/lm_head; several are compared as one",
    )  # fmt: skip
    parser.add_argument(
        "--vary", type=_words, default=[], metavar="KEY,...",
        help="ask about these alone, such as head; default: everything that varies",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", type=_baseline, action="append", default=[], metavar="KEY=VALUE",
        help="compare every other value of a key with this one, such as lora.r=16",
    )  # fmt: skip
    parser.add_argument(
        "--metric", help="that the verdicts are on; default: nll where there is one"
    )
    parser.add_argument(
        "--margin", type=_margin, metavar="X",
        help="a difference that does not matter: also ask what is no worse by more than X",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    options = parser.parse_args(arguments)
    found = [one for folder in options.folders for one in _records(folder)]
    table = comparing.table([one.entry for one in found])
    answers = comparing.verdicts(
        [(one.folder, one.entry) for one in found],
        options.metric, options.vary, dict(options.baseline), options.margin,
    )  # fmt: skip
    show.comparison(table, answers, options.folders, options.json)
    return 0


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _baseline(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not (key and sign and value):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, such as lora.r=16; got '{text}'")
    return key, value


def _margin(text: str) -> float:
    try:
        margin = float(text)
    except ValueError:
        margin = float("nan")
    if not 0 < margin < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0; got '{text}'")
    return margin
