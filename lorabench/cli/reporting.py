"""The verbs that write a page of a sweep: report and watch."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench import interrupt, masking
from lorabench.cli.comparing import add_folders, add_questions, compared
from lorabench.cli.telling import Parser, above_zero, tell
from lorabench.cli.verbs import VERBS

if TYPE_CHECKING:
    from lorabench.report.content import Content

SECONDS = 10.0  # between two pages of `watch`
OVER = ("finished", "stopped", "failed")  # statuses of runs that nobody trains any more


def report(arguments: list[str]) -> int:
    """lorabench report DIR [DIR ...] [--out FILE] [--png DIR] and the options of compare"""
    parser = Parser(prog="lorabench report", description=VERBS["report"])
    add_folders(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html in the (first) folder"
    )
    parser.add_argument(
        "--png", type=Path, metavar="DIR", help="also write every figure as a PNG file"
    )
    add_questions(parser)
    options = parser.parse_args(arguments)
    from lorabench.report import page
    from lorabench.show.text import size

    out = _place(options.out, options.folders)
    content = _content(options, ["report", *arguments], tell)
    num_bytes = page.write(content, out)
    runs = sum(content.statuses.values())
    print(masking.mask(f"{out}: {size(num_bytes)}, {runs} run{'' if runs == 1 else 's'}"))
    if options.png is not None:
        written = page.write_png(content.groups, options.png)
        print(f"{options.png}: {len(written)} figures")
    return 0


def watch(arguments: list[str]) -> int:
    """lorabench watch DIR [--out FILE] [--seconds N] and the options of compare"""
    parser = Parser(
        prog="lorabench watch",
        description=VERBS["watch"],
        epilog="ends when every run has ended, or by a signal such as Ctrl-C; the last page "
        "reloads no more",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a sweep")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: DIR/report.html")
    parser.add_argument(
        "--seconds", type=above_zero, default=SECONDS, metavar="N",
        help="between two pages; more where a page takes longer; default: 10",
    )  # fmt: skip
    add_questions(parser)
    options = parser.parse_args(arguments)
    options.folders = [options.folder]
    interrupt.install()
    from lorabench.report import page
    from lorabench.report.content import without

    out = _place(options.out, options.folders)
    words = ["report", *without(arguments, ("--seconds",))]
    told: dict[str, int] | None = None
    seen: set[str] = set()

    def once(lines: list[str]) -> None:
        """Tell what was not told in an earlier round."""
        tell([line for line in lines if line not in seen])
        seen.update(lines)

    try:
        while True:
            begun = time.monotonic()
            content = _content(options, words, once)
            # The base is scored behind the last run: what ended while it was watched is looked at
            # once more.
            ended = _has_ended(options.folder, content)
            is_over = ended and (told is None or content.statuses == told)
            seconds = max(1.0, options.seconds, 2 * (time.monotonic() - begun))
            page.write(content, out, None if is_over else round(seconds))
            if content.statuses != told:
                counts = ", ".join(f"{n} {name}" for name, n in content.statuses.items())
                print(f"{out}: {counts}", flush=True)
                told = content.statuses
            if is_over:
                return 0
            if not ended and all(name in OVER for name in content.statuses):
                once([
                    f"waiting for the next look: `lorabench settle {options.folder}` takes it, "
                    f"Ctrl-C ends"
                ])  # fmt: skip
            spent = time.monotonic() - begun
            time.sleep(max(options.seconds - spent, spent))  # a training may need this machine
    except KeyboardInterrupt:
        page.write(_content(options, words, once), out)
        return 128 + interrupt.number()


def _has_ended(folder: Path, content: Content) -> bool:
    """Whether nothing more is planned: no run, and no look of `settle` at an open question."""
    from lorabench.sweep import SweepFolder

    settling = SweepFolder(folder).read().settling
    looks_left = settling is not None and any(look.taken is None for look in settling.looks)
    is_open = looks_left and any(one.is_open for one in content.answers.verdicts)
    return not is_open and all(name in OVER for name in content.statuses)


def _place(out: Path | None, folders: Sequence[Path]) -> Path:
    """Where the page goes.

    Raises:
        ConfigErrors: no file can be written there.
    """
    from lorabench.config import ConfigErrors

    first = folders[0].parent if folders[0].is_file() else folders[0]
    place = first / "report.html" if out is None else out
    if place.is_dir():
        raise ConfigErrors(f"--out: must be a file; '{place}' is a folder")
    if out is not None and not place.parent.is_dir():
        raise ConfigErrors(f"--out: must lie in a folder that exists; '{place.parent}' does not")
    return place


def _content(
    options: argparse.Namespace, words: Sequence[str], told: Callable[[list[str]], Any]
) -> Content:
    """What the page shows of these folders now; what is told stands on it too."""
    from lorabench.report.content import content_of

    remarks: list[str] = []

    def both(lines: list[str]) -> None:
        remarks.extend(lines)
        told(lines)

    one = compared(options, both)
    return content_of(
        one.folders, one.sweeps, one.found, one.table, one.answers, words, remarks
    )  # fmt: skip
