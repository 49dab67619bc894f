"""The verb settle: seeds are added to a sweep until its questions are settled."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.cli.comparing import Asked, add_questions, asked_of, table_of
from lorabench.cli.reading import records_of
from lorabench.cli.telling import Parser, nowhere, tell
from lorabench.cli.verbs import VERBS

if TYPE_CHECKING:
    from lorabench.compare import Answers
    from lorabench.intact import Checked
    from lorabench.sweep import LookEntry, SettlingEntry, SweepFolder
    from lorabench.worker import Outcome

STREAMS = ("init", "data", "dropout")


def settle(arguments: list[str]) -> int:
    """lorabench settle DIR [--margin X] [--max-seeds M] [--vary ...] [--metric NAME] [--json]"""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lorabench import interrupt, show
    from lorabench.cli.training import closing
    from lorabench.config import ConfigErrors
    from lorabench.sweep import SweepFolder

    parser = Parser(
        prog="lorabench settle",
        description=VERBS["settle"],
        epilog="The looks (at most three, none below three seeds) are stored in sweep.json before "
        "a seed is added, each with its own share of the 5% of sweeps that may have a false "
        "verdict. The same command continues.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a sweep")
    parser.add_argument(
        "--max-seeds", type=_count, metavar="M", help="seeds of each setting, at most; default: 8"
    )
    add_questions(parser)
    parser.add_argument("--json", action="store_true", help="the verdicts as JSON")
    options = parser.parse_args(arguments)
    interrupt.install()
    found = records_of(options.folder)
    folder = SweepFolder(options.folder.resolve())
    if not (folder.path / "sweep.json").is_file():
        raise ConfigErrors(
            f"DIR: must be the folder of a sweep, with sweep.json; '{options.folder}' has none; "
            f"`lorabench train` makes one"
        )
    asked = asked_of(options, [options.folder], found, told=nowhere)
    answers = asked.answers(found)
    if answers.metric is not None and not answers.verdicts:
        tell([f"nothing to settle: {show.nothing_asked(answers)}"])
        return 0
    settling = _fixed(folder, asked, found, options.max_seeds)
    code = 0
    for number, look in enumerate(settling.looks):
        if look.taken:
            continue
        answers = asked_of(options, [options.folder], found, told=nowhere).answers(found)
        wanted = _open_runs(answers, number > 0)
        if number and not wanted:
            break
        tell([f"look {number + 1} of {len(settling.looks)}, at {len(look.seeds)} seeds"])
        outcomes = _train(folder, found, wanted, look, ["settle", *arguments])
        code = max(code, closing(outcomes))
        # A run that diverged has ended: the look is taken without it.
        if any(one.status not in ("finished", "stopped") for one in outcomes):
            return code
        folder.take_look(number)
        found = records_of(options.folder)
    asked = asked_of(options, [options.folder], found)
    answers = asked.answers(found)
    table = table_of([options.folder], found, answers)
    show.comparison(table, answers, [options.folder], options.json, asked.shown)
    return tell(_closing(answers), code)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 3:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 3; got '{text}'")
    return int(text)


def _fixed(
    folder: SweepFolder, asked: Asked, found: Sequence[Checked], most: int | None
) -> SettlingEntry:
    """The looks: those of sweep.json, or new ones that are written there.

    Raises:
        ConfigErrors: others than those that were fixed; the sweep has its seeds already.
    """
    from lorabench import record
    from lorabench.compare.looks import plan_looks
    from lorabench.compare.scored import metric_of
    from lorabench.config import ConfigErrors
    from lorabench.sweep import LookEntry, SettlingEntry

    if (before := asked.settling) is not None and _has_begun(folder, before, found):
        changed = {
            "--vary": (asked.vary, before.vary), "--select": (asked.select, before.select),
            "--baseline": (asked.baseline, before.baseline),
            "--margin": (asked.margin, before.margin),
            "--metric": (asked.metric, before.metric),
            "--max-seeds": (most or len(before.looks[-1].seeds), len(before.looks[-1].seeds)),
        }  # fmt: skip
        refused = [
            f"{option}: must stay as it was when the looks were fixed ({_told(was)}); got "
            f"{_told(now)}; leave it out, or answer another question with a new sweep on fresh "
            f"seeds"
            for option, (now, was) in changed.items()
            if now != was
        ]
        if refused:
            raise ConfigErrors(refused)
        return before
    finished = [one.entry for one in found if one.entry.status == "finished"]
    metric = metric_of(finished, asked.metric)
    if metric is None:
        raise ConfigErrors(
            f"DIR: must hold finished runs that were scored on the test split; '{folder.path}' has "
            f"none; `lorabench train` or `lorabench work` finishes them"
        )
    apart = [one for one in finished if any(one.seeds[s] != one.config["seed"] for s in STREAMS)]
    if apart:
        raise ConfigErrors(
            f"DIR: must be a sweep over `seed`, which settle adds to; in run {apart[0].run_id} one "
            f"of seeds.init, seeds.data and seeds.dropout is another; repeat the `lorabench train` "
            f"command with more of them"
        )
    have = sorted({one.config["seed"] for one in finished})
    most = most or max(8, len(have))
    if most <= len(have):
        raise ConfigErrors(
            f"--max-seeds: must be above the {len(have)} seeds that the sweep has; got {most}; "
            f"`lorabench compare` says what they tell"
        )
    looks = [LookEntry(seeds=list(one.seeds), level=one.level) for one in plan_looks(have, most)]
    return folder.begin_settling(
        SettlingEntry(
            vary=asked.vary, select=asked.select, baseline=asked.baseline, metric=metric,
            margin=asked.margin, looks=looks, started=record.now(),
        )
    )  # fmt: skip


def _told(value: Any) -> str:
    """The value of an option, as it is typed."""
    if isinstance(value, dict):
        return " ".join(f"{key}={level}" for key, level in value.items()) or "none"
    if isinstance(value, list):
        return ",".join(value) or "all that varies"
    return "none" if value is None else str(value)


def _has_begun(folder: SweepFolder, settling: SettlingEntry, found: Sequence[Checked]) -> bool:
    """Whether a look was taken or a seed added; until then the looks can be fixed anew."""
    asked = {run.config["seed"] for run in folder.read().runs.values()}
    have = {one.entry.config["seed"] for one in found if one.entry.status == "finished"}
    return asked != have or any(look.taken for look in settling.looks)


def _open_runs(answers: Answers, looked: bool) -> list[str]:
    """One run of each setting of the open questions.

    Args:
        looked: whether there has been a look; before it every question is open.
    """
    found: dict[str, None] = {}
    for one in answers.verdicts:
        if not looked or one.is_open:
            for setting in {i for pair in one.question.pairs for i in pair}:
                found |= dict.fromkeys(answers.runs[setting])
    return list(found)


def _train(
    folder: SweepFolder,
    found: Sequence[Checked],
    wanted: Sequence[str],
    look: LookEntry,
    words: list[str],
) -> list[Outcome]:
    """Train every setting of these runs with every seed of a look that it lacks."""
    from omegaconf import OmegaConf

    from lorabench import config as configs
    from lorabench import tracking
    from lorabench.cli.serving import planned
    from lorabench.cli.sessions import Command
    from lorabench.compare.tables import settings_of
    from lorabench.config import ConfigErrors

    content = folder.read()
    settings = settings_of([one.entry for one in found])
    there: dict[str, set[int]] = {}  # seeds of finished runs, by setting
    of_run = {}
    for one, setting in zip(found, settings, strict=True):
        of_run[one.entry.run_id] = repr(sorted(setting.items()))
        if one.entry.status == "finished":
            there.setdefault(of_run[one.entry.run_id], set()).add(one.entry.config["seed"])
    missing = {run: [s for s in look.seeds if s not in there[of_run[run]]] for run in wanted}
    if not any(missing.values()):
        return []
    command = Command(words)
    records = {one.entry.run_id: one.entry for one in found}
    entries = {
        run: (content.runs[run].label, content.runs[run].config)
        if run in content.runs
        else ("", records[run].config)  # sweep.json was moved away, the run was kept
        for run in wanted
    }
    _, refused = planned(folder, entries, {}, command.planner)
    if refused:
        raise ConfigErrors([one.error or "" for one in refused])
    jobs, labels = [], []
    for seed in look.seeds:  # runs of one seed see the same batches: side by side
        for run, lacking in missing.items():
            if seed not in lacking:
                continue
            label, own = entries[run]
            mine = {
                "seed": seed, "seeds": dict.fromkeys(STREAMS, seed),
                "output_dir": str(folder.path.parent), "sweep": folder.path.name,
            }  # fmt: skip
            cfg: Any = OmegaConf.merge(OmegaConf.structured(configs.Config), own | mine)
            jobs.append(cfg)
            labels.append(f"{re.sub(r'(^| )seed=[^ ]*', '', label).strip()} seed={seed}".strip())
    size = max((len(pack.runs) for pack in content.packs), default=1)
    with tracking.of_command():
        session = command.begin(jobs, labels, size)
        for i in range(len(jobs)):
            session.result(i)
    return list(command.outcomes.values())


def _closing(answers: Answers) -> list[str]:
    """What was settled, and what would settle the rest."""
    settled = sum(
        one.is_settled and (one.retention is None or one.retention.is_settled)
        for one in answers.verdicts
    )
    lines = [f"{settled} of {len(answers.verdicts)} questions are settled"]
    if needed := [one.more_examples for one in answers.verdicts if one.more_examples]:
        lines.append(
            f"no number of seeds would settle {len(needed)} of the others; up to {max(needed):,} "
            f"test examples would"
        )
    return lines
