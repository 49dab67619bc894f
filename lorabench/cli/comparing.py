"""The verb compare, and what is asked of a sweep."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.cli.reading import records_of
from lorabench.cli.telling import Parser, above_zero, tell
from lorabench.cli.verbs import VERBS

if TYPE_CHECKING:
    from lorabench.compare import Answers
    from lorabench.intact import Checked
    from lorabench.sweep import SettlingEntry


@dataclass(frozen=True)
class Asked:
    """What is asked: the options, then what `settle` was asked, then the experiment's `compare`.

    Args:
        metric: that the verdicts are on; None: the first that the runs have.
        shown: metrics in the table; none: all.
    """

    vary: list[str] = field(default_factory=list)
    select: str | None = None
    baseline: dict[str, str] = field(default_factory=dict)
    metric: str | None = None
    shown: list[str] = field(default_factory=list)
    margin: float | None = None
    settling: SettlingEntry | None = None

    def answers(self, found: Sequence[Checked]) -> Answers:
        """Ask it of these runs."""
        from lorabench import compare
        from lorabench.compare.looks import Look

        planned = self.settling.looks if self.settling else []
        taken = [Look(tuple(one.seeds), one.level) for one in planned if one.taken]
        return compare.verdicts(
            [(one.folder, one.entry) for one in found],
            self.metric, self.vary, self.baseline, self.margin, self.select, taken, len(planned),
        )  # fmt: skip


def compare(arguments: list[str]) -> int:
    """lorabench compare DIR [DIR ...] [--vary ...] [--select KEY] [--baseline ...] [--margin X]"""
    from lorabench import show
    from lorabench.config import ConfigErrors

    parser = Parser(prog="lorabench compare", description=VERBS["compare"])
    add_folders(parser)
    add_questions(parser)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    options = parser.parse_args(arguments)
    one = compared(options)
    there = {
        name
        for row in [*one.table["rows"], *one.table.get("foreign", ())]
        for names in row["metrics"].values()
        for name in names
    }
    if unknown := [name for name in one.asked.shown if name not in there]:
        raise ConfigErrors(
            f"--metric: must be scores that the runs have ({', '.join(sorted(there)) or 'none'}); "
            f"got '{unknown[0]}'; `lorabench evaluate DIR 'data.metric=[{unknown[0]}]'` scores "
            f"saved adapters"
        )
    show.comparison(one.table, one.answers, one.folders, options.json, one.asked.shown)
    return 0


@dataclass(frozen=True)
class Compared:
    """Sweeps, and what they answer.

    Args:
        folders: that were named, each once.
        sweeps: those of them that hold runs; the others hold results of PEFT's benchmark.
    """

    folders: list[Path]
    sweeps: list[Path]
    found: list[Checked]
    asked: Asked
    answers: Answers
    table: dict[str, Any]


def compared(options: Any, told: Callable[[list[str]], Any] = tell) -> Compared:
    """Read the folders that were named, and ask them what is asked.

    Args:
        options: of a parser with `add_folders` and `add_questions`.
        told: gets lines about what is damaged or could not be read.
    """
    folders = list({folder.resolve(): folder for folder in options.folders}.values())
    foreign = [folder for folder in folders if _is_foreign(folder)]
    sweeps = [folder for folder in folders if folder not in foreign]
    found = [one for folder in sweeps for one in records_of(folder, told=told)]
    asked = asked_of(options, sweeps, found, told)
    answers = asked.answers(found)
    table = table_of(sweeps, found, answers)
    if foreign:
        table["foreign"] = _foreign_rows(foreign, table["varied"], told)
    return Compared(folders, sweeps, found, asked, answers, table)


def table_of(sweeps: Sequence[Path], found: Sequence[Checked], answers: Answers) -> dict[str, Any]:
    """The table of these runs, what speaks against it, and their untrained bases."""
    from lorabench import compare
    from lorabench.compare.bases import add_changes, bases
    from lorabench.compare.lints import lints

    records = [one.entry for one in found]
    table = compare.table(records)
    table["lints"] = lints([(one.folder, one.entry) for one in found], answers)
    table["bases"] = bases(sweeps, records, table["evaluations"])
    if answers.metric is not None and answers.retention_metric is not None:
        add_changes(table, table["bases"], answers.metric, answers.retention_metric)
    return table


def _is_foreign(folder: Path) -> bool:
    """Whether it holds results of PEFT's own benchmark, and no sweep."""
    from lorabench.compare.foreign import is_foreign

    if (folder / "sweep.json").exists() or any(folder.glob("*/record.json")):
        return False
    return is_foreign(folder)


def _foreign_rows(
    folders: Sequence[Path], varied: Sequence[str], told: Callable[[list[str]], Any]
) -> list[dict[str, Any]]:
    """Results of PEFT's own benchmark; what cannot be read is told."""
    from lorabench.compare.foreign import SHOWN, read, table_rows

    rows = [row for folder in folders for row in read(folder)]
    told([row.error for row in rows if row.error])
    return table_rows(rows, list(dict.fromkeys([*varied, *SHOWN])))


def add_folders(parser: argparse.ArgumentParser) -> None:
    """The folders that are compared."""
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="folder",
        help="folder of a sweep, such as outputs/lm_head; several are compared as one",
    )  # fmt: skip


def add_questions(parser: argparse.ArgumentParser) -> None:
    """The options that say what is asked."""
    parser.add_argument(
        "--vary", type=_words, metavar="KEY,...",
        help="ask about these alone, such as head; default: everything that varies",
    )  # fmt: skip
    parser.add_argument(
        "--select", metavar="KEY",
        help="choose the value of a key, such as trainer.lr, on validation; test judges; none: do "
        "not, whatever the experiment says",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", type=_baseline, action="append", metavar="KEY=VALUE",
        help="compare every other value of a key with this one, such as lora.r=16",
    )  # fmt: skip
    parser.add_argument(
        "--metric", type=_words, metavar="NAME,...",
        help="the first judges, all are shown; default: nll where there is one",
    )  # fmt: skip
    parser.add_argument(
        "--margin", type=above_zero, metavar="X",
        help="a difference that does not matter: also ask what is no worse by more than X",
    )  # fmt: skip


def asked_of(
    options: Any,
    folders: Sequence[Path],
    found: Sequence[Checked],
    told: Callable[[list[str]], Any] = tell,
) -> Asked:
    """What options and folders ask, the options first.

    What an experiment asks is left out where an option contradicts it.

    Args:
        told: gets lines about looks that were not taken.
    Raises:
        ConfigErrors: options that contradict each other.
    """
    from lorabench.config import ConfigErrors

    settling = _settling(folders, told)
    vary, select, baseline = _of_experiment(folders, found)
    metric, margin = None, None
    if settling is not None:
        vary, select, baseline = settling.vary, settling.select, settling.baseline
        metric, margin = settling.metric, settling.margin
    baselines = [key for key, _ in options.baseline or ()]
    if twice := sorted({key for key in baselines if baselines.count(key) > 1}):
        raise ConfigErrors(f"--baseline: must name a key once; got {twice[0]} twice; leave one out")
    if options.vary is not None:
        vary = options.vary
        baseline = {}
        select = None if select in vary else select
    if options.select is not None:
        select = None if options.select == "none" else options.select
        vary = [name for name in vary if name != select or name in (options.vary or ())]
    if select is not None and select in vary:
        raise ConfigErrors(
            f"--select: must be a key that is not asked about; got {select} in --vary too; leave "
            f"it out of one of them"
        )
    return Asked(
        vary,
        select,
        baseline if options.baseline is None else dict(options.baseline),
        options.metric[0] if options.metric and found else metric,
        options.metric or [],
        margin if options.margin is None else options.margin,
        settling,
    )


def _settling(
    folders: Sequence[Path], told: Callable[[list[str]], Any]
) -> SettlingEntry | None:
    """What `settle` was asked of a sweep."""
    from lorabench.sweep import SweepFolder

    found = [one for folder in folders if (one := SweepFolder(folder).read().settling)]
    if found and len(folders) > 1:
        told(["settled sweeps are compared with others as if their seeds had been planned at once"])
        return None
    if not found:
        return None
    if not any(look.taken for look in found[0].looks):
        told(
            [f"{folders[0]}: no look was taken yet; `lorabench settle {folders[0]}` takes the "
             f"first; until then the verdicts are as if nobody had looked before"]
        )  # fmt: skip
    return found[0]


def _of_experiment(
    folders: Sequence[Path], found: Sequence[Checked]
) -> tuple[list[str], str | None, dict[str, str]]:
    """What the newest command of the first folder asks; what does not vary is left out."""
    from lorabench.compare.questions import factors_of, that_vary
    from lorabench.compare.tables import settings_of
    from lorabench.sweep import SweepFolder

    if not folders:
        return [], None, {}
    content = SweepFolder(folders[0]).read()
    runs = content.commands[-1].runs if content.commands else []
    asked = content.runs[runs[0]].config.get("compare") if runs else None
    if not asked:
        return [], None, {}
    # Among finished runs alone, which are those that are compared.
    finished = [one.entry for one in found if one.entry.status == "finished"]
    factors = factors_of(settings_of(finished))
    vary, baseline = that_vary(factors, asked.get("vary", ()), asked.get("baseline"))
    select = that_vary(factors, [asked["select"]] if asked.get("select") else [], None)[0]
    return vary, select[0] if select else None, baseline


def _words(text: str) -> list[str]:
    words = [word for word in text.split(",") if word]
    if not words:
        raise argparse.ArgumentTypeError(f"must be names with commas between them; got '{text}'")
    return words


def _baseline(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not (key and sign and value):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, such as lora.r=16; got '{text}'")
    return key, value
