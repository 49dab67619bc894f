"""The verbs that serve a sweep folder as it is: work and evaluate."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench import masking
from lorabench.cli.telling import Parser
from lorabench.cli.verbs import VERBS

if TYPE_CHECKING:
    from lorabench.plan import Plan, Planner
    from lorabench.record import Record
    from lorabench.sweep import Job, SweepFolder
    from lorabench.worker import Outcome


def work(arguments: list[str]) -> int:
    """lorabench work DIR [--stale-seconds N]"""
    parser = Parser(prog="lorabench work", description=VERBS["work"])
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a sweep")
    parser.add_argument(
        "--stale-seconds",
        type=float,
        metavar="N",
        help="others replace this worker after N seconds without an answer",
    )
    options = parser.parse_args(arguments)
    folder, entries = _open(options.folder)
    changes = {}
    if options.stale_seconds is not None:
        changes["worker.stale_seconds"] = options.stale_seconds
    wanted = {run: (entry.label, entry.config) for run, entry in entries.items()}
    return _serve(folder, wanted, changes, ["work", *arguments])


def evaluate(arguments: list[str]) -> int:
    """lorabench evaluate DIR [KEY=VALUE ...]"""
    parser = Parser(
        prog="lorabench evaluate",
        description=VERBS["evaluate"],
        epilog="keys: data.metric, data.answer_*, data.test.*, data.num_test, data.validation.*, "
        "data.num_validation, trainer.eval_*, objective, trainer.device",
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR",
        help="folder of a sweep, or of one run, or the beginning of a run's id",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    changes = read_overrides(options.overrides)
    from lorabench.runs import folder_of

    place, only = folder_of(options.folder, must_exist=False).resolve(), None
    if (place / "record.json").is_file():
        place, only = place.parent, place.name
    folder, entries = _open(place)
    from lorabench.config import ConfigErrors

    wanted = {}
    for run, entry in entries.items():
        found = folder.record(run)
        if found is not None and found.has_trained() and only in (None, run):
            wanted[run] = (entry.label, entry.config)
    if not wanted:
        raise ConfigErrors(
            f"DIR: must hold runs with a saved adapter; '{options.folder}' has none; "
            f"`lorabench work {place}` trains what is planned there"
        )
    return _serve(folder, wanted, changes, ["evaluate", *arguments])


def _open(place: Path) -> tuple[SweepFolder, dict[str, Any]]:
    from lorabench import record
    from lorabench.config import ConfigErrors
    from lorabench.sweep import SweepFolder

    folder = SweepFolder(place)
    if not (place / "sweep.json").exists():
        versions = {entry.arithmetic_version for _, entry in record.find(place)}
        if versions and max(versions) < record.ARITHMETIC_VERSION:
            remedy = (
                "its runs were written by an earlier lorabench: compare and export read them, "
                "`lorabench train` with their command trains them anew"
            )
        elif versions:
            remedy = "restore it, or repeat the `lorabench train` command, which writes it again"
        else:
            remedy = "`lorabench train` makes one"
        raise ConfigErrors(
            f"DIR: must be the folder of a sweep, with sweep.json; '{place}' has none; {remedy}"
        )
    return folder, folder.read().runs


def read_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Parse KEY=VALUE words of an evaluation, by Hydra's grammar.

    Raises:
        ConfigErrors: a word that is none, or a key that decides the training.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from lorabench import identity
    from lorabench.config import ConfigErrors, did_you_mean, keys

    known = [key for key in keys() if identity.is_of_evaluation(key) or key == "trainer.device"]
    errors, changes = [], {}
    for override in OverridesParser.create().parse_overrides(list(words)):
        key = override.key_or_group
        if override.is_add() or override.is_delete():
            errors.append(f"{key}: must be KEY=VALUE; got '{override.input_line}'")
        elif override.is_sweep_override():
            errors.append(f"{key}: must be one value; got a sweep; write '{key}=[...]' for a list")
        elif key not in known:
            trains = ", which decides the training" if key in keys() else ""
            errors.append(
                f"{key}: must be a key of the evaluation{trains}; got {did_you_mean(key, known)}; "
                f"`lorabench evaluate --help` lists them"
            )
        else:
            changes[key] = override.value()
    if errors:
        raise ConfigErrors(errors)
    return changes


def _serve(
    folder: SweepFolder,
    wanted: dict[str, tuple[str, Any]],
    changes: dict[str, Any],
    words: Sequence[str],
) -> int:
    """Bring these runs of a folder to their end: trained, and scored as their configs ask."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lorabench import interrupt, tracking
    from lorabench.cli.training import closing
    from lorabench.config import ConfigErrors
    from lorabench.plan import Planner
    from lorabench.progress import Display
    from lorabench.sweep import check_room
    from lorabench.worker import Shared, Worker, stale_checkpoints

    interrupt.install()
    planner = Planner()
    jobs, refused = planned(folder, wanted, changes, planner)
    shared = Shared(planner, words)
    display = Display(0, 0)
    worker = Worker(folder, jobs, shared, display)
    worker.look_at_kept()
    left = [job for job in jobs if worker.asked.is_left(job)]
    to_train = [job for job in left if worker.asked.must_train(job)]
    packs = folder.read().current_packs()
    check_room([[job for job in to_train if job.plan.run_id in pack.runs] for pack in packs])
    if stale := stale_checkpoints(to_train, packs):
        raise ConfigErrors(stale)
    display.num_runs = len(left)
    display.steps_total = sum(job.config.trainer.num_steps for job in to_train)
    if len(left) < len(wanted):
        display.say(
            f"{len(jobs) - len(left)} of {len(wanted)} runs have what was asked for, "
            f"{len(left)} to do"
        )
    for note in shared.check_data(left):
        display.say(f"note: {note}")
    with tracking.of_command(), display:
        outcomes = worker.finish_all()
    return closing([*outcomes, *refused])


def planned(
    folder: SweepFolder,
    wanted: dict[str, tuple[str, Any]],
    changes: dict[str, Any],
    planner: Planner,
) -> tuple[list[Job], list[Outcome]]:
    """Plan runs of sweep.json, with other settings of evaluation.

    The run id is the one they were trained under: settings of evaluation have no part in it.

    Returns:
        The runs as jobs, and outcomes of those that cannot be served: their base or their data
        changed since.
    Raises:
        ConfigErrors: nothing can be served; everything wrong.
    """
    from lorabench.config import ConfigErrors
    from lorabench.sweep import Mistakes
    from lorabench.worker import Outcome

    mistakes, jobs, refused = Mistakes(len(wanted)), [], []
    for run, (label, content) in wanted.items():
        with mistakes.of(label):
            try:
                jobs.append(_planned(folder, run, label, content, changes, planner))
            except ConfigErrors as error:
                found = folder.record(run)
                if not changes and found and found.evaluations and found.has_trained():
                    continue  # it has ended, and nothing else is asked of it
                text, place = "; ".join(error.errors), str(folder.path / run)
                status = found.status if found else "planned"
                refused.append(Outcome(run, label, status, place, text, has_failed=True))
                raise
    if not jobs:
        mistakes.refuse()
    return jobs, refused


def _planned(
    folder: SweepFolder,
    run: str,
    label: str,
    content: dict[str, Any],
    changes: dict[str, Any],
    planner: Planner,
) -> Job:
    from omegaconf import OmegaConf, open_dict

    from lorabench import config as configs
    from lorabench import identity, plan
    from lorabench.config import Config, ConfigErrors
    from lorabench.sweep import Job

    cfg: Any = OmegaConf.merge(OmegaConf.structured(Config), content)
    with open_dict(cfg):
        for key, value in changes.items():
            OmegaConf.update(cfg, key, value)
        # Wherever the folder lies by now.
        cfg.output_dir, cfg.sweep = str(folder.path.parent), folder.path.name
    config = configs.typed(cfg)
    if found := plan.check(config):
        raise ConfigErrors(found)
    made = planner.make(config)
    _must_be_its_base(folder.record(run), made)
    chose = bool(changes) and identity.selects(dataclasses.asdict(config.trainer))
    if made.run_id != run and not chose and not _takes_other_examples(changes):
        raise ConfigErrors(
            f"sweep.json: run {run} must still resolve to what was planned; it resolves to "
            f"{made.run_id} now: its data, base or tokenizer changed, or lorabench computes "
            f"otherwise{masking.why_other(content)}; put them back, or repeat the command that "
            f"asked for it"
        )
    here = {"run_id": run, "folder": str(folder.path / run)}
    job = Job(config, label, made.model_copy(update=here))
    job.check_folder()
    return job


def _must_be_its_base(trained: Record | None, made: Plan) -> None:
    """Refuse another base or tokenizer than the one a run was trained on."""
    from lorabench.config import ConfigErrors

    if trained is None:
        return
    for name in ("hub", "revision", "weights", "tokenizer"):
        then = trained.provenance.get(name)
        if then is not None and then != made.contents[name]:
            raise ConfigErrors(
                f"model.path: must be the base that run {trained.run_id} was trained on, {name} "
                f"{then[:12]}; it is {made.contents[name][:12]} now; put that base back"
            )
    then, now = (one.get("chat_template") for one in (trained.provenance, made.contents))
    if then and now and then != now:
        raise ConfigErrors(
            f"data.chat_template: must be the template that run {trained.run_id} was trained with, "
            f"{then[:12]}; it is {now[:12]} now; put that text back: it lies in the run's folder, "
            f"in adapter/chat_template.jinja"
        )


def _takes_other_examples(changes: dict[str, Any]) -> bool:
    """Whether a split that was taken from the training file is now a file of its own.

    The training set would be another one then; nothing is trained, so that is no objection.
    """
    return any(key.startswith(("data.test", "data.validation")) for key in changes)
